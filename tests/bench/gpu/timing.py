"""Time on a GPU: every candidate becomes a CUDA graph of several calls over different buffers, and
the graphs take turns.

Graphs leave the launch gaps of Python out; buffers that together exceed the L2 cache make each call
read its weights from memory, as a model's layers do. Where a candidate cannot be captured, its
calls are timed as they are and marked so. On a CPU, for a dry run, a clock.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch

Call = Callable[[], object]
CACHE_BYTES = 128 << 20
"""More than any GPU's L2 that this is likely to meet (H100 50 MB, RTX 4090 72 MB, RTX 5090
96 MB).
"""


def copies(bytes_read: int, device: str, most: int = 16) -> int:
    """How many sets of buffers keep one call from finding its operands in the cache."""
    return 1 if device == "cpu" else max(1, min(most, -(-CACHE_BYTES // max(1, bytes_read))))


class Timed:
    """Calls made ready to be timed: warmed up, and captured where possible."""

    def __init__(self, calls: list[Call], device: str, target_ms: float = 2.0):
        self.device, self.calls, self.graph, self.mode = device, calls, None, "clock"
        with torch.inference_mode():
            for call in calls:
                call()
            if device == "cpu":
                return
            torch.cuda.synchronize()
            self.mode = "events"
            once = max(self.measure() * len(calls), 1e-3)
            self.calls = calls * max(1, min(64, int(target_ms / once)))
            self._capture()
            self.measure()

    def _capture(self) -> None:
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph):
                for call in self.calls:
                    call()
        except RuntimeError as error:  # a peer that synchronizes or allocates by itself
            torch.cuda.synchronize()
            self.why_not = str(error).splitlines()[0]
            return
        self.graph, self.mode = graph, "graph"

    def measure(self) -> float:
        """Milliseconds a call."""
        if self.device == "cpu":
            start = time.perf_counter()
            self._run()
            return (time.perf_counter() - start) * 1e3 / len(self.calls)
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        self._run()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / len(self.calls)

    def _run(self) -> None:
        if self.graph is not None:
            self.graph.replay()
        else:
            for call in self.calls:
                call()


def take_turns(
    candidates: dict[str, list[Call]], device: str, rounds: int = 9
) -> tuple[dict[str, dict], dict[str, str]]:
    """Times all candidates, one lap of each a round; the first one is the baseline.

    candidates: name -> one call for each set of buffers.
    Returns ({name: {"ms", "low_ms", "high_ms", "times_baseline", "mode"}}, {name: why it could not
    be timed}).
    """
    ready, failed = {}, {}
    for name, calls in candidates.items():
        try:
            ready[name] = Timed(calls, device)
        except Exception as error:  # whatever a peer does must not end the run
            failed[name] = f"{type(error).__name__}: {error}".splitlines()[0]
    laps: dict[str, list[float]] = {name: [] for name in ready}
    with torch.inference_mode():
        for _ in range(rounds):
            for name, timed in ready.items():
                laps[name].append(timed.measure())
    baseline = next(iter(laps.values()), [])
    return {
        name: {
            "ms": statistics.median(own),
            "low_ms": min(own),
            "high_ms": max(own),
            "mode": ready[name].mode,
            "times_baseline": statistics.median(
                mine / base for mine, base in zip(own, baseline, strict=True)
            ),
        }
        for name, own in laps.items()
    }, failed


def one(calls: list[Call], device: str, rounds: int = 9) -> float:
    """Median milliseconds of one candidate alone."""
    timed = Timed(calls, device)
    with torch.inference_mode():
        return statistics.median(timed.measure() for _ in range(rounds))
