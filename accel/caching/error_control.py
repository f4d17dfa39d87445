"""Error control: skip steps while the guess for them would be good, judged by how good the last
guesses were.

Whenever a step is computed, the guess that would have been made for it is compared with it.
Lagrange's remainder says how that error grows with the distance to the steps it was made from, so
the error of the next guesses can be predicted without looking at anything:

    rate = e_t / |prod_j (t - t_j)|,   e_i = rate * |prod_j (t_i - t_j)| * |t_i - t_{i+1}| / mean
      step,   reuse while sum e_i < threshold

e_t is the relative L1 error of a velocity, weighted with the step that it is integrated over; both
in the time of `flow_time.py`, so that a threshold allows the same error of the picture, relative to
the size of data, whatever unit a sampler counts noise in. A schedule that shortens its steps
expects the path to bend more there, so the error grows at least as it would in distances counted in
steps; where steps are equal, or grow, that is the same. No calibration, no
feature of the model, and no wait for the GPU on skipped steps. The idea is that of step-size
control in ODE solvers (Hairer, Nørsett and Wanner, Solving ODEs I, II.4), applied to which of a
fixed set of steps are computed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from .extrapolate import Reuse, node_product
from .steps import Decision, Step, Window

# Thresholds; what they cost and give: tests/bench/results/cache-*.json. Rounding makes a low-bit
# model's velocity rough from step to step, and a threshold below that roughness skips nothing.
PRESETS = {"quality": 0.01, "balanced": 0.03, "fast": 0.1}
LOW_BIT_PRESETS = {"quality": 0.02, "balanced": 0.05, "fast": 0.1}
MOST = 5  # steps guessed in a row: further away than that, one measured rate says little


@dataclass(frozen=True)
class ErrorControl:
    """The rule. times: the run's schedule with its end (steps + 1 values), any direction."""

    threshold: float
    times: tuple[float, ...]
    reuse: Reuse
    window: Window = Window()
    most: int = MOST

    def decider(self) -> ErrorDecider:
        return ErrorDecider(self)

    def distances(self, nodes: Sequence[float], time: float) -> tuple[float, float]:
        """The products of the formula above: in time, and in steps."""
        places = np.interp([*nodes, time], *self._places()).tolist()
        return (
            node_product(nodes, time, self.reuse),
            node_product(places[:-1], places[-1], self.reuse),
        )

    def _places(self) -> tuple[list[float], list[float]]:
        """Rising times, and the steps that are at them."""
        pairs = sorted((time, float(step)) for step, time in enumerate(self.times))
        return [time for time, _ in pairs], [step for _, step in pairs]

    def weight(self, step: Step) -> float:
        """The step's length over the mean one."""
        mean = abs(self.times[0] - self.times[-1]) / max(len(self.times) - 1, 1)
        return abs(self.times[step.index] - self.times[step.index + 1]) / mean if mean else 1.0


class ErrorDecider:
    """The rule at work on one stream: the last measured rates, and the error summed up since the
    last computed step.
    """

    def __init__(self, rule: ErrorControl):
        self.rule, self.change, self.row = rule, 0.0, 0
        self.rates: tuple[float, ...] | None = None  # of both distances

    def decide(self, step: Step, nodes: Sequence[float]) -> Decision:
        """nodes: the times of the computed steps that a guess would be made from, oldest first."""
        forbidden = self.rule.window.forbids(step)
        if forbidden is not None:
            self.computed()
            return Decision(True, forbidden)
        if self.rates is None or not self.can_guess(nodes):
            self.computed()
            return Decision(True, "new")
        distances = self.rule.distances(nodes, step.time)
        error = max(rate * far for rate, far in zip(self.rates, distances, strict=True))
        reached = self.change + error * self.rule.weight(step)
        if reached < self.rule.threshold and self.row < self.rule.most:
            self.change, self.row = reached, self.row + 1
            return Decision(False, "reused", reached)
        self.computed()
        return Decision(True, "threshold", reached)

    def can_guess(self, nodes: Sequence[float]) -> bool:
        """Whether there are as many computed steps as a guess of the rule's order is made from."""
        return len(nodes) > self.rule.reuse.order

    def computed(self) -> None:
        self.change, self.row = 0.0, 0

    def measured(self, step: Step, nodes: Sequence[float], error: float) -> None:
        """A computed step differed from its guess, made from `nodes`, by the relative error
        `error`.
        """
        distances = self.rule.distances(nodes, step.time)
        if all(distances) and self.can_guess(nodes):
            self.rates = tuple(error / far for far in distances)
