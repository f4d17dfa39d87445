"""What uncached runs teach about a model, added up while they go by."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch

from .smoothcache import Curve, Recorder
from .steps import Step
from .teacache import fit

NOTHING = 1e-12  # the mean size below which a value counts as 0
# the error of a value of another number of tokens, which no schedule allows: with ComfyUI's Flux KV
# Cache the reference pictures' tokens are there at the first step alone
OTHER_SIZE = 1e3
TOKENS = 256  # of each part's output are compared; the mean error over more of them is the same


@dataclass
class CalibrationRecorder:
    """What the run teaches. errors: kind → its errors; points: TeaCache's (change of F, change of
    the residual); velocities: those of one prompt; grams: of each prompt before.
    """

    steps: int
    farthest: int
    depths: tuple[str, ...]
    feature: str
    errors: dict[str, Recorder] = field(default_factory=dict)
    points: list[tuple[float, float]] = field(default_factory=list)
    velocities: dict[int, torch.Tensor] = field(default_factory=dict)
    grams: list[np.ndarray] = field(default_factory=list)

    def compare(
        self, kind: str, seen: list[tuple[int, torch.Tensor]], step: Step, value: torch.Tensor
    ) -> None:
        """Adds the errors of giving this step the values of earlier ones, and keeps this one; a
        sampler's second look at a step is passed over.
        """
        if seen and seen[-1][0] == step.index:
            return
        errors = self.errors.setdefault(kind, Recorder(self.steps, self.farthest))
        # a part may give nothing at all, at which every other value is too far
        norm = value.abs().float().mean().clamp(min=NOTHING)
        for before, old in seen:
            error = OTHER_SIZE
            if old.shape == value.shape:
                error = float((value - old).abs().float().mean() / norm)
            errors.add(before, step.index, error)
        seen.append((step.index, value))
        del seen[: -self.farthest]

    def next_prompt(self) -> None:
        """Turns the velocities of a finished picture into inner products, and into errors of whole
        steps.
        """
        if sorted(self.velocities) != list(range(self.steps)):
            raise ValueError(
                f"The sampler visited {len(self.velocities)} of {self.steps} steps; calibrate with"
                " a sampler that visits each, such as euler."
            )
        flat = torch.stack([self.velocities[i].flatten() for i in range(self.steps)]).double()
        gram = flat @ flat.T
        self.grams.append((gram / gram.diagonal().mean()).numpy())
        seen: list[tuple[int, torch.Tensor]] = []
        for i in range(self.steps):
            self.compare("step", seen, Step(i, self.steps, 0.0), flat[i])
        self.velocities = {}

    def polynomial(self, order: int) -> dict | None:
        """TeaCache's part of a calibration; None where there are too few points for a fit."""
        points = self.points
        if len(points) <= order + 1:
            return None
        fitted = fit([x for x, _ in points], [y for _, y in points], order)
        return {
            "feature": self.feature,
            "coefficients": list(fitted.coefficients),
            "x_min": fitted.x_min,
            "x_max": fitted.x_max,
            "r2": fitted.r2,
            "points": [[round(x, 6), round(y, 6)] for x, y in points],
        }

    def curves(self) -> dict[str, Curve]:
        """kind → the errors of reusing it."""
        return {kind: errors.curve() for kind, errors in self.errors.items()}


def sparse(value: torch.Tensor) -> torch.Tensor:
    """At most about TOKENS of a tensor's tokens (dimension 1), evenly spread."""
    return value[:, :: max(1, value.shape[1] // TOKENS)] if value.ndim > 2 else value
