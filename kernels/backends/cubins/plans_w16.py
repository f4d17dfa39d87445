"""The launches of the ops whose activations keep 16 bits: W4A16 and codebooks. As `plans`."""

from __future__ import annotations

import ctypes
from typing import NamedTuple

from . import kernels
from .kernels import TYPES
from .plans import THREADS, Gpu, Launch, up
from .structs import F32, GROUP

# ---- tiles ---------------------------------------------------------------------------------------


class Tiling(NamedTuple):
    """A block's warps and the 16 x 8 products of each, along M and N; stages of its ring."""

    warps_m: int
    warps_n: int
    tiles_m: int
    tiles_n: int
    stages: int

    @property
    def threads(self) -> int:
        return 32 * self.warps_m * self.warps_n

    @property
    def rows(self) -> int:
        return self.warps_m * self.tiles_m * 16

    @property
    def columns(self) -> int:
        return self.warps_n * self.tiles_n * 8


_W4A16 = dict(
    zip(
        kernels.W4A16_TILINGS,
        (Tiling(1, 4, 1, 2, 6), Tiling(2, 4, 2, 4, 4), Tiling(4, 2, 2, 8, 3)),
        strict=True,
    )
)
_VQ = dict(
    zip(
        kernels.VQ_TILINGS,
        (Tiling(1, 4, 1, 2, 5), Tiling(2, 4, 2, 4, 3), Tiling(2, 4, 4, 4, 3)),
        strict=True,
    )
)
_GEMV_SHARED = 32 * 1024


def _gemv_blocks(op: ctypes.Structure, tokens: int) -> tuple[int, int]:
    """(blocks, how many of them share a row of weights): eight outputs a warp, four warps."""
    groups = up(op.M, tokens)
    return up(op.N, 32) * groups, groups


# ---- W4A16 ---------------------------------------------------------------------------------------


def w4a16(op: ctypes.Structure, gpu: Gpu) -> list[Launch]:
    """W4A16 -> its launch. One or two tokens are bound by memory in either kernel, and the one
    without the matrix unit starts faster; float32 keeps its precision there.
    """
    if op.param_dtype == F32:
        raise ValueError("4-bit weights on a GPU take scales in bfloat16 or float16")
    if not op.M or not op.N:
        return []
    x, param = TYPES[op.x_dtype], TYPES[op.param_dtype]
    multiplies = x == "f16" or (x == "bf16" and gpu.capability >= 80)
    if not multiplies or op.M <= 2:
        tokens = op.M if op.M <= 2 else 4
        blocks, groups = _gemv_blocks(op, tokens)
        shared = min(up(op.K, 1024) * 1024 * tokens * 4, _GEMV_SHARED)
        kernel = kernels.w4a16_gemv(x, param, tokens)
        return [Launch(kernel, (blocks, 1), THREADS, shared, (op, ctypes.c_int(groups)))]
    few, some, many = kernels.W4A16_TILINGS
    large = _W4A16[many]
    fills = up(op.M, large.rows) * up(op.N, large.columns) >= gpu.multiprocessors
    name = many if op.M > _W4A16[some].rows and fills else some
    if op.M <= _W4A16[few].rows:
        name = few
    tiling = _W4A16[name]
    stage = tiling.rows * GROUP * 2 + tiling.columns * GROUP // 2
    shared = tiling.stages * stage + 2 * tiling.columns * 8
    grid = (up(op.N, tiling.columns) * up(op.M, tiling.rows), 1)
    return [Launch(kernels.w4a16_gemm(x, param, name), grid, tiling.threads, shared, (op,))]


# ---- codebooks -----------------------------------------------------------------------------------


def _book_bytes(bits: int, vector: int) -> int:
    """A codebook in shared memory, in as many interleaved copies as are of use."""
    book = 2 * vector << bits
    return book * min(16384 // book, 128 // (2 * vector))


def _check_vq(op: ctypes.Structure) -> None:
    """Raises ValueError for what the kernels of csrc/cuda/vq do not take."""
    if op.codebook_dtype != 1:
        raise ValueError("gemm_vq on a GPU takes a codebook in float16")
    if op.K % GROUP:
        raise ValueError("gemm_vq on a GPU takes K in whole groups of 64")
    if op.out_dtype != op.x_dtype or (op.addend and op.addend_dtype != op.x_dtype):
        raise ValueError("gemm_vq on a GPU gives and adds numbers of x's dtype")


def gemm_vq(op: ctypes.Structure, gpu: Gpu) -> list[Launch]:
    """GemmVQ -> its launch."""
    _check_vq(op)
    if not op.M or not op.N:
        return []
    if (op.bits, op.vector) not in kernels.VQ_LAYOUTS:
        raise ValueError(
            f"gemm_vq on a GPU has no kernel for indices of {op.bits} bits and {op.vector} columns"
            " a codeword"
        )
    x, layout = TYPES[op.x_dtype], (op.bits, op.vector)
    book = _book_bytes(*layout)
    multiplies = x == "f16" or (x == "bf16" and gpu.capability >= 80)
    if not multiplies or op.M == 1:
        tokens = 4 if op.M > 1 else 1
        blocks, groups = _gemv_blocks(op, tokens)
        staged = min(up(op.K, 1024) * 1024 * tokens * 4, _GEMV_SHARED // 2)
        kernel = kernels.vq_gemv(x, layout, tokens)
        return [Launch(kernel, (blocks, 1), THREADS, book + staged, (op, ctypes.c_int(groups)))]
    few, some, many = kernels.VQ_TILINGS
    large = _VQ[many]
    fills = up(op.M, large.rows) * up(op.N, large.columns) >= gpu.multiprocessors
    name = many if gpu.capability >= 80 and op.M > _VQ[some].rows and fills else some
    if op.M <= _VQ[few].rows:
        name = few
    tiling = _VQ[name]
    lane_bytes = 16 // op.vector * op.bits // 8
    stage = tiling.rows * GROUP * 2 + tiling.columns * 4 * lane_bytes
    grid = (up(op.N, tiling.columns) * up(op.M, tiling.rows), 1)
    shared = book + tiling.stages * stage
    return [Launch(kernels.vq_gemm(x, layout, name), grid, tiling.threads, shared, (op,))]
