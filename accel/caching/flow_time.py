"""The one unit in which caching measures noise: the time of the flow that a sampler's states are,
up to a factor.

Every sampler of ComfyUI moves between states of data x0 and Gaussian noise n,

    x = (1 - sigma) x0 + k sigma n        a flow: sigma from 1 to 0
    x = x0 + k sigma n                    all others: sigma to 14.6 (SDXL), 80 (Cosmos), 700 (SVD)

and each is, divided by r, a state (1 - t) x0 / S + t n of the flow between data of unit size and
noise:

    t = b / (S r),   r = a + b / S,   a = 1 - sigma or 1,   b = k sigma
    v = n - x0 / S = (x - r x0) / b,  x0 = (x - b v) / r

S is the data's standard deviation. A step of Euler (DDIM) from sigma to sigma' is the step of the
flow from t to t', whatever a and b, so that dt times the error of v is what a guess adds to the
picture, in units of S: the same in every schedule. For a flow with k = S = 1, t is sigma and v the
model's own output. Kingma et al., "Variational Diffusion Models", arXiv 2107.00630, section 5.1
(schedules of one endpoint differ by a scale of x and of time); Lipman et al., arXiv 2210.02747,
eq. 22.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TypeVar

import torch

Level = TypeVar("Level", float, torch.Tensor)


@dataclass(frozen=True)
class FlowTime:
    """How a sampler's sigma becomes time. mixes: whether data fades as noise comes (a flow); noise:
    k; data: S.
    """

    mixes: bool = True
    noise: float = 1.0
    data: float = 1.0

    def __post_init__(self) -> None:
        if not all(math.isfinite(size) and size > 0 for size in (self.noise, self.data)):
            raise ValueError(
                "The sizes of noise and data are finite and above 0, not"
                f" {self.noise:g} and {self.data:g}."
            )

    def scale(self, sigma: Level) -> Level:
        """r: what a state is divided by to be the flow's, and data by S."""
        return 1 + (self.noise / self.data - self.mixes) * sigma

    def time(self, sigma: Level) -> Level:
        """t: 0 (data) to 1 (noise), rising with sigma."""
        return self.noise / self.data * sigma / self.scale(sigma)

    def times(self, sigmas: Sequence[float]) -> tuple[float, ...]:
        """A whole schedule's."""
        return tuple(self.time(float(sigma)) for sigma in sigmas)

    def velocity(
        self, x: torch.Tensor, denoised: torch.Tensor, sigma: torch.Tensor
    ) -> torch.Tensor:
        """v at the state x, whose data the model takes for `denoised`; sigma: above 0, of a shape
        that broadcasts.
        """
        return (x - self.scale(sigma) * denoised) / (self.noise * sigma)

    def denoised(
        self, x: torch.Tensor, velocity: torch.Tensor, sigma: torch.Tensor
    ) -> torch.Tensor:
        """x0 at the state x, where the velocity is v."""
        return (x - self.noise * sigma * velocity) / self.scale(sigma)

    def to_json(self) -> dict:
        """As a calibration keeps it."""
        return asdict(self)
