"""4-bit codes: packed two to a byte, and dequantized.

    W = W4 * weight_scale                          codes -8..7   SVDQuant, arXiv 2411.05007
    W = (W4 - 8) * weight_scale + weight_zeros     codes 0..15   AWQ, arXiv 2306.00978

This file also holds what every formula here shares: the group size and the dtypes of arithmetic.
"""

from __future__ import annotations

import torch
from torch import Tensor

GROUP = 64
"""Columns of K that share one scale."""

FLIP_HIGHEST_BITS = -120  # 0x88 as int8


def compute_dtype(x: Tensor) -> torch.dtype:
    """float64 for float64 input, float32 for every other."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def operand_dtype(x: Tensor) -> torch.dtype:
    """dtype of the large product's operands. float16 is widened: a de-smoothed outlier may pass its
    65504.
    """
    return torch.bfloat16 if x.is_cuda and x.dtype == torch.bfloat16 else compute_dtype(x)


def pack_nibbles(codes: Tensor) -> Tensor:
    """(..., K) integers -> (..., K/2) int8; the low nibble is the even column. Only the lowest four
    bits are read.
    """
    codes = codes.to(torch.int8)
    return (codes[..., 0::2] & 0x0F) | (codes[..., 1::2] << 4)


def unpack_nibbles(packed: Tensor, signed: bool, dtype: torch.dtype = torch.int8) -> Tensor:
    """Inverse of `pack_nibbles`: (..., K/2) int8 -> (..., K) in `dtype`, -8..7 if signed, else
    0..15.
    """
    # Two shifts and two strided writes: as fast as a 256-entry table of pairs on CPU, and it needs
    # no index tensor.
    codes = packed.new_empty((*packed.shape, 2), dtype=dtype)
    codes[..., 0] = (packed << 4) >> 4 if signed else packed & 0x0F
    codes[..., 1] = packed >> 4 if signed else (packed >> 4) & 0x0F
    return codes.flatten(-2)


def per_group(values: Tensor, dtype: torch.dtype) -> Tensor:
    """(K/64, N) -> (N, K/64, 1), ready to broadcast over groups of an (N, K/64, 64) view."""
    return values.t().to(dtype).unsqueeze(-1)


def dequantize_w4(
    weight: Tensor, weight_scale: Tensor, dtype: torch.dtype = torch.float32
) -> Tensor:
    """W4 * weight_scale.

    Shapes: weight int8 (N, K/2), codes -8..7; weight_scale (K/64, N) -> (N, K) in `dtype`.
    """
    codes = unpack_nibbles(weight, True, dtype)
    return codes.unflatten(-1, (-1, GROUP)).mul_(per_group(weight_scale, dtype)).flatten(-2)


def dequantize_w4_zeros(
    weight: Tensor,
    weight_scale: Tensor,
    weight_zeros: Tensor | None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """(W4 - 8) * weight_scale + weight_zeros; without zeros the weights are symmetric.

    Shapes: weight int8 (N, K/2), codes 0..15; weight_scale, weight_zeros (K/64, N) -> (N, K) in
        `dtype`.
    """
    # Flipping the highest bit of a nibble turns an unsigned code u into the signed code u - 8: one
    # pass over floats less.
    codes = unpack_nibbles(weight ^ FLIP_HIGHEST_BITS, True, dtype).unflatten(-1, (-1, GROUP))
    codes = codes.mul_(per_group(weight_scale, dtype))
    return (codes if weight_zeros is None else codes.add_(per_group(weight_zeros, dtype))).flatten(
        -2
    )
