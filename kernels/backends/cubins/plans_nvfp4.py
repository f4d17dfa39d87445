"""From an op's struct to the kernel that computes it, for 4-bit floats: what
csrc/cuda/nvfp4/sm120.cu decides for the compiled extension. As `plans`, which has the rest.
"""

from __future__ import annotations

import ctypes

from . import kernels
from .kernels import TYPES
from .plans import COLUMNS, THREADS, Gpu, Launch, tile_rows, up
from .structs import F32, GROUP

_DOWN_COLUMNS = 32
_MOST_BLOCKS = 2**31 - 1
_GROUPS, _GROUP_BYTES, _SCALES = 2, 32, 2 * 16
"""Groups of a stage; bytes of a row: of one group's codes, and of both places of scales."""


def _check(op: str, struct: ctypes.Structure, gpu: Gpu) -> None:
    if gpu.capability // 10 != 12:
        raise ValueError(f"{op} runs on GPUs of compute capability 12.0 and 12.1 only")
    if struct.param_dtype == F32:
        raise ValueError(f"{op}: on a GPU parameters are float16 or bfloat16, not float32")


def quantize_nvfp4_down(op: ctypes.Structure, gpu: Gpu) -> list[Launch]:
    """QuantizeNvfp4Down -> its launch. Raises ValueError for what no kernel takes."""
    _check("quantize_nvfp4_down", op, gpu)
    if not op.M:
        return []
    x, param = TYPES[op.x_dtype], TYPES[op.param_dtype]
    few, many = kernels.NVFP4_QUANTIZE_TILES
    fits = kernels.fits_as_it_is(x, param)
    # Three quarters of the multiprocessors busy with twice the tokens are as fast, and read
    # proj_down half as often.
    tile = many if fits and up(op.M, 32) * 4 >= gpu.multiprocessors * 3 else few
    eights, warps, _ = tile
    sums = warps * 8 * eights * (_DOWN_COLUMNS + 4) * 4
    shared = max(warps * (GROUP * _DOWN_COLUMNS * 2 + 8 * 80), sums)
    grid = (up(op.M, 8 * eights), up(op.R, _DOWN_COLUMNS) or 1)
    return [Launch(kernels.nvfp4_quantize(x, param, tile), grid, 32 * warps, shared, (op,))]


def gemm_nvfp4_up(op: ctypes.Structure, gpu: Gpu) -> list[Launch]:
    """GemmNvfp4Up -> its launch. Raises ValueError for what no kernel takes."""
    _check("gemm_nvfp4_up", op, gpu)
    return product(op, max(64, tile_rows(op.M, op.N, gpu.multiprocessors, "Int4")))


def product(op: ctypes.Structure, rows: int) -> list[Launch]:
    """The product with tiles of 64, 128 or 256 tokens, whatever the GPU would choose."""
    blocks = up(op.M, rows) * up(op.N, COLUMNS)
    if blocks > _MOST_BLOCKS:
        raise ValueError("gemm_nvfp4_up: more than 2^31 tiles")
    stages = 2 if rows == 128 else 3
    shared = (rows + COLUMNS) * (stages * _GROUPS * _GROUP_BYTES + _SCALES)
    kernel = kernels.nvfp4_gemm(TYPES[op.param_dtype], rows)
    threads = 2 * THREADS if rows > 128 else THREADS
    return [Launch(kernel, (blocks, 1), threads, shared, (op,))] if blocks else []
