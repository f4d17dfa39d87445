"""The codebook ops in plain torch: the truth that the compiled versions are compared with, and the
path of users without them.

    W[n, j*D + e] = scale[n] * codebook[index[n, j], e]        y = x . W^T + bias
                                                     VQ4DiT, arXiv 2408.17131, eq. 2

An index has b = log2(C) bits. A row's indices follow one another in its bytes without gaps: index i
occupies the bits i*b to (i+1)*b, bit 0 being the lowest of byte 0. Arithmetic is as in `w4a4`:
float32, or float64 where x is float64.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .hadamard import hadamard64
from .nibbles import compute_dtype, operand_dtype

if TYPE_CHECKING:
    from ..params import VQParams

INDEX_BITS = range(1, 17)
"""Bits that an index may have."""


def _period(bits: int) -> tuple[int, int]:
    """The shortest run of indices that fills whole bytes: (indices, bytes)."""
    indices = 8 // math.gcd(bits, 8)
    return indices, indices * bits // 8


def pack_indices(indices: Tensor, bits: int) -> Tensor:
    """(..., count) integers -> (..., count * bits / 8) uint8. Only the lowest `bits` bits are read;
    count * bits is a multiple of 8.
    """
    if bits == 8:
        return indices.to(torch.uint8)
    many, size = _period(bits)
    runs = indices.unflatten(-1, (-1, many)).to(torch.int32) & ((1 << bits) - 1)
    packed = runs.new_zeros((*runs.shape[:-1], size), dtype=torch.int32)
    for i in range(many):
        byte, shift = divmod(i * bits, 8)
        value = runs[..., i] << shift
        for part in range((shift + bits + 7) // 8):
            packed[..., byte + part] |= (value >> (8 * part)) & 0xFF
    return packed.to(torch.uint8).flatten(-2)


def unpack_indices(packed: Tensor, bits: int) -> Tensor:
    """Inverse of `pack_indices`: (..., count * bits / 8) uint8 -> (..., count) int32."""
    if bits == 8:
        return packed.to(torch.int32)
    many, size = _period(bits)
    runs = packed.unflatten(-1, (-1, size))
    indices = packed.new_empty((*runs.shape[:-1], many), dtype=torch.int32)
    for i in range(many):
        byte, shift = divmod(i * bits, 8)
        value = runs[..., byte].to(torch.int32)
        for part in range(1, (shift + bits + 7) // 8):
            value = value | (runs[..., byte + part].to(torch.int32) << (8 * part))
        indices[..., i] = (value >> shift) & ((1 << bits) - 1)
    return indices.flatten(-2)


def index_bits(codebook: Tensor) -> int:
    """Bits of an index into a codebook (C, D) whose C is a power of two."""
    # a size is a tensor while torch.jit traces
    return int(codebook.shape[0]).bit_length() - 1


def dequantize_vq(
    indices: Tensor,
    codebook: Tensor,
    scale: Tensor | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """codebook[index] * scale.

    Shapes: indices uint8 (N, K/D * b/8) · codebook (C, D) · scale (N,) or None -> (N, K) in `dtype`
    """
    rows = unpack_indices(indices, index_bits(codebook))
    dense = codebook.to(dtype).index_select(0, rows.flatten()).view(len(indices), -1)
    return dense if scale is None else dense.mul_(scale.to(dtype).unsqueeze(-1))


def gemm_vq(
    x: Tensor,
    indices: Tensor,
    codebook: Tensor,
    scale: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """x . (codebook[index] * scale)^T + bias.

    Shapes: x (M, K) · indices uint8 (N, K/D * b/8) · codebook (C, D) · scale (N,) or None · bias
        (N,) or None -> (M, N) in x.dtype
    """
    return linear_vq(x, indices, codebook, scale, bias=bias)


def linear_vq(  # noqa: PLR0913 - the op's arguments
    x: Tensor,
    indices: Tensor,
    codebook: Tensor,
    scale: Tensor | None = None,
    proj_down: Tensor | None = None,
    proj_up: Tensor | None = None,
    bias: Tensor | None = None,
    rotation: int = 0,
) -> Tensor:
    """`gemm_vq` of x, rotated per group of 64 if asked, + (x . proj_down) . proj_up^T of the raw x.

    Shapes: x (M, K) · proj_down (K, R) · proj_up (N, R), the rest as `gemm_vq` -> (M, N) in x.dtype
    """
    xc, dtype = x.to(compute_dtype(x)), operand_dtype(x)
    act = (hadamard64(xc) if rotation else xc).to(dtype)
    y = torch.nn.functional.linear(
        act,
        dequantize_vq(indices, codebook, scale, xc.dtype).to(dtype),
        None if bias is None else bias.to(dtype),
    )
    if proj_down is not None and proj_up is not None:
        y = y + (xc @ proj_down.to(xc.dtype)) @ proj_up.to(xc.dtype).t()
    return y.to(x.dtype)


def linear_vq_grad(
    grad: Tensor, x: Tensor, p: VQParams, needs: tuple[bool, bool, bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of `linear_vq` to (x, proj_down, proj_up), each only where `needs` asks for it;
    indices, codebook and scale are constants.

    Shapes: grad (M, N) · x (M, K) -> (M, K), (K, R), (N, R) in the dtypes of their inputs
    """
    dtype = operand_dtype(x)
    grad, xd = grad.to(dtype), x.to(dtype)
    grad_x = grad_down = grad_up = None
    if needs[0]:
        dense = dequantize_vq(p.indices, p.codebook, p.scale, compute_dtype(x)).to(dtype)
        grad_x = grad @ dense
        grad_x = hadamard64(grad_x) if p.rotation else grad_x
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
