"""The space in which a layer is quantized: inputs divided by smoothing factors, then optionally
shifted or rotated.

    x' = (x + shift) / smooth . R          W' = (W * smooth) . R          x' W'^T = (x + shift) W^T

with R block diagonal, an orthonormal 64-point Hadamard a group (R = R^T = R^-1). Smoothing moves
outliers between the two sides (SmoothQuant, Xiao et al., 2022, arXiv:2211.10438, eq. 4); lambda_k =
span_x[k]^alpha / span_w[k]^beta is searched as SVDQuant does.

Under a rotation the *signs* of the smoothing factors matter too: they make R one of 2^64 randomized
Hadamards a group (QuaRot, Ashkboos et al., 2024, arXiv:2404.00456, draws them at random), at no
cost when the model runs. `with_signs` searches them.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ...kernels.reference import SHIFT, hadamard64

LIMIT = 1e4  # smoothing factors lie in 1/LIMIT..LIMIT around their geometric mean


@dataclass(frozen=True)
class InputSpace:
    """A choice of smoothing (float32 (K,), nonzero, every value exact in bf16), rotation (0 | 64),
    unsigned activations, how many bits they get (4 | 8), and whether a token has one scale for
    all of them.
    """

    smooth: Tensor
    rotation: int = 0
    act_unsigned: bool = False
    label: str = ""
    act_bits: int = 4
    per_token: bool = False

    def _rotate(self, x: Tensor) -> Tensor:
        return hadamard64(x) if self.rotation else x

    def inputs(self, x: Tensor) -> Tensor:
        """Raw x (..., K) → what is quantized."""
        return self._rotate((x + SHIFT if self.act_unsigned else x) / self.smooth)

    def quantized(self, inputs: Tensor) -> Tensor:
        """Result of `inputs` (..., K) → the same after a trip through `act_bits` bits, per row and
        group of 64, or per row.
        """
        groups = inputs.unflatten(-1, (1, -1) if self.per_token else (-1, 64))
        if self.act_bits == 8:
            scale, low, high = groups.abs().amax(-1, keepdim=True) / 127, -127, 127
        elif self.act_unsigned:
            scale, low, high = groups.amax(-1, keepdim=True).clamp_min(0) / 15, 0, 15
        else:
            scale, low, high = groups.abs().amax(-1, keepdim=True) / 7, -7, 7
        codes = (groups / scale.clamp_min(torch.finfo(scale.dtype).tiny)).round_().clamp_(low, high)
        return codes.mul_(scale).flatten(-2)

    def weight(self, weight: Tensor) -> Tensor:
        """W (N, K) on raw x → W' on the space."""
        return self._rotate(weight * self.smooth)

    def raw_weight(self, weight: Tensor) -> Tensor:
        """The inverse of `weight`."""
        return self._rotate(weight) / self.smooth

    def moments(self, blocks: Tensor) -> Tensor:
        """Second moments of raw x (K/B, B, B) → those of x' (without the shift): D^-1 H D^-1,
        rotated on both sides.
        """
        d = self.smooth.reshape(blocks.shape[0], 1, -1)
        scaled = blocks / d / d.mT
        return self._rotate(self._rotate(scaled).mT.contiguous())


def smoothing_factors(span_x: Tensor, span_w: Tensor, alpha: float, beta: float) -> Tensor:
    """span_x^alpha / span_w^beta, float32 (K,): geometric mean 1, limited, rounded to bf16; dead
    channels get 1.
    """
    alive = (span_x > 0) & (span_w > 0) & span_x.isfinite() & span_w.isfinite()
    if not alive.any():
        return torch.ones_like(span_x)
    logs = alpha * span_x.clamp_min(1e-30).log() - beta * span_w.clamp_min(1e-30).log()
    logs = torch.where(alive, logs - logs[alive].mean(), 0.0)
    bound = torch.tensor(LIMIT).log().item()
    return logs.clamp(-bound, bound).exp().bfloat16().float()


def exponents(grid: int) -> Iterator[tuple[float, float]]:
    """SVDQuant's candidates: (0, 0), then (i/n, 0) and (i/n, 1 - i/n)."""
    yield 0.0, 0.0
    for i in range(1, grid):
        yield i / grid, 0.0
    for i in range(1, grid):
        yield i / grid, 1 - i / grid


def with_signs(
    space: InputSpace, x: Tensor, generator: torch.Generator, draws: int = 16, sweeps: int = 3
) -> InputSpace:
    """A rotated space with the signs, group by group, under which rows x (T, K) have the smallest
    mean squared absmax.

    The best of some random draws, then single signs are turned for as long as that helps. Unrotated
    spaces are returned as they are.
    """
    if not space.rotation:
        return space
    groups = (x / space.smooth).unflatten(1, (-1, 64))
    identity = torch.eye(64, device=x.device)
    hadamard = hadamard64(identity)

    def cost(turned: Tensor) -> Tensor:
        return turned.abs().amax(-1).square().mean(0)

    signs = torch.ones(groups.shape[1:], device=x.device)
    best = cost(groups @ hadamard)
    for _ in range(draws):
        drawn = (torch.randint(2, signs.shape, generator=generator) * 2 - 1).to(signs)
        found = cost((groups * drawn) @ hadamard)
        signs = torch.where((found < best)[:, None], drawn, signs)
        best = torch.minimum(found, best)
    turned = (groups * signs) @ hadamard
    for j in list(range(64)) * sweeps:
        # sign j turned over
        other = turned - 2 * (groups[..., j] * signs[:, j])[..., None] * hadamard[j]
        found = cost(other)
        better = found < best
        turned = torch.where(better[:, None], other, turned)
        signs[:, j] = torch.where(better, -signs[:, j], signs[:, j])
        best = torch.minimum(found, best)
    return replace(space, smooth=space.smooth * signs.flatten())


def smoothings(x: Tensor, weight: Tensor, grid: int) -> Iterator[tuple[str, Tensor]]:
    """(label, factors) of every candidate; x (T, K), weight (N, K). Spans are taken as absmax and
    as root mean square.
    """
    none = torch.ones_like(x[0])
    yield "none", none
    for span in ("rms", "absmax"):
        span_x, span_w = [
            t.square().mean(0).sqrt() if span == "rms" else t.abs().amax(0) for t in (x, weight)
        ]
        for alpha, beta in exponents(grid):
            if alpha:
                factors = smoothing_factors(span_x, span_w, alpha, beta)
                # as where nothing was recorded, and inputs span alike: the same once more
                if not torch.equal(factors, none):
                    yield f"{span} a={alpha:g} b={beta:g}", factors
