"""The W4A4 ops in plain torch: the truth that the compiled versions are compared with, and the path
of users without them.

    y = Q(x / smooth) . (W4 * weight_scale)^T + (x . proj_down) . proj_up^T + bias
                                                     SVDQuant, arXiv 2411.05007, eq. 3 and 9

Arithmetic is float32, or float64 where x is float64. On CUDA a bfloat16 x keeps bfloat16 *operands*
for the large product, because tensor cores accumulate it in float32 anyway. Letters for shapes are
explained in the docstring of `kernels`.

The dequantized product is as exact as the integer one: a code times a bfloat16 scale has 4 + 8
significant bits and is exact in float32, and an int4 x int4 sum over a group is at most 64 * 15 * 8
= 7680, far below 2^24. What is left is the rounding of the float32 accumulation across groups,
which the integer kernels have as well.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .hadamard import hadamard64
from .nibbles import (
    GROUP,
    compute_dtype,
    dequantize_w4,
    operand_dtype,
    pack_nibbles,
    per_group,
    unpack_nibbles,
)

if TYPE_CHECKING:
    from ..params import W4A4Params

SHIFT = 0.171875
"""Added to activations that follow a GELU (whose minimum is -0.17) so that codes 0..15 cover them;
exact in bfloat16.
"""

SIGNED_MAX = 7
UNSIGNED_MAX = 15


def check_flags(act_unsigned: bool, rotation: int, unsigned_from: int = 0) -> None:
    """Raises ValueError for a rotation other than 0 and 64, for unsigned codes of rotated (hence
    signed) values, and for codes that change their sign within a group.
    """
    if rotation not in (0, GROUP):
        raise ValueError(f"rotation={rotation} is neither 0 nor the group size {GROUP}")
    if rotation and act_unsigned:
        raise ValueError(
            f"act_unsigned and rotation={rotation} exclude one another: rotated activations have"
            " both signs"
        )
    if unsigned_from and (act_unsigned or rotation or unsigned_from < 0 or unsigned_from % GROUP):
        raise ValueError(
            f"unsigned_from={unsigned_from} must be a multiple of the group size {GROUP}, beside"
            " neither act_unsigned nor rotation"
        )


# ---- activations ---------------------------------------------------------------------------------


def _quantize_groups(
    x: Tensor, smooth_factor: Tensor, act_unsigned: bool, rotation: int, unsigned_from: int = 0
) -> tuple[Tensor, Tensor]:
    """Smoothed, rotated, rounded: x (M, K) in compute dtype -> float codes (M, K/64, 64), scale (M,
    K/64, 1).
    """
    check_flags(act_unsigned, rotation, unsigned_from)
    if unsigned_from:
        sides = (slice(0, unsigned_from), slice(unsigned_from, None))
        parts = [
            _quantize_groups(x[:, columns], smooth_factor[columns], columns.start > 0, 0)
            for columns in sides
        ]
        codes, scales = zip(*parts, strict=True)
        return torch.cat(codes, 1), torch.cat(scales, 1)
    smooth = smooth_factor.to(x.dtype)
    xs = (x + SHIFT).div_(smooth) if act_unsigned else x / smooth
    if rotation:
        xs = hadamard64(xs)
    groups = xs.unflatten(-1, (-1, GROUP))
    if act_unsigned:
        scale = groups.amax(-1, keepdim=True).clamp_min_(0) / UNSIGNED_MAX
    else:
        scale = groups.abs().amax(-1, keepdim=True) / SIGNED_MAX
    # A group of zeros has scale 0; dividing by the smallest normal number instead gives codes 0 and
    # never 0/0.
    codes = groups.div_(scale.clamp_min(torch.finfo(scale.dtype).tiny)).round_()
    return (codes.clamp_min_(0) if act_unsigned else codes), scale


def quantize_down(
    x: Tensor,
    smooth_factor: Tensor,
    proj_down: Tensor,
    act_unsigned: bool = False,
    rotation: int = 0,
    unsigned_from: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    """x -> int4 codes, their scales, and the input of the low-rank branch, in one read of x.

    Signed: scale = absmax / 7, codes -7..7. Unsigned: x + SHIFT, scale = max / 15, codes 0..15.
        Rounded half to even. unsigned_from, where it is not 0: columns before it are signed, and
        those from it on unsigned.
    A NaN or infinity in x makes the scale of its own group NaN or infinite and touches no other
    token.

    Shapes:
        x (M, K) · smooth_factor (K,) · proj_down (K, R)
        -> q int8 (M, K/2), low nibble = even column · ascales float32 (K/64, M) · h float32 (M, R)
        from the raw x
    """
    x = x.to(compute_dtype(x))
    codes, scale = _quantize_groups(x, smooth_factor, act_unsigned, rotation, unsigned_from)
    q = pack_nibbles(codes.nan_to_num_(0, UNSIGNED_MAX, -SIGNED_MAX).to(torch.int8).flatten(-2))
    return q, scale.squeeze(-1).t().contiguous(), x @ proj_down.to(x.dtype)


# ---- products ------------------------------------------------------------------------------------


def _matmul_up(
    act: Tensor, weight: Tensor, h: Tensor, proj_up: Tensor, bias: Tensor | None
) -> Tensor:
    """act . weight^T + h . proj_up^T + bias; the low-rank part comes first so that the large
    product adds onto it once.
    """
    if h.shape[-1] == 0:
        return torch.nn.functional.linear(act, weight, None if bias is None else bias.to(act.dtype))
    y = torch.nn.functional.linear(
        h, proj_up.to(h.dtype), None if bias is None else bias.to(h.dtype)
    )
    return y.to(act.dtype).addmm_(act, weight.t())


def gemm_w4a4_up(  # noqa: PLR0913 - the op's arguments
    q: Tensor,
    ascales: Tensor,
    h: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    proj_up: Tensor,
    bias: Tensor | None = None,
    act_unsigned: bool = False,
    unsigned_from: int = 0,
) -> Tensor:
    """int4 product, group scales, low-rank up-projection and bias.

    Shapes:
        q int8 (M, K/2) · ascales (K/64, M) · h (M, R) · weight int8 (N, K/2), codes -8..7 ·
        weight_scale (K/64, N) proj_up (N, R) · bias (N,) or None -> (M, N) float32, float64 if
        ascales is float64
    """
    dtype = compute_dtype(ascales)
    if unsigned_from:
        sides = q[:, : unsigned_from // 2], q[:, unsigned_from // 2 :]
        signed, unsigned = (
            unpack_nibbles(side, signs, dtype)
            for side, signs in zip(sides, (True, False), strict=True)
        )
        codes = torch.cat((signed, unsigned), 1)
    else:
        codes = unpack_nibbles(q, not act_unsigned, dtype)
    act = codes.unflatten(-1, (-1, GROUP)).mul_(per_group(ascales, dtype)).flatten(-2)
    return _matmul_up(act, dequantize_w4(weight, weight_scale, dtype), h.to(dtype), proj_up, bias)


def gemm_w4a4_up_gelu_quantize_down(  # noqa: PLR0913 - the op's arguments
    q: Tensor,
    ascales: Tensor,
    h: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    proj_up: Tensor,
    bias: Tensor | None,
    smooth_factor2: Tensor,
    proj_down2: Tensor,
    act_unsigned: bool = False,
    act_unsigned2: bool = False,
    rotation2: int = 0,
    mid_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """quantize_down(GELU(gemm_w4a4_up(...))): the first layer of an MLP straight into the input of
    its second.

    The product is rounded to `mid_dtype`, as the first layer's output would be; the GELU (tanh
    approximation) of it is not rounded.

    Shapes: as `gemm_w4a4_up`, with N a multiple of 64 · smooth_factor2 (N,) · proj_down2 (N, R2)
        -> q2 int8 (M, N/2) · ascales2 float32 (N/64, M) · h2 float32 (M, R2)
    """
    y = gemm_w4a4_up(q, ascales, h, weight, weight_scale, proj_up, bias, act_unsigned)
    hidden = torch.nn.functional.gelu(y.to(mid_dtype or y.dtype).to(y.dtype), approximate="tanh")
    return quantize_down(hidden, smooth_factor2, proj_down2, act_unsigned2, rotation2)


# ---- whole layers --------------------------------------------------------------------------------


def linear_w4a4(  # noqa: PLR0913 - the op's arguments
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    smooth_factor: Tensor,
    proj_down: Tensor,
    proj_up: Tensor,
    bias: Tensor | None = None,
    act_unsigned: bool = False,
    rotation: int = 0,
    unsigned_from: int = 0,
) -> Tensor:
    """`quantize_down` followed by `gemm_w4a4_up`, without packing the codes in between.

    Shapes: x (M, K), the rest as there -> (M, N) in x.dtype
    """
    layers = [weight], [weight_scale], [proj_down], [proj_up], [bias]
    flags = (act_unsigned, rotation, unsigned_from)
    return linear_w4a4_grouped(x, smooth_factor, *layers, *flags)[0]


def linear_w4a4_grouped(  # noqa: PLR0913 - the op's arguments
    x: Tensor,
    smooth_factor: Tensor,
    weight: Sequence[Tensor],
    weight_scale: Sequence[Tensor],
    proj_down: Sequence[Tensor],
    proj_up: Sequence[Tensor],
    bias: Sequence[Tensor | None],
    act_unsigned: bool = False,
    rotation: int = 0,
    unsigned_from: int = 0,
) -> list[Tensor]:
    """Several linears of one x that share its smoothing (q, k and v): x is quantized once.

    Shapes: x (M, K) · smooth_factor (K,) · the lists hold what `linear_w4a4` takes for each -> (M,
        N) each, in x.dtype
    """
    xc, dtype = x.to(compute_dtype(x)), operand_dtype(x)
    codes, scale = _quantize_groups(xc, smooth_factor, act_unsigned, rotation, unsigned_from)
    act = codes.mul_(scale).flatten(-2).to(dtype)
    layers = zip(weight, weight_scale, proj_down, proj_up, bias, strict=True)
    return [
        _matmul_up(act, dequantize_w4(w, ws, dtype), xc @ down.to(xc.dtype), up, b).to(x.dtype)
        for w, ws, down, up, b in layers
    ]


def mlp_w4a4(
    x: Tensor,
    first: Sequence[Any],
    second: Sequence[Any],
    flags: tuple = (False, 0),
    flags2: tuple = (False, 0),
) -> Tensor:
    """linear_w4a4 -> GELU (tanh approximation) -> linear_w4a4.

    `first`, `second`: weight, weight_scale, smooth_factor, proj_down, proj_up, bias. `flags`:
        act_unsigned, rotation of each.
    Shapes: x (M, K) -> (M, N of the second) in x.dtype
    """
    return linear_w4a4(
        torch.nn.functional.gelu(linear_w4a4(x, *first, *flags), approximate="tanh"),
        *second,
        *flags2,
    )


# ---- gradients: the straight-through model, in which Q is the identity ---------------------------


def linear_w4a4_grad(
    grad: Tensor, x: Tensor, p: W4A4Params, needs: tuple[bool, bool, bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of `linear_w4a4` to (x, proj_down, proj_up), each only where `needs` asks for it.

    Shapes: grad (M, N) · x (M, K) -> (M, K), (K, R), (N, R) in the dtypes of their inputs
    """
    dtype = operand_dtype(x)
    grad, xd = grad.to(dtype), x.to(dtype)
    down, up = p.proj_down.to(dtype), p.proj_up.to(dtype)
    grad_x = grad_down = grad_up = None
    if needs[0] or needs[1]:
        grad_h = grad @ up
    if needs[0]:
        main = grad @ dequantize_w4(p.weight, p.weight_scale, dtype)
        main = (hadamard64(main) if p.rotation else main) / p.smooth_factor.to(dtype)
        grad_x = (main + grad_h @ down.t()).to(x.dtype)
    if needs[1]:
        grad_down = (xd.t() @ grad_h).to(p.proj_down.dtype)
    if needs[2]:
        grad_up = (grad.t() @ (xd @ down)).to(p.proj_up.dtype)
    return grad_x, grad_down, grad_up
