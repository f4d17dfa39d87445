"""What a skipped step is given instead: a guess from the last computed ones, by polynomials through
them in time (`flow_time.py`).

    y(t) = sum_i w_i(t) y(t_i),   w_i(t) = damping * prod_{j != i} (t - t_j) / (t_i - t_j) + (1 -
      damping) * [i is the newest]

Order 0 holds the newest value (TeaCache, FORA, SmoothCache as published); orders 1 and 2 are the
Taylor expansions of TaylorSeer (Liu et al., arXiv 2503.06923, eq. 4) with finite differences over
unequal steps, which on the velocity of a flow is the variable-step Adams-Bashforth predictor.
Guessing costs one weighted sum of tensors as large as the guess.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

HIGHEST = 3


@dataclass(frozen=True)
class Reuse:
    """How a guess is made: order of the polynomial (fewer computed steps give a lower one), and how
    much of it is believed.
    """

    order: int = 1
    damping: float = 1.0

    def __post_init__(self):
        if not 0 <= self.order <= HIGHEST:
            raise ValueError(f"The order of extrapolation is 0 to {HIGHEST}, not {self.order}.")
        if not 0 <= self.damping <= 1:
            raise ValueError(
                "The damping of extrapolation is 0 (hold the last value) to 1 (full"
                f" extrapolation), not {self.damping:g}."
            )

    @property
    def kept(self) -> int:
        """How many computed values a guess may need."""
        return self.order + 1

    def weights(self, nodes: Sequence[float], at: float) -> list[float]:
        """See `weights`."""
        return weights(nodes, at, self)


def weights(nodes: Sequence[float], at: float, reuse: Reuse) -> list[float]:
    """A weight for each of the newest `order + 1` nodes (oldest first, all different): what to sum
    up for a guess at `at`.
    """
    used = list(nodes)[-(reuse.order + 1) :]
    out = []
    for i, node in enumerate(used):
        weight = 1.0
        for j, other in enumerate(used):
            if j != i:
                weight *= (at - other) / (node - other)
        out.append(weight * reuse.damping)
    out[-1] += 1 - reuse.damping
    return out


def node_product(nodes: Sequence[float], at: float, reuse: Reuse) -> float:
    """|prod (at - t_i)| over the nodes that a guess uses: its error is this times a derivative
    (Lagrange's remainder).
    """
    product = 1.0
    for node in list(nodes)[-(reuse.order + 1) :]:
        product *= abs(at - node)
    return product


class History:
    """The last computed values of one stream of conditioning, with their times; tensors of one
    shape, kept on `device` (None: where they are).
    """

    def __init__(self, reuse: Reuse, device: torch.device | str | None = None):
        self.reuse, self.device = reuse, device
        self.nodes: list[float] = []
        self.values: list[torch.Tensor] = []

    def __len__(self) -> int:
        return len(self.nodes)

    def store(self, time: float, value: torch.Tensor) -> None:
        """Remembers a computed value; one of another shape, or at a time already known, takes the
        place of what it contradicts.
        """
        if self.values and self.values[-1].shape != value.shape:
            self.clear()
        if time in self.nodes:
            where = self.nodes.index(time)
            del self.nodes[where], self.values[where]
        self.nodes.append(time)
        self.values.append(
            value if self.device is None else value.to(self.device, non_blocking=False)
        )
        del self.nodes[: -self.reuse.kept], self.values[: -self.reuse.kept]

    def guess(self, time: float, like: torch.Tensor | None = None) -> torch.Tensor:
        """The value at `time`, summed in float32, returned in the values' dtype on the device of
        `like`.
        """
        device = self.values[-1].device if like is None else like.device
        dtype = self.values[-1].dtype
        factors = self.reuse.weights(self.nodes, time)
        if len(factors) == 1:
            return self.values[-1].to(device)
        total = self.values[-1].to(device).float() * factors[-1]
        for weight, value in zip(factors[:-1], self.values[-len(factors) : -1], strict=True):
            total.add_(value.to(device).float(), alpha=weight)
        return total.to(dtype)

    def fits(self, value: torch.Tensor) -> bool:
        """Whether there is something to guess from, of this value's shape."""
        return bool(self.values) and self.values[-1].shape == value.shape

    def clear(self) -> None:
        self.nodes.clear()
        self.values.clear()
