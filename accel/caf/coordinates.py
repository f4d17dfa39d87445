"""Where a model's latent lies on the straight line from noise to data that CAF walks along.

A rectified flow's is there already: x = (1 - sigma) data + sigma noise, so its level is sigma and
dx/ds = data - noise = (denoised - x) / sigma, for s = 1 - sigma.

What ComfyUI shows of models that predict noise or v (SDXL, PixArt, CogVideoX, …) is x = data +
sigma noise, sigma from some large number to 0. Their probability-flow ODE (Song et al. 2021,
arXiv:2011.13456, eq. 13) is the same one in other coordinates (Karras et al. 2022,
arXiv:2206.00364, section 2): with

    tau = sigma / (1 + sigma),   z = x / (1 + sigma) = (1 - tau) data + tau noise
    dz/dtau = noise - data = (x - denoised) / sigma - denoised

it is a rectified flow's, from tau = T of the largest sigma to 0. The way from there to the data is
s = 1 - tau / T, so level = tau / T runs from 1 to 0 as a flow's sigma does, and dz/ds = T (data -
noise).
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from .flow import at


@dataclass(frozen=True)
class Coordinates:
    """Those of a model whose sigmas begin at `largest`, as x = data + sigma noise; None: a
    rectified flow. x, z (batch, …); sigma, level (batch,) or of any shape where no x is.
    """

    largest: float | None = None

    @property
    def _span(self) -> float:
        """T: tau at the largest sigma."""
        assert self.largest is not None
        return self.largest / (1 + self.largest)

    def level(self, sigma: Tensor) -> Tensor:
        """1 at the largest sigma, 0 at the data."""
        return sigma if self.largest is None else sigma / (1 + sigma) / self._span

    def sigma(self, level: Tensor) -> Tensor:
        """The inverse of `level`."""
        if self.largest is None:
            return level
        tau = level * self._span
        return tau / (1 - tau)

    def straight(self, x: Tensor, sigma: Tensor) -> Tensor:
        """The model's x at sigma → z on the straight line."""
        return x if self.largest is None else x / (1 + at(sigma, x))

    def own(self, z: Tensor, sigma: Tensor) -> Tensor:
        """The inverse of `straight`."""
        return z if self.largest is None else z * (1 + at(sigma, z))

    def velocity(self, x: Tensor, denoised: Tensor, sigma: Tensor) -> Tensor:
        """dz/ds towards the data, of what the model makes of its x at sigma > 0."""
        towards = (denoised - x) / at(sigma, x)
        return towards if self.largest is None else self._span * (towards + denoised)
