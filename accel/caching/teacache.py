"""TeaCache: skip steps while the timestep-modulated input of the model has changed little.

    d_t = mean|F_t - F_{t-1}| / mean|F_{t-1}|,   sum += p(d_t),   reuse while sum < threshold, else
      compute and start the sum again

F is the input of the first block's attention, p a polynomial fitted once per model. Liu et al.,
"Timestep Embedding Tells: It's Time to Cache for Video Diffusion Model", arXiv 2411.19108, eq. 4 to
7; which F belongs to which model is in coefficients.json.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from .steps import Decision, Step, Window


@dataclass(frozen=True)
class Polynomial:
    """p(d): coefficients with the highest power first. One fitted by us knows its range and its R²;
    a published one is taken as it is.

    Inside a known range the polynomial is evaluated at d clamped to it, and never gives less than
    0: a bad fit outside what was measured must not decide a picture.
    """

    coefficients: tuple[float, ...]
    x_min: float | None = None
    x_max: float | None = None
    r2: float | None = None

    def __call__(self, d: float) -> float:
        if self.x_min is not None and self.x_max is not None:
            d = min(max(d, self.x_min), self.x_max)
        value = 0.0
        for coefficient in self.coefficients:
            value = value * d + coefficient
        return value if self.x_min is None else max(value, 0.0)


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
    bare = Polynomial(coefficients)
    residual = sum((bare(a) - b) ** 2 for a, b in zip(x, y, strict=True))
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
    """The rule. Streams of conditioning are judged apart: each has its own sum."""

    polynomial: Polynomial
    threshold: float
    window: Window = Window()

    def decider(self) -> TeaCacheDecider:
        return TeaCacheDecider(self)


class TeaCacheDecider:
    """The rule at work on one stream: its accumulated change."""

    def __init__(self, rule: TeaCache):
        self.rule, self.change = rule, 0.0

    def forced(self, step: Step) -> Decision | None:
        """The decision where none is to be made: first, last and steps outside the window are
        computed and start the sum again.
        """
        why = self.rule.window.forbids(step)
        if why:
            self.change = 0.0
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
            self.change = 0.0
            return Decision(True, "new")
        self.change += self.rule.polynomial(d)
        reached = self.change
        if reached < self.rule.threshold:
            return Decision(False, "reused", reached)
        self.change = 0.0
        return Decision(True, "threshold", reached)

    def computed(self) -> None:
        """Another stream of the same batch had to be computed, and this one with it."""
        self.change = 0.0
