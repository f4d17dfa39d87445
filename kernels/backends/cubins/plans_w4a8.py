"""From an op's struct to the kernels that compute it, for weights that are read as int8: what
csrc/cuda/w4a8/ and router.cu decide for the compiled extension. As `plans`, which has the rest.
"""

from __future__ import annotations

import ctypes

from . import kernels
from .kernels import TYPES
from .plans import COLUMNS, THREADS, Gpu, Launch, tile_rows, up
from .structs import F32, GROUP, INT8, GemmW4A4Up, QuantizeDown, W4A8Levels

_DOWN_COLUMNS = 32
_MOST_BLOCKS = 2**31 - 1
_MOST_SCALES = GROUP // 16


def _aligned(size: int) -> int:
    return (size + 255) & ~255


def _places(m: int, k: int) -> tuple[int, int]:
    """Where ascales and h begin behind the codes, in the op's scratch memory."""
    ascales = _aligned(m * k)
    return ascales, ascales + _aligned(m * 4)


def scratch_bytes(m: int, k: int, rank: int) -> int:
    """Bytes of codes, a scale a token, and h."""
    return _places(m, k)[1] + _aligned(m * rank * 4)


def linear_w4a8(op: ctypes.Structure, gpu: Gpu, rows: int = 0) -> list[Launch]:
    """LinearW4A8 -> its launches, the product's last. rows: tokens of a tile, 0 for what the GPU
    would choose. Raises ValueError for what no kernel takes.
    """
    if op.param_dtype == F32:
        raise ValueError("linear_w4a8: on a GPU parameters are float16 or bfloat16, not float32")
    if not op.M or not op.N:
        return []
    scratch = op.scratch or 0
    ascales, h = (scratch + place for place in _places(op.M, op.K))
    shared = {name: getattr(op, name) for name in ("M", "K", "R", "param_dtype")}
    shared |= {"codes": INT8, "q": scratch, "ascales": ascales, "h": h}
    tokens = {name: getattr(op, name) for name in ("x", "x_stride", "x_dtype", "smooth", "rotate")}
    quantizer = QuantizeDown(**shared, **tokens, proj_down=op.proj_down)
    names = ("N", "weight", "weight_scale", "proj_up", "bias", "out")
    layer = {name: getattr(op, name) for name in names}
    product = GemmW4A4Up(**shared, **layer, h_stride=op.R, out_dtype=op.x_dtype)
    levels = W4A8Levels(op.channel_scale, op.table, op.group)
    rows = rows or tile_rows(op.M, op.N, gpu.multiprocessors, "Int8")
    return [*quantize_tokens(quantizer, gpu), _product(product, levels, gpu, rows)]


def quantize_tokens(op: ctypes.Structure, gpu: Gpu) -> list[Launch]:
    """QuantizeDown with a scale a token -> its launches: one, and on Turing another for a
    projection that is not float16 throughout.
    """
    x, param = TYPES[op.x_dtype], TYPES[op.param_dtype]
    launches = []
    if gpu.capability < 80 and (x, param) != ("f16", "f16") and op.R:
        grid = (up(op.M, 32), up(op.R, _DOWN_COLUMNS))
        shared = (32 * 68 + GROUP * 32) * 4
        launches.append(Launch(kernels.project(x, param), grid, 256, shared, (op,)))
        op = QuantizeDown.from_buffer_copy(op)
        op.R = 0
    few, many = kernels.W4A8_QUANTIZE_TILES
    # As in quantize_nvfp4_down.
    busy = up(op.M, 32) * 4 >= gpu.multiprocessors * 3
    tile = many if kernels.fits_as_it_is(x, param) and busy else few
    eights, warps, _ = tile
    sums = warps * 8 * eights * (_DOWN_COLUMNS + 4) * 4
    shared = max(warps * (GROUP * _DOWN_COLUMNS * 2 + 8 * 80), sums)
    grid = (up(op.M, 8 * eights), up(op.R, _DOWN_COLUMNS) or 1)
    form = kernels.FORMS[2 if op.rotate else 0]
    kernel = kernels.w4a8_quantize(x, param, form, tile)
    return [*launches, Launch(kernel, grid, 32 * warps, shared, (op,))]


def _product(op: ctypes.Structure, levels: ctypes.Structure, gpu: Gpu, rows: int) -> Launch:
    blocks = up(op.M, rows) * up(op.N, COLUMNS)
    if blocks > _MOST_BLOCKS:
        raise ValueError("linear_w4a8: more than 2^31 tiles")
    stage = rows * 64 + COLUMNS * 32 + _MOST_SCALES * COLUMNS
    turing = gpu.capability < 80
    deep = 4 if rows == 32 else 3
    kernel = kernels.w4a8_gemm(turing, TYPES[op.param_dtype], rows)
    return Launch(kernel, (blocks, 1), THREADS, (2 if turing else deep) * stage, (op, levels))
