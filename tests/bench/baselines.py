"""Other ways to run a linear at 4 bits, as fake quantization in float32: what SVDQuant here is
compared with.

Each takes weight (N, K) and bias (N,) | None and returns a function of x (..., K).
    rtn       round to nearest: absmax / 7 per row and group of 64, weights and activations
    convrot   comfy-kitchen's convrot_w4a4: inputs and weights turned by a regular Hadamard of 256
      (or 64, 16: the largest that divides K),
              then absmax / 7 per row of weights and per token
    orbitquant  OrbitQuant's weights (arXiv:2607.02461): each row turned by random signs and a
      Hadamard matrix, over its norm, to the levels of Lloyd and Max for a normal distribution;
      no data, inputs as they are
    svdquant  the paper's SVDQuant (and with GPTQ, as deepcompressor runs it); needs the layer's
      recorded inputs
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from nibble.kernels.reference import SHIFT
from nibble.quant.calibration.statistics import InputStats
from nibble.quant.svdquant.gptq import gptq
from nibble.quant.svdquant.smooth import InputSpace, exponents, smoothing_factors
from nibble.quant.weights.lowrank import svd_lowrank
from nibble.quant.weights.packing import dequantize_groups, group_absmax, quantize_groups

Linear = Callable[[Tensor], Tensor]


class Lambda(torch.nn.Module):
    """A function in a linear's place."""

    def __init__(self, function):
        super().__init__()
        self.forward = function


def symmetric(x: Tensor, group: int) -> Tensor:
    """x (..., K) through int4 and back, absmax / 7 over each group along the last axis."""
    groups = x.unflatten(-1, (-1, group))
    scale = groups.abs().amax(-1, keepdim=True).clamp_min(1e-30) / 7
    return ((groups / scale).round() * scale).flatten(-2)


def rtn(weight: Tensor, bias: Tensor | None) -> Linear:
    """Round to nearest, group 64 on both sides."""
    rounded = symmetric(weight.float(), 64)
    return lambda x: torch.nn.functional.linear(symmetric(x.float(), 64), rounded, bias).to(x.dtype)


def regular_hadamard(size: int) -> Tensor:
    """The orthonormal Kronecker power of the regular 4-point Hadamard matrix that convrot uses,
    (size, size) symmetric.
    """
    four = torch.tensor([[1.0, 1, 1, -1], [1, 1, -1, 1], [1, -1, 1, 1], [-1, 1, 1, 1]])
    matrix = torch.ones(1, 1)
    while matrix.shape[0] < size:
        matrix = torch.kron(matrix, four)
    return matrix / math.sqrt(size)


def convrot(weight: Tensor, bias: Tensor | None) -> Linear:
    """comfy-kitchen's convrot_w4a4."""
    k = weight.shape[1]
    size = next(s for s in (256, 64, 16) if k % s == 0)
    turn = regular_hadamard(size).to(weight.device)

    def rotate(x: Tensor) -> Tensor:
        return (x.unflatten(-1, (-1, size)) @ turn).flatten(-2)

    rounded = symmetric(rotate(weight.float()), k)
    return lambda x: torch.nn.functional.linear(symmetric(rotate(x.float()), k), rounded, bias).to(
        x.dtype
    )


BASELINES: dict[str, Callable[[Tensor, Tensor | None], Linear]] = {"rtn": rtn, "convrot": convrot}


# ---- OrbitQuant ----------------------------------------------------------------------------------


def lloyd_max(bits: int) -> Tensor:
    """The 2^bits levels with the least squared error for N(0, 1), float32 in order (Max, 1960;
    Lloyd, 1982): each the mean of what lies nearest to it.
    """
    normal = torch.distributions.Normal(*torch.tensor([0.0, 1.0], dtype=torch.float64))
    levels = normal.icdf((torch.arange(2**bits, dtype=torch.float64) + 0.5) / 2**bits)
    ends = torch.tensor([-math.inf, math.inf], dtype=torch.float64)
    for _ in range(1000):
        edges = torch.cat([ends[:1], (levels[1:] + levels[:-1]) / 2, ends[1:]])
        density = torch.exp(-edges.square() / 2) / math.sqrt(2 * math.pi)
        levels = -density.diff() / normal.cdf(edges).diff()
    return levels.float()


def orbitquant(weight: Tensor, bits: int) -> Tensor:
    """The matrix that OrbitQuant's weights of so many bits stand for, turned back: (N, K) float32.

    A row's norm is in 16 bits. The Hadamard matrix is of the largest power of two that divides K.
    """
    n, k = weight.shape
    size = k & -k
    turn = torch.ones(1, 1)
    while len(turn) < size:
        turn = torch.kron(turn, torch.tensor([[1.0, 1.0], [1.0, -1.0]])) / math.sqrt(2)
    signs = torch.randint(0, 2, (k,), generator=torch.Generator().manual_seed(0)) * 2.0 - 1
    turned = ((weight.float() * signs).unflatten(1, (-1, size)) @ turn).flatten(1)
    scale = (turned.norm(dim=1, keepdim=True) / math.sqrt(k)).half().float()
    levels = lloyd_max(bits)
    nearest = torch.bucketize(turned / scale.clamp_min(1e-30), (levels[1:] + levels[:-1]) / 2)
    return ((levels[nearest] * scale).unflatten(1, (-1, size)) @ turn).flatten(1) * signs


# ---- the paper's SVDQuant ------------------------------------------------------------------------


def svdquant(
    weight: Tensor,
    bias: Tensor | None,
    stats: InputStats,
    *,
    post_gelu: bool,
    rank: int = 32,
    with_gptq: bool = False,
    grid: int = 20,
    turns: int = 20,
) -> Linear:
    """Smoothing (39 candidates, absmax spans) scored with the branch, plain SVD, alternation with
    early stop; optionally GPTQ.
    """
    weight, x = weight.float(), stats.samples.float()[0::2]
    unsigned = post_gelu and bias is not None
    shifted = x + SHIFT if unsigned else x
    spans = shifted.abs().amax(0), weight.abs().amax(0)
    spaces = [
        InputSpace(smoothing_factors(*spans, a, b), act_unsigned=unsigned)
        for a, b in exponents(grid)
    ]

    def fitted(
        space: InputSpace, turns: int, hessian: Tensor | None = None
    ) -> tuple[float, Tensor, Tensor]:
        target, inputs = space.weight(weight), space.inputs(x)
        wanted, quantized = inputs @ target.T, space.quantized(inputs)
        rounded, best = torch.zeros_like(target), (math.inf, None, None)
        for _ in range(turns):
            up, down = svd_lowrank(target - rounded, rank, torch.Generator().manual_seed(0))
            branch = (up @ down.T).bfloat16().float()
            rounded = _rounded(target - branch, hessian)
            error = (wanted - inputs @ branch.T - quantized @ rounded.T).square().sum().item()
            if error >= best[0]:
                break
            best = error, branch, rounded
        return best

    space = min(spaces, key=lambda space: fitted(space, 1)[0])
    hessian = _damped(space, stats) if with_gptq else None
    _, branch, rounded = fitted(space, turns, hessian)
    shift = (SHIFT / space.smooth) @ rounded.T if unsigned else 0

    def forward(x: Tensor) -> Tensor:
        inputs = x / space.smooth
        y = space.quantized(space.inputs(x)) @ rounded.T - shift + inputs @ branch.T
        return y if bias is None else y + bias

    return forward


def _rounded(weight: Tensor, hessian: Tensor | None) -> Tensor:
    if hessian is not None:
        return dequantize_groups(*gptq(weight, hessian, search=False))
    scale = (group_absmax(weight) / 7).bfloat16().float()
    return dequantize_groups(quantize_groups(weight, scale), scale)


def _damped(space: InputSpace, stats: InputStats) -> Tensor:
    moments = space.moments(stats.hessian)
    diagonal = moments.diagonal(dim1=1, dim2=2)
    return moments + torch.diag_embed(0.01 * diagonal.mean(1, keepdim=True).expand_as(diagonal))
