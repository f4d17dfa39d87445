"""Codecs for low-bit codes and group scales, each with its inverse beside it.

Two int4 codes share a byte, the even column in the low nibble. Signed codes span -8..7 (weights;
activations use -7..7), unsigned ones 0..15. A weight (N, K) carries one scale per row and group of
64 columns, stored as (K/64, N).

Codebook indices have 1 to 16 bits and follow one another in a row's bytes without gaps, the lowest
bits first: index i occupies the bits i*b to (i+1)*b, bit 0 being the lowest of byte 0. A row fills
whole bytes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...kernels import reference
from ...kernels.reference import GROUP
from ...kernels.reference import vq as reference_vq

INT4_MIN, INT4_MAX = -8, 7


def _groups(k: int) -> int:
    if k % GROUP:
        raise ValueError(f"K={k} is not a multiple of the group size {GROUP}")
    return k // GROUP


def pack_int4(codes: Tensor) -> Tensor:
    """Integers in -8..15 (..., K) -> int8 (..., K/2). Signed and unsigned codes pack alike; the
    reader says which they were.

    Raises ValueError where K is odd or codes are not integers.
    """
    if codes.is_floating_point() or codes.is_complex():
        raise ValueError(f"int4 codes must be integers, not {codes.dtype}")
    if codes.shape[-1] % 2:
        raise ValueError(f"K={codes.shape[-1]} is odd: two codes share a byte")
    return reference.pack_nibbles(codes)


def unpack_int4(packed: Tensor, signed: bool = True) -> Tensor:
    """int8 (..., K/2) -> int8 (..., K) with values -8..7, or 0..15 if not `signed`. Raises
    ValueError for another dtype.
    """
    if packed.dtype != torch.int8:
        raise ValueError(f"packed int4 must be int8, not {packed.dtype}")
    return reference.unpack_nibbles(packed, signed)


def group_absmax(weight: Tensor) -> Tensor:
    """Largest magnitude of each group: (N, K) -> (K/64, N), in the weight's dtype."""
    return weight.unflatten(-1, (_groups(weight.shape[-1]), GROUP)).abs().amax(-1).t().contiguous()


def quantize_groups(weight: Tensor, scale: Tensor) -> Tensor:
    """round(weight / scale), half to even, clamped to -8..7: (N, K), (K/64, N) -> int8 (N, K). A
    scale of 0 gives codes 0.
    """
    groups = weight.unflatten(-1, (_groups(weight.shape[-1]), GROUP))
    step = scale.t().to(weight.dtype).unsqueeze(-1)
    codes = torch.where(step == 0, 0, groups / torch.where(step == 0, 1, step))
    return codes.round_().clamp_(INT4_MIN, INT4_MAX).to(torch.int8).flatten(-2)


def dequantize_groups(codes: Tensor, scale: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """codes * scale: int8 (N, K), (K/64, N) -> (N, K) in `dtype`. Inverse of `quantize_groups` on
    its own results.
    """
    groups = codes.unflatten(-1, (_groups(codes.shape[-1]), GROUP)).to(dtype)
    return groups.mul_(scale.t().to(dtype).unsqueeze(-1)).flatten(-2)


def _index_bits(bits: int, count: int) -> None:
    if bits not in reference_vq.INDEX_BITS:
        raise ValueError(f"an index of {bits} bits is outside 1..16")
    if count * bits % 8:
        raise ValueError(
            f"{count} indices of {bits} bits do not fill whole bytes: a row must hold a multiple of"
            " 8 bits"
        )


def pack_indices(indices: Tensor, bits: int) -> Tensor:
    """Integers in 0..2^bits - 1 (..., count) -> uint8 (..., count * bits / 8).

    Raises ValueError where indices are not integers or out of range, `bits` is not 1..16, or count
    * bits is no multiple of 8.
    """
    if indices.is_floating_point() or indices.is_complex():
        raise ValueError(f"indices must be integers, not {indices.dtype}")
    _index_bits(bits, indices.shape[-1])
    if indices.numel() and not 0 <= int(indices.min()) <= int(indices.max()) < 1 << bits:
        raise ValueError(
            f"indices span {int(indices.min())}..{int(indices.max())} and must lie in"
            f" 0..{(1 << bits) - 1}, which {bits} bits hold"
        )
    return reference_vq.pack_indices(indices, bits)


def unpack_indices(packed: Tensor, bits: int, count: int) -> Tensor:
    """uint8 (..., count * bits / 8) -> int32 (..., count) with values 0..2^bits - 1. Inverse of
    `pack_indices`.

    Raises ValueError for another dtype, `bits` outside 1..16, or a row of another length.
    """
    if packed.dtype != torch.uint8:
        raise ValueError(f"packed indices must be uint8, not {packed.dtype}")
    _index_bits(bits, count)
    if packed.shape[-1] * 8 != count * bits:
        raise ValueError(
            f"a row of {packed.shape[-1]} bytes does not hold {count} indices of {bits} bits"
        )
    return reference_vq.unpack_indices(packed, bits)
