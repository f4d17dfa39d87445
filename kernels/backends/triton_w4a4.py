"""The W4A4 ops through Triton: tensors into launches.

Functions take and give what `reference` does, x (M, K). Parameters are read in their own dtypes.
Memory is torch's, work goes to torch's current stream. The first call of a kernel compiles it, a
few seconds, into Triton's own cache on disk.
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..reference import GROUP
from . import triton_kernels as kernels
from .native import WITHOUT_INT8
from .triton import FLOATS, Gpu, gpu

if TYPE_CHECKING:
    from ..params import (
        Activations,
        GeluArguments,
        GroupParams,
        ProductParams,
        QuantizeParams,
        W4A4Params,
    )

STRIPE = 8
"""Tiles of rows that neighbouring programs share: 8 x 128 rows of codes are 1.6 MB at K = 3072, and
stay in the L2 cache beside the weight's tiles.
"""


class Tile(NamedTuple):
    """What a program of the product does, and how."""

    rows: int
    columns: int
    warps: int
    stages: int


class Way(NamedTuple):
    """How codes are multiplied on a GPU."""

    ptx: bool
    floats: Any
    magic: bool
    tiles: tuple[Tile, ...]
    """From the largest; the first that gives every multiprocessor one is taken, else the last."""


NVIDIA = (Tile(128, 128, 8, 3), Tile(128, 64, 4, 3), Tile(64, 64, 4, 4))
"""A group's two products of 128 x 128 are 32 mma a warp and 16384 scaled additions a tile; wider
tiles want more than 255 registers, smaller ones read the weight more often. Not yet measured.
"""
CDNA = (Tile(128, 128, 8, 2), Tile(64, 64, 4, 2))
RDNA4 = (Tile(128, 128, 8, 2), Tile(64, 64, 4, 2))
RDNA3 = (Tile(128, 64, 8, 2), Tile(64, 64, 4, 2))
"""128 x 128 spills there: both halves of a wave hold an operand."""
AMD = {"gfx9": CDNA, "gfx12": RDNA4, "gfx11": RDNA3}
PARTS = {torch.bfloat16: 1, torch.float16: 2, torch.float32: 3}
"""How many bfloat16 a number is the sum of."""
OTHERS = (Tile(64, 64, 4, 2),)


def way(there: Gpu | None) -> Way:
    """None: a CPU, in Triton's interpreter."""
    if there is None:
        return Way(False, tl.int8, False, OTHERS)
    if there.kind == "hip":
        tiles = [found for arch, found in AMD.items() if there.arch.startswith(arch)]
        return Way(False, tl.int8, False, tiles[0])
    if there.kind == "xpu":
        return Way(False, tl.int8, False, OTHERS)
    if there.capability in WITHOUT_INT8:
        return Way(True, tl.bfloat16, False, NVIDIA)
    # mma takes any start for nothing; wgmma and tcgen05 would have to write it first
    return Way(True, tl.int8, there.capability // 10 in (8, 12), NVIDIA)


def tile(tiles: tuple[Tile, ...], m: int, n: int, multiprocessors: int) -> Tile:
    """None that tokens fill by less than half, but for the last."""
    for found in tiles:
        if (
            2 * m > found.rows
            and triton.cdiv(m, found.rows) * triton.cdiv(n, found.columns) >= multiprocessors
        ):
            return found
    return tiles[-1]


def _gpu(device: torch.device) -> Gpu | None:
    return None if device.type == "cpu" else gpu(device)


def _on(device: torch.device) -> contextlib.AbstractContextManager:
    """Triton launches on torch's current device."""
    if device.type == "cpu":
        return contextlib.nullcontext()
    return getattr(torch, device.type).device(device)


def _power(rank: int, least: int, most: int) -> int:
    """The power of two that holds `rank` columns, within bounds; 0 for none."""
    return min(max(triton.next_power_of_2(rank), least), most) if rank else 0


def quantizer_tile(rank: int, rotate: bool, there: Gpu | None) -> Tile:
    """What a program of `quantize_down` does: tokens and columns of h; more columns are more
    programs, which read x again. AMD's spill where a rotation has more than 32 beside it, and
    RDNA3's also where warps are fewer or loads run ahead.
    """
    if rotate and there is not None and there.kind == "hip":
        return Tile(32, _power(rank, 16, 32), 8, 1)
    columns = _power(rank, 16, 256)
    if columns > 128:
        return Tile(16, columns, 8, 2)
    return Tile(32, columns, 8 if rotate else 4, 2)


class Signs(NamedTuple):
    """The group from which on codes are unsigned, and which signs there are."""

    turn: int
    signed: bool
    unsigned: bool


def signs(p: QuantizeParams | Activations, groups: int) -> Signs:
    """Of codes of 8 bits, which hold both signs: where they are shifted."""
    if p.unsigned_from:
        return Signs(p.unsigned_from // GROUP, True, True)
    return Signs(0, False, True) if p.act_unsigned else Signs(groups, True, False)


def quantize_down(x: Tensor, p: QuantizeParams) -> tuple[Tensor, Tensor, Tensor]:
    m, k = x.shape
    x = x if x.stride(1) == 1 else x.contiguous()
    rank = p.proj_down.shape[1]
    q = torch.empty((m, k * p.act_bits // 8), dtype=torch.int8, device=x.device)
    ascales = torch.empty((k // GROUP, m), dtype=torch.float32, device=x.device)
    h = torch.empty((m, rank), dtype=torch.float32, device=x.device)
    if not m:
        return q, ascales, h
    shape = quantizer_tile(rank, p.rotation != 0, _gpu(x.device))
    grid = (triton.cdiv(m, shape.rows), triton.cdiv(rank, shape.columns) if rank else 1)
    codes = signs(p, k // GROUP)
    with _on(x.device):
        kernels.quantize_down[grid](
            x,
            p.smooth_factor.contiguous(),
            p.proj_down.contiguous(),
            q,
            ascales,
            h,
            m,
            k // GROUP,
            codes.turn,
            x.stride(0),
            rank,
            SIGNED=codes.signed,
            UNSIGNED=codes.unsigned,
            ROTATE=p.rotation != 0,
            FLOATS=tl.float32 if x.device.type == "cpu" else tl.bfloat16,
            PARTS=0 if x.dtype == p.proj_down.dtype else PARTS[p.proj_down.dtype],
            RANK=shape.columns,
            ROWS=shape.rows,
            WIDE=p.act_bits == 8,
            num_warps=shape.warps,
            num_stages=shape.stages,
        )
    return q, ascales, h


def _product(act: Activations, p: ProductParams, out_dtype: torch.dtype) -> Tensor:
    """`gemm_w4a4_up` of dense float32 activations; rows of h may lie apart."""
    device, m, (n, rank) = act.q.device, len(act.q), p.proj_up.shape
    out = torch.empty((m, n), dtype=out_dtype, device=device)
    if not out.numel():
        return out
    there = _gpu(device)
    chosen = way(there)
    shape = tile(chosen.tiles, m, n, 0 if there is None else there.multiprocessors)
    bias = None if p.bias is None else p.bias.contiguous()
    wide = act.act_bits == 8
    groups = act.q.shape[1] // (GROUP if wide else GROUP // 2)
    codes = Signs(groups, True, False) if wide else signs(act, groups)
    with _on(device):
        kernels.gemm_up[(triton.cdiv(m, shape.rows) * triton.cdiv(n, shape.columns),)](
            act.q,
            act.ascales,
            act.h,
            p.weight.contiguous(),
            p.weight_scale.contiguous(),
            p.proj_up.contiguous(),
            bias,
            out,
            m,
            n,
            groups,
            codes.turn,
            rank,
            act.h.stride(0),
            SIGNED=codes.signed,
            UNSIGNED=codes.unsigned,
            BIAS=bias is not None,
            RANK=_power(rank, 16, 32),
            FLOATS=chosen.floats,
            PTX=chosen.ptx,
            MAGIC=chosen.magic,
            ROWS=shape.rows,
            COLUMNS=shape.columns,
            STRIPE=STRIPE,
            WIDE=wide,
            num_warps=shape.warps,
            num_stages=shape.stages,
        )
    return out


def gemm_w4a4_up(act: Activations, p: ProductParams, out_dtype: torch.dtype) -> Tensor:
    dense = act._replace(
        q=act.q.contiguous(),
        ascales=act.ascales.to(torch.float32).contiguous(),
        h=act.h.to(torch.float32).contiguous(),
    )
    stored = out_dtype if out_dtype in FLOATS else torch.float32
    return _product(dense, p, stored).to(out_dtype)


def gemm_w4a4_up_gelu_quantize_down(a: GeluArguments) -> tuple[Tensor, Tensor, Tensor]:
    """In three steps. `a.mid_dtype` must be given."""
    assert a.mid_dtype is not None
    y = gemm_w4a4_up(a.activations, a.product, a.mid_dtype).float()
    return quantize_down(torch.nn.functional.gelu(y, approximate="tanh"), a.second)


def linear_w4a4(x: Tensor, p: W4A4Params) -> Tensor:
    act = _activations(x, p.quantizer)
    return _product(act, p.product, x.dtype)


def _activations(x: Tensor, p: QuantizeParams) -> Activations:
    from ..params import Activations

    return Activations(*quantize_down(x, p), p.act_unsigned, p.unsigned_from, p.act_bits)


def linear_w4a4_grouped(x: Tensor, p: GroupParams) -> list[Tensor]:
    """One quantization for all, and one h in which each layer has its columns."""
    down = torch.cat(list(p.proj_down), 1)
    layers = p.layers
    act = _activations(x, layers[0].quantizer._replace(proj_down=down))
    start, outs = 0, []
    for layer in layers:
        rank = layer.proj_down.shape[1]
        columns = act._replace(h=act.h[:, start : start + rank])
        outs.append(_product(columns, layer.product, x.dtype))
        start += rank
    return outs
