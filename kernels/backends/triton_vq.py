"""Codebook linears through Triton: tensors into launches, as `triton_w4a4` has them. The low-rank
branch and the rotation are torch's products around the kernel. Not yet measured.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..reference.vq import index_bits
from . import native_vq
from . import triton_vq_kernels as kernels
from .triton_w4a4 import STRIPE, Tile, _gpu, _on, tile

if TYPE_CHECKING:
    from ..params import VQParams
    from .triton import Gpu

INTEGERS = {2: torch.int32, 4: torch.int64}
"""That hold so many columns of 16 bits."""
KINDS = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}
MOST_BITS = 8


class Way(NamedTuple):
    """What a program does on a GPU. step: codewords of a row at a time."""

    tiles: tuple[Tile, ...]
    few: Tile
    """Where it holds all tokens."""
    step: int


NVIDIA = Way((Tile(128, 64, 8, 3), Tile(64, 64, 4, 3)), Tile(16, 64, 4, 3), 32)
"""A weight is looked up once for a tile's tokens. Not yet measured."""
OTHERS = Way((Tile(64, 64, 8, 1),), Tile(16, 64, 4, 1), 16)
"""RDNA3 spills with larger tiles, more codewords at a time or loads that run ahead."""


def way(there: Gpu | None) -> Way:
    """None: a CPU, in Triton's interpreter."""
    return NVIDIA if there is not None and there.kind == "cuda" else OTHERS


def has_layout(codebook: Tensor) -> bool:
    """Whether the kernel takes this codebook (C, D)."""
    known = codebook.dtype == torch.float16 and codebook.shape[1] in INTEGERS
    return known and index_bits(codebook) <= MOST_BITS


def gemm_vq(x: Tensor, p: VQParams, addend: Tensor | None = None) -> Tensor:
    """x (M, K) and addend (M, N) or None -> (M, N) in x.dtype."""
    (m, k), n, vector = x.shape, len(p.indices), p.codebook.shape[1]
    out = torch.empty((m, n), dtype=x.dtype, device=x.device)
    if not out.numel():
        return out
    whole = x.dtype != torch.float32
    if whole:  # rows of integers begin at whole ones
        x = x.contiguous()
        x = (x.clone() if x.data_ptr() % (2 * vector) else x).view(INTEGERS[vector])
    elif x.stride(1) != 1:
        x = x.contiguous()
    there = _gpu(x.device)
    count = 0 if there is None else there.multiprocessors
    chosen = way(there)
    shape = chosen.few if m <= chosen.few.rows else tile(chosen.tiles, m, n, count)
    book = p.codebook.contiguous().view(INTEGERS[vector])
    empty = out  # unread where there is none
    with _on(x.device):
        kernels.gemm_vq[(triton.cdiv(m, shape.rows) * triton.cdiv(n, shape.columns),)](
            x,
            p.indices.contiguous(),
            book,
            empty if p.scale is None else p.scale.contiguous(),
            empty if p.bias is None else p.bias.contiguous(),
            empty if addend is None else addend.contiguous(),
            out,
            m,
            n,
            k // vector,
            x.stride(0),
            BITS=index_bits(p.codebook),
            D=vector,
            WHOLE=whole,
            KIND=KINDS[out.dtype],
            SCALE=p.scale is not None,
            BIAS=p.bias is not None,
            ADDEND=addend is not None,
            ROWS=shape.rows,
            COLUMNS=shape.columns,
            STEP=chosen.step,
            STRIPE=STRIPE,
            num_warps=shape.warps,
            num_stages=shape.stages,
        )
    return out


def linear_vq(x: Tensor, p: VQParams) -> Tensor:
    """`reference.vq.linear_vq` of x (M, K)."""
    act, addend = native_vq.around(x, p)
    return gemm_vq(act.to(x.dtype), p, addend)
