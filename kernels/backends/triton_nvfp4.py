"""Linears of 4-bit floats through Triton: tensors into launches, as `triton_w4a4` has them for
integers. For Blackwell; not yet measured.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..params import NVFP4Params
from ..reference import GROUP
from ..reference.nvfp4 import COLUMNS
from . import triton_nvfp4_kernels as kernels
from .triton_w4a4 import PARTS, STRIPE, Tile, _gpu, _on, _power, quantizer_tile, tile

BLACKWELL = (Tile(128, 128, 8, 3), Tile(128, 64, 8, 3), Tile(64, 64, 4, 3))
"""For mma.sync (12.x): fewer warps, or more of the branch at once, spill."""
TENSOR_MEMORY = (Tile(128, 128, 8, 3), Tile(128, 64, 8, 3))
"""For tcgen05 (10.x, 11.x), whose tiles are 128 tokens high. Four warps have too few registers."""
INTERPRETED = (Tile(64, 64, 4, 1),)
DEPTH = 128
"""Columns of K that are copied and multiplied together."""


def tiles(capability: int) -> tuple[Tile, ...]:
    """Those of a GPU, from the largest; 0: Triton's interpreter."""
    if not capability:
        return INTERPRETED
    return BLACKWELL if capability // 10 == 12 else TENSOR_MEMORY


def quantize(x: Tensor, p: NVFP4Params) -> tuple[Tensor, Tensor, Tensor]:
    """x (M, K) -> codes uint8 (M, K/2), e4m3 scales as uint8 (M, K/16), h float32 (M, R)."""
    m, k = x.shape
    x, rank = x if x.stride(1) == 1 else x.contiguous(), p.proj_down.shape[1]
    q = torch.empty((m, k // 2), dtype=torch.uint8, device=x.device)
    ascales = torch.empty((m, k // COLUMNS), dtype=torch.uint8, device=x.device)
    h = torch.empty((m, rank), dtype=torch.float32, device=x.device)
    shape = quantizer_tile(rank, False, _gpu(x.device))
    grid = (triton.cdiv(m, shape.rows), triton.cdiv(rank, shape.columns) if rank else 1)
    with _on(x.device):
        kernels.quantize_nvfp4[grid](
            x,
            p.smooth_factor.contiguous(),
            p.proj_down.contiguous(),
            q,
            ascales,
            h,
            m,
            k // GROUP,
            x.stride(0),
            rank,
            ROUNDED=p.rounded,
            FLOATS=tl.float32 if x.device.type == "cpu" else tl.bfloat16,
            PARTS=0 if x.dtype == p.proj_down.dtype else PARTS[p.proj_down.dtype],
            RANK=shape.columns,
            ROWS=shape.rows,
            num_warps=shape.warps,
            num_stages=shape.stages,
        )
    return q, ascales, h


def linear_nvfp4(x: Tensor, p: NVFP4Params) -> Tensor:
    """x (M, K) -> (M, N) in x.dtype; M is not 0."""
    q, ascales, h = quantize(x, p)
    m, (n, rank), there = len(x), p.proj_up.shape, _gpu(x.device)
    out = torch.empty((m, n), dtype=x.dtype, device=x.device)
    if not n:
        return out
    chosen = tiles(0 if there is None else there.capability)
    shape = tile(chosen, m, n, 0 if there is None else there.multiprocessors)
    bias = None if p.bias is None else p.bias.contiguous()
    with _on(x.device):
        kernels.gemm_nvfp4[(triton.cdiv(m, shape.rows) * triton.cdiv(n, shape.columns),)](
            q,
            ascales,
            h,
            p.weight.contiguous().view(torch.uint8),
            p.weight_scale.contiguous().view(torch.uint8),
            p.weight_scale_2.contiguous(),
            p.proj_up.contiguous(),
            bias,
            out,
            m,
            n,
            x.shape[1] // GROUP,
            rank,
            BIAS=bias is not None,
            RANK=_power(rank, 16, 16),
            SCALED=there is not None,
            ROWS=shape.rows,
            COLUMNS=shape.columns,
            DEPTH=DEPTH,
            STRIPE=STRIPE,
            num_warps=shape.warps,
            num_stages=shape.stages,
        )
    return out
