"""SmoothCache: a static schedule from errors measured once, for each kind of layer.

    E_type(t, k) = mean over layers and samples of |L_t - L_{t+k}|_1 / |L_t|_1,   reuse step t+k's
      output at t where E_type(t, k) < alpha

Liu et al., "SmoothCache: A Universal Inference Acceleration Technique for Diffusion Transformers",
arXiv 2411.10510, eq. 4. In this room steps count upwards: rows[k - 1][i] is the error of giving
step i + k the output of step i. The curves are kept, so that another alpha, another number of steps
or another schedule of noise needs no new run. With extrapolation (`extrapolate.py`) the curves are
those of the guess.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

FARTHEST = 3  # steps that a value is kept at most, the paper's choice for pictures


def greedy_mask(rows: Sequence[Sequence[float]], alpha: float) -> list[bool]:
    """The published greedy rule: from each computed step jump over as many steps as an error of at
    most alpha allows, the farthest first.

    rows[k - 1] has an entry for each step i with i + k < steps. Returns steps booleans, computed or
    not; first and last are always computed.
    """
    steps = len(rows[0]) + 1
    computed = [True] * steps
    i = 0
    while i < steps:
        jump = next(
            (
                k
                for k in range(len(rows), 0, -1)
                if i < len(rows[k - 1]) and rows[k - 1][i] <= alpha
            ),
            0,
        )
        computed[i + 1 : i + jump + 1] = [False] * len(computed[i + 1 : i + jump + 1])
        i += jump + 1
    computed[0] = computed[-1] = True
    return computed


@dataclass
class Curve:
    """Mean errors of one kind of layer, and the half-width of their 95 % interval: [k - 1][i], as
    in `greedy_mask`.
    """

    mean: list[list[float]]
    half: list[list[float]]
    samples: int

    def at(self, known: Sequence[float], wanted: Sequence[float]) -> Curve:
        """The curve for another list of times (`flow_time.py`, one a step). The error of k steps of
        another length is read off between the measured ones.

        Each measured entry is an error over a stretch of time that starts at a step. For each
        wanted step the errors of its start are interpolated over time, and the stretch over the
        lengths measured there; longer than measured counts as too far (infinite).
        """
        known, wanted = [float(s) for s in known], [float(s) for s in wanted]
        if np.allclose(known, wanted, rtol=1e-3) if len(known) == len(wanted) else False:
            return self
        return Curve(
            _resample(self.mean, known, wanted), _resample(self.half, known, wanted), self.samples
        )


def _resample(
    rows: list[list[float]], known: list[float], wanted: list[float]
) -> list[list[float]]:
    order = np.argsort(known)
    ordered = np.asarray(known)[order]

    def error(start: float, length: float) -> float:
        lengths, errors = [0.0], [0.0]
        for k, row in enumerate(rows, 1):
            full = np.full(len(known), np.nan)
            full[: len(row)] = row
            reach = np.asarray(
                [
                    abs(known[i + k] - known[i]) if i + k < len(known) else np.nan
                    for i in range(len(known))
                ]
            )
            valid = ~np.isnan(full[order]) & ~np.isnan(reach[order])
            if valid.any():
                lengths.append(float(np.interp(start, ordered[valid], reach[order][valid])))
                errors.append(float(np.interp(start, ordered[valid], full[order][valid])))
        if length > lengths[-1] * 1.001:
            return float("inf")
        return float(np.interp(length, lengths, errors))

    return [
        [error(wanted[i], abs(wanted[i + k] - wanted[i])) for i in range(len(wanted) - k)]
        for k in range(1, len(rows) + 1)
    ]


@dataclass
class Recorder:
    """Adds up the errors of one kind of layer while uncached runs go by; `add` once for each layer,
    sample and pair of steps.
    """

    steps: int
    farthest: int = FARTHEST
    # (k, start step) → errors
    sums: dict[tuple[int, int], list[float]] = field(default_factory=dict)

    def add(self, start: int, end: int, error: float) -> None:
        """Giving step `end` the output of step `start` would have been wrong by `error`."""
        if 0 < end - start <= self.farthest:
            self.sums.setdefault((end - start, start), []).append(error)

    def curve(self) -> Curve:
        """ValueError where a pair of steps was never seen."""
        mean, half = [], []
        for k in range(1, self.farthest + 1):
            entries = [self.sums.get((k, i), []) for i in range(self.steps - k)]
            if not all(entries):
                raise ValueError(
                    "The calibration run did not visit every step: nothing is known of step"
                    f" {entries.index([]) + 1}."
                )
            mean.append([float(np.mean(values)) for values in entries])
            half.append(
                [
                    (
                        float(1.96 * np.std(values, ddof=1) / len(values) ** 0.5)
                        if len(values) > 1
                        else 0.0
                    )
                    for values in entries
                ]
            )
        return Curve(mean, half, max(len(values) for values in self.sums.values()))
