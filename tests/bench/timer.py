"""Side-by-side timing: candidates take turns within one run, so that a busy or throttling machine
slows all of them alike.

Figures are medians over rounds; a ratio is the median of the rounds' own ratios, each of two
neighbours in time.
"""

from __future__ import annotations

import math
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


def side_by_side(
    candidates: dict[str, Callable[[], object]],
    device: str,
    rounds: int = 7,
    seconds: float = math.inf,
    failed: dict[str, str] | None = None,
) -> dict[str, dict[str, float]]:
    """Time every candidate once a round. The first candidate is the baseline.

    seconds   what one candidate may take in all: a slow one gets fewer rounds, and where its
      warm-up alone takes that long,
              the warm-up is its one lap (it is small beside such a call)
    failed    if given, candidates whose warm-up raises are left out, and their reasons put there;
      the baseline's error is always raised
    Returns name -> {"ms": median, "low_ms", "high_ms": extremes, "times_baseline": median ratio to
    the first candidate, "laps"}.
    """
    with torch.inference_mode():
        warm = _warm_up(candidates, device, failed)
        candidates = {name: candidates[name] for name in warm}
        wanted = {
            name: max(
                0 if took >= seconds else 1,
                min(rounds, int(seconds / took) if took * rounds > seconds else rounds),
            )
            for name, took in warm.items()
        }
        baseline = next(iter(candidates))
        wanted[baseline] = max(wanted.values())
        laps: dict[str, list[float]] = {name: [] for name in candidates}
        for turn in range(wanted[baseline]):
            for name, run in candidates.items():
                if turn < wanted[name]:
                    laps[name].append(once(run, device))
    usual = laps[baseline] or [warm[baseline]]
    return {
        name: _summary(own, usual) if own else _summary([warm[name]], [statistics.median(usual)])
        for name, own in laps.items()
    }


def _warm_up(
    candidates: dict[str, Callable[[], object]], device: str, failed: dict[str, str] | None
) -> dict[str, float]:
    """Seconds of each one's first call."""
    took: dict[str, float] = {}
    for name, run in candidates.items():
        try:
            took[name] = once(run, device)
        except Exception as error:
            if failed is None or not took:
                raise
            failed[name] = f"{type(error).__name__}: {error}".splitlines()[0]
    return took


def _summary(seconds: list[float], baseline: list[float]) -> dict[str, float]:
    # a slow candidate sat out the last rounds
    ratios = [mine / base for mine, base in zip(seconds, baseline, strict=False)]
    return {
        "ms": statistics.median(seconds) * 1e3,
        "low_ms": min(seconds) * 1e3,
        "high_ms": max(seconds) * 1e3,
        "times_baseline": statistics.median(ratios),
        "laps": len(seconds),
    }


def geometric_mean(values: list[float]) -> float | None:
    """None of an empty list: a peer that ran nowhere has no figure."""
    return math.exp(sum(map(math.log, values)) / len(values)) if values else None
