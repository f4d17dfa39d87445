"""Which steps to compute when so many may be computed: even spacing, and a search that needs no
model.

In a run that integrates dx = v dt (`flow_time.py`), a skipped step i uses the guess sum_j w_ij v_j,
so the end is off, to first order, by

    e = sum over skipped i of (t_{i+1} - t_i) (sum_j w_ij v_j - v_i) = sum_i c_i v_i,       |e|² =
      cᵀ G c,   G_ij = <v_i, v_j>

G is measured once on calibration prompts (steps x steps numbers a prompt); then any mask with any
guess is judged in microseconds, and a search over masks of a fixed budget (the idea of BudCache,
arXiv 2606.13496, which anneals with the model in the loop) takes seconds.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from .extrapolate import Reuse, weights
from .steps import Decision, Step, Window

RESTARTS = 4


@dataclass(frozen=True)
class StepMask:
    """The rule that computes the steps of a mask (True: computed), known before the run: nothing is
    measured and nothing waited for.
    """

    mask: tuple[bool, ...]
    window: Window = Window()

    def decider(self) -> MaskDecider:
        return MaskDecider(self)

    def steps(self, times: Sequence[float]) -> list[bool]:
        """Which steps of a run it computes, as far as is known before; times: steps + 1 values."""
        total = len(times) - 1
        run = [Step(i, total, math.nan, times[i]) for i in range(total)]
        return [
            wanted or self.window.forbids(step) is not None
            for step, wanted in zip(run, self.mask, strict=True)
        ]


class MaskDecider:
    """The rule at work; every stream decides alike, but one that has nothing to reuse yet
    computes.
    """

    def __init__(self, rule: StepMask):
        self.rule = rule

    def decide(self, step: Step, nodes: Sequence[float]) -> Decision:
        why = self.rule.window.forbids(step) or (None if len(nodes) else "new")
        if why:
            return Decision(True, why)
        wanted = self.rule.mask[min(step.index, len(self.rule.mask) - 1)]
        return Decision(wanted, "schedule" if wanted else "reused")

    def computed(self) -> None:
        """Nothing to start again."""


def uniform(total: int, computed: int) -> list[bool]:
    """`computed` of `total` steps, evenly spread, the first and the last among them. ValueError
    unless 2 <= computed <= total.
    """
    if not 2 <= computed <= total:
        raise ValueError(f"2 to {total} of {total} steps can be computed, not {computed}.")
    places = {round(i * (total - 1) / (computed - 1)) for i in range(computed)}
    return [i in places for i in range(total)]


def contributions(mask: Sequence[bool], times: Sequence[float], reuse: Reuse) -> np.ndarray:
    """c of the formula above: how much of each step's velocity ends up in the error. float64
    (steps,). mask[0] is taken as computed.
    """
    out = np.zeros(len(mask))
    computed: list[int] = []
    for i, wanted in enumerate(mask):
        if wanted or not computed:
            computed.append(i)
            continue
        length = times[i + 1] - times[i]
        guess = weights([times[j] for j in computed], times[i], reuse)
        for j, weight in zip(computed[-len(guess) :], guess, strict=True):
            out[j] += length * weight
        out[i] -= length
    return out


def error(mask: Sequence[bool], times: Sequence[float], grams: np.ndarray, reuse: Reuse) -> float:
    """The predicted error at the end of the run: root mean over prompts of |e|^4, to the fourth
    root, so that the worst prompts weigh most.

    grams: float64 (prompts, steps, steps).
    """
    c = contributions(mask, times, reuse)
    squares = np.maximum(np.einsum("i,pij,j->p", c, grams, c), 0.0)
    return float(np.mean(squares**2) ** 0.25)


def search(
    computed: int,
    times: Sequence[float],
    grams: np.ndarray,
    reuse: Reuse,
    restarts: int = RESTARTS,
    seed: int = 0,
) -> list[bool]:
    """The best mask found by swapping computed and skipped steps until nothing helps, from even
    spacing and from random starts.

    First and last step stay computed. grams as in `error`; times: steps + 1 values.
    """
    total, rng = len(times) - 1, np.random.default_rng(seed)
    best, least = uniform(total, computed), np.inf
    for start in range(restarts):
        mask = uniform(total, computed)
        if start:
            inner = set(rng.choice(np.arange(1, total - 1), computed - 2, replace=False).tolist())
            mask = [i in inner or i in (0, total - 1) for i in range(total)]
        mask, reached = _descend(mask, times, grams, reuse)
        if reached < least:
            best, least = mask, reached
    return best


def _descend(
    mask: list[bool], times: Sequence[float], grams: np.ndarray, reuse: Reuse
) -> tuple[list[bool], float]:
    least = error(mask, times, grams, reuse)
    while True:
        inner = range(1, len(mask) - 1)
        swaps = [(i, j) for i in inner if mask[i] for j in inner if not mask[j]]
        candidates = [(error(_swapped(mask, i, j), times, grams, reuse), i, j) for i, j in swaps]
        if not candidates or min(candidates)[0] >= least * 0.999:
            return mask, least
        least, i, j = min(candidates)
        mask = _swapped(mask, i, j)


def _swapped(mask: list[bool], i: int, j: int) -> list[bool]:
    out = list(mask)
    out[i], out[j] = out[j], out[i]
    return out


def transferred(
    mask: Sequence[bool], known: Sequence[float], wanted: Sequence[float]
) -> list[bool]:
    """A mask for another schedule: as many of its steps computed as the share asks for,
    at the same places of the computed density.

    The computed steps' share of the run is a function of the step's share; the new steps are placed
    by its inverse. known and wanted: steps + 1.
    """
    if len(known) == len(wanted) and np.allclose(known, wanted, rtol=1e-3):
        return list(mask)
    places = [i / (len(mask) - 1) for i, value in enumerate(mask) if value]
    total = len(wanted) - 1
    count = max(2, round(len(places) / len(mask) * total))
    along = np.interp(np.linspace(0, len(places) - 1, count), np.arange(len(places)), places)
    chosen = {round(float(place) * (total - 1)) for place in along} | {0, total - 1}
    return [i in chosen for i in range(total)]
