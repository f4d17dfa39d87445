"""TeaCache: skip steps while the timestep-modulated input of the model has changed little.

    d_t = mean|F_t - F_{t-1}| / mean|F_{t-1}|,   sum += p(d_t),   reuse while sum < threshold, else
      compute and start the sum again

F is the input of the first block's attention, p a polynomial fitted once per model. Liu et al.,
"Timestep Embedding Tells: It's Time to Cache for Video Diffusion Model", arXiv 2411.19108, eq. 4 to
7; which F belongs to which model is in coefficients.json.

A fit of order 4 says nothing outside of what it has seen, and published ones turn negative there: a
large change would take from the sum and freeze the run. So p is evaluated inside its range, is
never negative, and no more than MOST steps in a row are reused. Inside the range the decisions are
the authors' own.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from .steps import Decision, Step, Window

# The longest row that is reported of a model in coefficients.json is 4 (mlx-teacache, Qwen-Image).
MOST = 5
# thresholds of presets where no published entry brings them: the paper's slow and fast, and half of
# slow
PAPER = {"quality": 0.05, "balanced": 0.1, "fast": 0.2}


@dataclass(frozen=True)
class Polynomial:
    """p(d): coefficients with the highest power first. x_min, x_max: the range of d that was
    fitted, r2: how much of the change it explains; None where nobody tells.

    d is clamped to the range. Where its end is not known, it is taken to be the last peak before p
    falls below 0, if it does.
    """

    coefficients: tuple[float, ...]
    x_min: float | None = None
    x_max: float | None = None
    r2: float | None = None

    def __call__(self, d: float) -> float:
        if self.x_min is not None:
            d = max(d, self.x_min)
        d = min(d, _last_peak(self.coefficients) if self.x_max is None else self.x_max)
        return max(_value(self.coefficients, d), 0.0)


def _value(coefficients: Sequence[float], d: float) -> float:
    value = 0.0
    for coefficient in coefficients:
        value = value * d + coefficient
    return value


@functools.cache
def _last_peak(coefficients: tuple[float, ...]) -> float:
    """Where p is highest between 0 and the first d at which it falls from above 0 to below;
    infinite where it never does.
    """
    slope = np.polyder(np.asarray(coefficients, dtype=np.float64)).tolist()
    falls = [d for d in _positive_roots(coefficients) if np.polyval(slope, d) < 0]
    if not falls:
        return math.inf
    return max(
        (d for d in _positive_roots(slope) if d < falls[0]),
        key=functools.partial(_value, coefficients),
        default=0.0,
    )


def _positive_roots(coefficients: Sequence[float]) -> list[float]:
    """The real ones above 0, in order."""
    roots = np.roots(np.asarray(coefficients, dtype=np.float64))
    return sorted(float(root.real) for root in roots if root.real > 0 and abs(root.imag) < 1e-9)


IDENTITY = Polynomial((1.0, 0.0))  # the paper's naive rule, eq. 5


def fit(
    xs: Sequence[float], ys: Sequence[float], order: int = 2, through_origin: bool = True
) -> Polynomial:
    """Least squares of y = p(x) over all points. ValueError for fewer points than coefficients."""
    x, y = np.asarray(xs, dtype=np.float64), np.asarray(ys, dtype=np.float64)
    powers = list(range(order, 0 if through_origin else -1, -1))
    if len(x) < len(powers) + 1:
        raise ValueError(
            f"{len(x)} points are too few for a polynomial of order {order}; calibrate with more"
            " steps or prompts."
        )
    solved = np.linalg.lstsq(np.stack([x**power for power in powers], axis=1), y, rcond=None)[0]
    coefficients = tuple(float(value) for value in solved) + ((0.0,) if through_origin else ())
    residual = sum((_value(coefficients, a) - b) ** 2 for a, b in zip(x, y, strict=True))
    total = float(((y - y.mean()) ** 2).sum())
    return Polynomial(
        coefficients, float(x.min()), float(x.max()), 1 - float(residual) / total if total else None
    )


def distance(now: torch.Tensor, before: torch.Tensor) -> torch.Tensor:
    """mean|now - before| / mean|before|, a scalar tensor: reading it is the only wait for the GPU
    that a step costs.
    """
    return (now - before).abs().float().mean() / before.abs().float().mean()


@dataclass(frozen=True)
class TeaCache:
    """The rule. Streams of conditioning are judged apart: each has its own sum. most: steps reused
    in a row.
    """

    polynomial: Polynomial
    threshold: float
    window: Window = Window()
    most: int = MOST

    def decider(self) -> TeaCacheDecider:
        return TeaCacheDecider(self)


class TeaCacheDecider:
    """The rule at work on one stream: its accumulated change, and the steps reused since the last
    computed one.
    """

    def __init__(self, rule: TeaCache):
        self.rule = rule
        self.change = 0.0
        self.row = 0

    def forced(self, step: Step) -> Decision | None:
        """The decision where none is to be made: first, last and steps outside the window are
        computed and start the sum again.
        """
        why = self.rule.window.forbids(step)
        if why:
            self.computed()
            return Decision(True, why)
        return None

    def decide(self, step: Step, d: float | None) -> Decision:
        """Adds p(d) to the sum and compares. d is None where there is nothing to compare
        with yet.
        """
        forced = self.forced(step)
        if forced:
            return forced
        if d is None:
            self.computed()
            return Decision(True, "new")
        reached = self.change + self.rule.polynomial(d)
        if reached < self.rule.threshold and self.row < self.rule.most:
            self.change = reached
            self.row += 1
            return Decision(False, "reused", reached)
        self.computed()
        return Decision(True, "threshold", reached)

    def computed(self) -> None:
        """The step is computed, by this decision or for another stream of its batch."""
        self.change = 0.0
        self.row = 0
