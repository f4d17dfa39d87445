"""The W4A8 op in plain torch: 4-bit weights that are int8 numbers once they are read, so that their
product with int8 activations is one of plain integers over all of K.

    W8[n, k] = (table[code[n, k]] * scale[k / g, n] + 64) >> 7         int8, in -126..126
    y = (Q8(x / smooth) . W8^T) * ascale * channel_scale + (x . proj_down) . proj_up^T + bias

The table has 16 levels, a layer its own: those of least squared error for weights over their
group's largest (Lloyd, 1982; 4-bit codes with a table a layer: QLoRA's NF4, arXiv 2305.14314). The
scale of a group of g columns is an int8 factor below one number a row, as in scales of two levels
(VS-Quant, arXiv 2102.04503), and may be negative: the level of 127 then serves a group's largest
negative weight. Activations have one scale a token. So nothing is rescaled before the end of K, and
what a product costs beyond int8 x int8 is one look-up and one multiplication a weight.
SVDQuant's branch, smoothing and rotation: arXiv 2411.05007, eq. 3 and 9.

Arithmetic is float32, or float64 where x is float64, on integers: exact up to 2^24, and rounded
there to a ten-millionth. On CUDA a bfloat16 x keeps bfloat16 operands, in which these integers are
exact. Letters for shapes are explained in the docstring of `kernels`; S = K/g.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .hadamard import hadamard64
from .nibbles import compute_dtype, operand_dtype, unpack_nibbles

if TYPE_CHECKING:
    from ..params import W4A8Params

LEVELS = 16
GROUPS = (16, 32, 64)
"""Columns that can share a scale."""
SHIFT_BITS = 7
"""A level times a scale is a number in 2^-7."""
ACT_MAX = 127


def decode_groups(levels: Tensor, scale: Tensor) -> Tensor:
    """(level * scale + 64) >> 7: int32 in the broadcast shape of two integer tensors."""
    half = 1 << (SHIFT_BITS - 1)
    return (levels.to(torch.int32) * scale.to(torch.int32) + half) >> SHIFT_BITS


def decode_w4a8(weight: Tensor, weight_scale: Tensor, weight_table: Tensor) -> Tensor:
    """W8, int8 (N, K).

    Shapes: weight int8 (N, K/2), codes 0..15 · weight_scale int8 (S, N) · weight_table int8 (16,)
    """
    codes = unpack_nibbles(weight, False, torch.int32)
    groups = weight_table[codes].unflatten(-1, (len(weight_scale), -1))
    return decode_groups(groups, weight_scale.t()[..., None]).flatten(-2).to(torch.int8)


def dequantize_w4a8(
    weight: Tensor,
    weight_scale: Tensor,
    weight_channel_scale: Tensor,
    weight_table: Tensor,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """W8 * channel_scale, (N, K) in `dtype`. Shapes: as `linear_w4a8`."""
    whole = decode_w4a8(weight, weight_scale, weight_table).to(dtype)
    return whole.mul_(weight_channel_scale.to(dtype)[:, None])


def smoothed(x: Tensor, smooth_factor: Tensor, rotation: int) -> Tensor:
    """What is quantized of x (M, K), in its dtype."""
    divided = x / smooth_factor.to(x.dtype)
    return hadamard64(divided) if rotation else divided


def quantize_tokens(x: Tensor) -> tuple[Tensor, Tensor]:
    """x (M, K) -> float codes -127..127 (M, K), scale (M, 1) = absmax / 127. Rounded half to even.
    A NaN or infinity spoils its own token alone.
    """
    scale = x.abs().amax(-1, keepdim=True) / ACT_MAX
    return (x / scale.clamp_min(torch.finfo(scale.dtype).tiny)).round_(), scale


def linear_w4a8(  # noqa: PLR0913 - the op's arguments
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    weight_channel_scale: Tensor,
    weight_table: Tensor,
    smooth_factor: Tensor,
    proj_down: Tensor | None = None,
    proj_up: Tensor | None = None,
    bias: Tensor | None = None,
    rotation: int = 0,
) -> Tensor:
    """The formula above.

    Shapes:
        x (M, K) · weight int8 (N, K/2), codes 0..15 · weight_scale int8 (S, N) ·
        weight_channel_scale (N,) · weight_table int8 (16,) · smooth_factor (K,) · proj_down (K, R)
        and proj_up (N, R) or neither · bias (N,) or None -> (M, N) in x.dtype
    """
    xc, dtype = x.to(compute_dtype(x)), operand_dtype(x)
    codes, ascale = quantize_tokens(smoothed(xc, smooth_factor, rotation))
    whole = decode_w4a8(weight, weight_scale, weight_table).to(dtype)
    y = (codes.to(dtype) @ whole.t()).to(xc.dtype).mul_(ascale)
    y = y.mul_(weight_channel_scale.to(xc.dtype))
    if proj_down is not None and proj_up is not None:
        y = y.addmm_(xc @ proj_down.to(xc.dtype), proj_up.to(xc.dtype).t())
    return (y if bias is None else y.add_(bias.to(xc.dtype))).to(x.dtype)


def linear_w4a8_grad(
    grad: Tensor, x: Tensor, p: W4A8Params, needs: tuple[bool, bool, bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of `linear_w4a8` to (x, proj_down, proj_up), each only where `needs` asks for it;
    the quantizer counts as the identity.

    Shapes: grad (M, N) · x (M, K) -> (M, K), (K, R), (N, R) in the dtypes of their inputs
    """
    dtype = operand_dtype(x)
    grad, xd = grad.to(dtype), x.to(dtype)
    grad_x = grad_down = grad_up = None
    if needs[0]:
        dense = dequantize_w4a8(*p[:4], compute_dtype(x)).to(dtype)
        main = grad @ dense
        grad_x = (hadamard64(main) if p.rotation else main) / p.smooth_factor.to(dtype)
    if p.proj_down is not None and p.proj_up is not None:
        down, up = p.proj_down.to(dtype), p.proj_up.to(dtype)
        grad_h = grad @ up
        if grad_x is not None:
            grad_x = grad_x + grad_h @ down.t()
        if needs[1]:
            grad_down = (xd.t() @ grad_h).to(p.proj_down.dtype)
        if needs[2]:
            grad_up = (grad.t() @ (xd @ down)).to(p.proj_up.dtype)
    return None if grad_x is None else grad_x.to(x.dtype), grad_down, grad_up
