"""Linears of 4-bit weights that are read as int8 through Triton: tensors into launches, as
`triton_w4a4` has them. Not yet measured.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..reference import GROUP
from . import triton_w4a8_kernels as kernels
from .triton_w4a4 import PARTS, STRIPE, Tile, _gpu, _on, _power, quantizer_tile, tile, way

if TYPE_CHECKING:
    from ..params import W4A8Params
    from .triton import Gpu

MOST_COLUMNS = 2**17
"""Of K: sums of more products of 127 * 126 might not fit into 32 bits."""
NVIDIA = (Tile(256, 64, 8, 3), Tile(128, 64, 4, 3), Tile(64, 64, 4, 4))
"""A weight's level, scale and shift are some six instructions, made once for a tile's tokens: so
tiles are high rather than wide.
"""


def tiles(there: Gpu | None) -> tuple[Tile, ...]:
    """Those of a GPU, from the largest."""
    return NVIDIA if there is not None and there.kind == "cuda" else way(there).tiles


def quantize(x: Tensor, p: W4A8Params) -> tuple[Tensor, Tensor, Tensor]:
    """x (M, K) -> codes int8 (M, K), of each 64 columns the even ones first, scales float32 (M,),
    h float32 (M, R).
    """
    m, k = x.shape
    x = x if x.stride(1) == 1 else x.contiguous()
    rank = 0 if p.proj_down is None else p.proj_down.shape[1]
    q = torch.empty((m, k), dtype=torch.int8, device=x.device)
    ascales = torch.empty(m, dtype=torch.float32, device=x.device)
    h = torch.empty((m, rank), dtype=torch.float32, device=x.device)
    if not m:
        return q, ascales, h
    shape = quantizer_tile(rank, p.rotation != 0, _gpu(x.device))
    down = p.smooth_factor if p.proj_down is None else p.proj_down  # unread where there is none
    with _on(x.device):
        kernels.quantize_tokens[
            (triton.cdiv(m, shape.rows), triton.cdiv(rank, shape.columns) if rank else 1)
        ](
            x,
            p.smooth_factor.contiguous(),
            down.contiguous(),
            q,
            ascales,
            h,
            m,
            k // GROUP,
            x.stride(0),
            rank,
            ROTATE=p.rotation != 0,
            FLOATS=tl.float32 if x.device.type == "cpu" else tl.bfloat16,
            PARTS=0 if x.dtype == down.dtype else PARTS[down.dtype],
            RANK=shape.columns,
            ROWS=shape.rows,
            num_warps=shape.warps,
            num_stages=shape.stages,
        )
    return q, ascales, h


def linear_w4a8(x: Tensor, p: W4A8Params) -> Tensor:
    """`reference.linear_w4a8` of x (M, K). Raises ValueError where sums might not fit."""
    m, (n, half) = len(x), p.weight.shape
    if 2 * half > MOST_COLUMNS:
        raise ValueError(f"K={2 * half} is more than 2^17: sums would not fit into 32 bits")
    out = torch.empty((m, n), dtype=x.dtype, device=x.device)
    if not out.numel():
        return out
    there = _gpu(x.device)
    chosen = way(there)
    shape = tile(tiles(there), m, n, 0 if there is None else there.multiprocessors)
    bias = None if p.bias is None else p.bias.contiguous()
    up = p.weight_channel_scale if p.proj_up is None else p.proj_up
    rank = 0 if p.proj_up is None else p.proj_up.shape[1]
    q, ascales, h = quantize(x, p)
    with _on(x.device):
        kernels.gemm_w4a8[(triton.cdiv(m, shape.rows) * triton.cdiv(n, shape.columns),)](
            q,
            ascales,
            h,
            p.weight.contiguous(),
            p.weight_scale.contiguous(),
            p.weight_channel_scale.contiguous(),
            p.weight_table.contiguous(),
            up.contiguous(),
            bias,
            out,
            m,
            n,
            half // (GROUP // 2),
            rank,
            PER=len(p.weight_scale) * (GROUP // 2) // half,
            BIAS=bias is not None,
            RANK=_power(rank, 16, 16),
            FLOATS=chosen.floats,
            PTX=chosen.ptx,
            ROWS=shape.rows,
            COLUMNS=shape.columns,
            STRIPE=STRIPE,
            num_warps=shape.warps,
            num_stages=shape.stages,
        )
    return out
