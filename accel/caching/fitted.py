"""Guesses whose weights are fitted on a calibration, where one was measured on the run's schedule.

A guess is then no polynomial: of the velocities that an uncached run had, G_ij = <v_i, v_j>, it is
known which sum of the last computed ones leaves the state least wrong,

    e_{i+1} = e_i + (t_{i+1} - t_i) (sum_j w_ij v_j - v_i)
    w_i = argmin mean over prompts of |e_{i+1}|² / (t_{i+1} - t_i)² + ridge |w - w_line|²

with e_i what the guesses before step i have left behind, to first order: a guess also takes back
what earlier ones did wrong. TACache's offline statistics (arXiv 2605.16789) are two numbers a step,
without e. w_line are the weights of the line, which a guess has in every other run, and by which
the steps to compute are searched: a search that trusts these weights finds masks that are worse.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from .extrapolate import Reuse, weights

NODES = 3  # computed values that a guess is made of
RIDGE = 1e-5
_DIGITS = 6  # of times: a sampler may hand them on in float32


@dataclass(frozen=True)
class FittedReuse(Reuse):
    """Fitted weights for the steps that one mask skips: table[time] = (times of the computed
    values, oldest first, a weight for each). What is not in the table is guessed as `order` and
    `damping` say.
    """

    table: Mapping[float, tuple[tuple[float, ...], list[float]]] = field(
        default_factory=dict, compare=False
    )

    @property
    def kept(self) -> int:
        return max(NODES, super().kept)

    def weights(self, nodes: Sequence[float], at: float) -> list[float]:
        """Of the newest nodes, oldest first, for a guess at `at`."""
        used, fitted = self.table.get(_rounded(at), ((), []))
        newest = tuple(map(_rounded, list(nodes)[-NODES:]))
        return fitted if fitted and newest == used else super().weights(nodes, at)


def fit(
    mask: Sequence[bool], times: Sequence[float], grams: np.ndarray, asked: Reuse
) -> FittedReuse:
    """The guesses of a run that computes the steps of `mask`, and its first. times: steps + 1
    values; grams: float64 (prompts, steps, steps); asked: how to guess what is not foreseen.
    """
    gram, left = grams.mean(0), np.zeros(len(mask))
    computed: list[int] = []
    table = {}
    for i, wanted in enumerate(mask):
        if wanted or not computed:
            computed.append(i)
            continue
        nodes, length = computed[-NODES:], times[i + 1] - times[i]
        target = np.eye(len(mask))[i] - (left / length if length else 0)
        line = weights([times[j] for j in nodes], times[i], Reuse(1))
        fitted = _solved(gram[np.ix_(nodes, nodes)], gram[nodes] @ target, line)
        left[nodes] += length * fitted
        left[i] -= length
        used = tuple(_rounded(times[j]) for j in nodes)
        table[_rounded(times[i])] = (used, fitted.tolist())
    return FittedReuse(asked.order, asked.damping, table=table)


def _solved(square: np.ndarray, wanted: np.ndarray, line: Sequence[float]) -> np.ndarray:
    """The weights of the formula, by its normal equations: square (nodes, nodes), wanted (nodes)
    the nodes' inner products with what the guess should be.
    """
    ridge = max(RIDGE * np.trace(square) / len(square), np.finfo(float).tiny)
    towards = np.zeros(len(square))
    towards[-len(line) :] = line
    return np.linalg.solve(square + ridge * np.eye(len(square)), wanted + ridge * towards)


def _rounded(time: float) -> float:
    return round(time, _DIGITS)
