"""Side-by-side timing: candidates take turns within one run, so that a busy or throttling machine slows all of them alike.

Figures are medians over rounds; a ratio is the median of the rounds' own ratios, each of two neighbours in time.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch


def once(run: Callable[[], object], device: str) -> float:
    """Seconds of one call, on a GPU until its work is done."""
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    run()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def side_by_side(candidates: dict[str, Callable[[], object]], device: str, rounds: int = 7) -> dict[str, dict[str, float]]:
    """Time every candidate once a round. The first candidate is the baseline.

    Returns name -> {"ms": median, "low_ms", "high_ms": extremes, "times_baseline": median ratio to the first candidate}.
    """
    with torch.inference_mode():
        for run in candidates.values():
            once(run, device)
        laps = {name: [] for name in candidates}
        for _ in range(rounds):
            for name, run in candidates.items():
                laps[name].append(once(run, device))
    baseline = next(iter(laps.values()))
    return {name: _summary(seconds, baseline) for name, seconds in laps.items()}


def _summary(seconds: list[float], baseline: list[float]) -> dict[str, float]:
    ratios = [mine / base for mine, base in zip(seconds, baseline, strict=True)]
    return {
        "ms": statistics.median(seconds) * 1e3,
        "low_ms": min(seconds) * 1e3,
        "high_ms": max(seconds) * 1e3,
        "times_baseline": statistics.median(ratios),
    }
