"""From an op's struct to the kernels that compute it: instance, grid, threads, shared memory.

What csrc/cuda/router.cu and the launch files decide for the compiled extension, for cubins. Tests
run both for the same structs and compare every launch, so neither can drift.

Ops whose activations keep their 16 bits are in `plans_w16`.

Routes are numbered by the path of the product: 0 the one for the GPU, 1 sm75, 2 sm80, 3 sm90 and 4
sm100. Any route can be asked for by name where its kernels exist for the architecture.
"""

from __future__ import annotations

import ctypes
from typing import NamedTuple

from . import kernels
from .kernels import TYPES, Kernel
from .structs import E4M3, F32, GROUP, INT8, PACKED, HopperProduct, QuantizeDown

THREADS = 128
COLUMNS = 128
_DOWN_COLUMNS = 32
_MOST_BLOCKS = 2**31 - 1
_EMPTY = (ctypes.c_byte * 1)()  # an empty struct by value


class Gpu(NamedTuple):
    """capability: 10 * major + minor; multiprocessors: how many it has."""

    capability: int
    multiprocessors: int

    @property
    def mma(self) -> str:
        """How its matrix unit multiplies 4-bit codes, or 8-bit ones in their place."""
        if self.capability < 80:
            return "Turing"
        return "Int4" if self.capability < 90 else "Int8"

    @property
    def hopper(self) -> bool:
        return self.capability // 10 == 9


class Matrix(NamedTuple):
    """A row-major matrix of bytes, as Hopper's copy engine is told of it: tiles of box_rows x
    box_bytes, swizzled; what lies outside arrives as zeros.
    """

    base: int
    rows: int
    row_bytes: int
    box_rows: int
    box_bytes: int


class Launch(NamedTuple):
    """arguments: ctypes values, or a Matrix, in the kernel's order. waits: the kernel waits itself
    for the one before it on the stream, and may be started while that runs.
    """

    kernel: Kernel
    grid: tuple[int, int]
    threads: int
    shared: int
    arguments: tuple
    waits: bool = False


def up(value: int, divisor: int) -> int:
    """value / divisor, rounded up."""
    return -(-value // divisor)


# ---- W4A4: the product ---------------------------------------------------------------------------


def tile_rows(m: int, n: int, multiprocessors: int, mma: str) -> int:
    """The height of a tile: as low as the tokens, and tall only where all multiprocessors have
    work (two blocks live on each). Not yet measured: the reasons are arithmetic.
    """
    if m <= 32:
        return 32
    if m <= 64 or up(m, 128) * up(n, COLUMNS) < 2 * multiprocessors:
        return 64
    return 256 if mma == "Int4" and _tallest_pays(m, n, multiprocessors) else 128


def _tallest_pays(m: int, n: int, multiprocessors: int) -> bool:
    """Whether tiles of 256 tokens beat those of 128 with int4: by what each asks of the L2 cache
    (a tenth, an estimate), and by the rows that the busiest multiprocessor gets.
    """

    def cost(rows: int, percent: int) -> int:
        return up(up(m, rows) * up(n, COLUMNS), multiprocessors) * rows * percent

    return cost(256, 100) < cost(128, 110)


def _ring_bytes(mma: str, rows: int) -> int:
    """A stage holds both operands of a group and their scales; a ring has two to four stages of
    one or two groups.
    """
    wide = mma in ("Act8", "TuringAct8")
    group = rows * (64 if wide else 32) + COLUMNS * 32 + rows * 4 + COLUMNS * 2
    if mma in ("Turing", "TuringAct8"):
        return 2 * group
    if wide:
        return {32: 3 * 2, 64: 2 * 2, 128: 3}[rows] * group
    return {32: 4, 256: 3}.get(rows, 2) * 2 * group


def _check_product(op: ctypes.Structure) -> None:
    if op.codes == E4M3:
        raise ValueError("gemm_w4a4_up: here the codes must be packed or int8")
    if op.param_dtype == F32:
        raise ValueError("gemm_w4a4_up: on a GPU parameters are float16 or bfloat16, not float32")


def _product_launch(
    kernel: Kernel, op: ctypes.Structure, rows: int, shared: int, epilogue: object
) -> list[Launch]:
    blocks = up(op.M, rows) * up(op.N, COLUMNS)
    if blocks > _MOST_BLOCKS:
        raise ValueError("gemm_w4a4_up: more than 2^31 tiles")
    threads = 2 * THREADS if rows > 128 else THREADS
    return [Launch(kernel, (blocks, 1), threads, shared, (op, epilogue))] if blocks else []


def _sign(is_unsigned: bool) -> str:
    return kernels.SIGNS[bool(is_unsigned)]


def _mma_and_sign(op: ctypes.Structure, mma: str) -> tuple[str, str]:
    """How a product's codes are multiplied where those of 4 bits are by `mma`, and their sign:
    codes of 8 bits have both.
    """
    if op.codes == INT8:
        return kernels.act8(mma), _sign(False)
    return mma, _sign(op.act_unsigned)


def gemm_w4a4_up(op: ctypes.Structure, gpu: Gpu) -> list[Launch]:
    """GemmW4A4Up -> its launches. Raises ValueError for what no kernel takes."""
    if gpu.hopper:
        return hopper(op, gpu)
    mma = _mma_and_sign(op, gpu.mma)[0]
    return mma_product(op, gpu.mma, tile_rows(op.M, op.N, gpu.multiprocessors, mma))


def mma_product(op: ctypes.Structure, mma: str, rows: int) -> list[Launch]:
    """The product by mma.sync, whatever the GPU would choose. mma: of 4-bit codes; rows: 32, 64,
    128; with Int4 256.
    """
    _check_product(op)
    mma, sign = _mma_and_sign(op, mma)
    kernel = kernels.gemm(mma, TYPES[op.param_dtype], rows, sign)
    return _product_launch(kernel, op, rows, _ring_bytes(mma, rows), _EMPTY)


def gemm_w4a4_up_gelu_quantize_down(op: ctypes.Structure, gpu: Gpu, mma: str = "") -> list[Launch]:
    """GemmW4A4UpGeluQuantizeDown -> its launches: the product, and its tiles' parts of h added.
    mma: another product than the GPU's own.
    """
    first = op.first
    _check_product(first)
    mma, sign = _mma_and_sign(first, mma or gpu.mma)
    rows = kernels.gelu_rows(mma) if first.M > 32 else 32
    kernel = kernels.gelu(mma, TYPES[first.param_dtype], rows, sign)
    staged = 2 * 16 * (64 + 4) * 4  # h of a round, of two warps
    launches = _product_launch(kernel, first, rows, max(_ring_bytes(mma, rows), staged), op)
    count = first.M * op.R2
    if count:
        sizes = (ctypes.c_int64(count), ctypes.c_int(up(first.N, COLUMNS)))
        addresses = (ctypes.c_void_p(op.workspace), ctypes.c_void_p(op.h2))
        launches.append(
            Launch(kernels.add_tiles(mma), (up(count, 256), 1), 256, 0, (*addresses, *sizes))
        )
    return launches


def gelu_workspace(m: int, n: int, rank: int) -> int:
    """Bytes of scratch of the fused op: one h (M, R2) in float32 for each tile of 128 columns."""
    return m * rank * up(n, COLUMNS) * 4


# ---- W4A4: Hopper's product ----------------------------------------------------------------------


def hopper_workspace(codes: int, m: int, k: int) -> int:
    """Bytes of scratch of Hopper's product: packed codes are widened first."""
    return m * k if codes == PACKED else 0


def hopper_tile(m: int, n: int, multiprocessors: int) -> tuple[int, int]:
    """(blocks of 128 rows, tokens) of the tile that needs the least time by count: rounds over all
    multiprocessors, times a tile's size, times what a smaller one costs more for the bytes that it
    brings in (an estimate; sm90/launch.cu says from what).
    """
    costs = {}
    for (blocks, tokens), percent in zip(kernels.HOPPER_TILES, (100, 120, 160), strict=True):
        tiles = up(n, 128 * blocks) * up(m, tokens)
        costs[blocks, tokens] = up(tiles, multiprocessors) * 128 * blocks * tokens * percent
    return min(costs, key=lambda tile: costs[tile])


def _hopper_shared(blocks: int, tokens: int) -> int:
    """Four stages (activations, weights, both scales of two groups), two warpgroups' results on
    their way out, and the barriers.
    """
    rows = 128 * blocks
    stage = tokens * 128 + rows * 64 + 2 * tokens * 16 + 2 * rows * 4
    staging = 64 * (64 * blocks) * 2
    return 4 * stage + 2 * staging + 2 * 4 * 8


def hopper(op: ctypes.Structure, gpu: Gpu) -> list[Launch]:
    """The wgmma product; packed codes are widened first."""
    if op.param_dtype == F32:
        raise ValueError("on a GPU parameters are bfloat16 or float16")
    if not op.M or not op.N:
        return []
    launches, codes = [], op.q
    if op.codes == PACKED and op.K:
        blocks = op.M * op.K // 32
        grid = (min(up(blocks, 256), 16 * gpu.multiprocessors), 1)
        addresses = (ctypes.c_void_p(op.q), ctypes.c_void_p(op.workspace))
        kernel = kernels.widen(_sign(op.act_unsigned))
        across = (ctypes.c_int(op.K // 32), ctypes.c_int(op.unsigned_from // 32))
        sizes = (ctypes.c_int64(blocks), *across)
        launches.append(Launch(kernel, grid, 256, 0, (*addresses, *sizes)))
        codes = op.workspace
    blocks, tokens = hopper_tile(op.M, op.N, gpu.multiprocessors)
    return [*launches, hopper_product(op, codes, (blocks, tokens), gpu)]


def hopper_product(
    op: ctypes.Structure, codes: int | None, tile: tuple[int, int], gpu: Gpu
) -> Launch:
    """The wgmma product with one tile, whatever would be chosen; codes: address of bytes."""
    (blocks, tokens), param = tile, TYPES[op.param_dtype]
    across = up(op.N, 128 * blocks)
    tiles = across * up(op.M, tokens)
    parameters = HopperProduct(
        M=op.M,
        N=op.N,
        K=op.K,
        R=op.R,
        across=across,
        tiles=tiles,
        ascales=op.ascales,
        h=op.h,
        h_stride=op.h_stride,
        weight_scale=op.weight_scale,
        proj_up=op.proj_up,
        bias=op.bias,
        out=op.out,
        out_dtype=op.out_dtype,
        paired=op.R % 2 == 0 and op.h_stride % 2 == 0 and (op.h or 0) % 8 == 0,
    )
    activations = weights = Matrix(0, 0, 0, 0, 0)
    if op.K:
        activations = Matrix(codes or 0, op.M, op.K, tokens, 128)
        weights = Matrix(op.weight or 0, op.N, op.K // 2, 128 * blocks, 64)
    grid = (min(tiles, gpu.multiprocessors), 1)
    arguments = (activations, weights, parameters)
    form = kernels.CODES[INT8 if op.codes == INT8 else E4M3]
    kernel = kernels.hopper(form, param, *tile)
    return Launch(kernel, grid, 384, _hopper_shared(blocks, tokens), arguments)


# ---- W4A4: the quantizer -------------------------------------------------------------------------


def _quantize_tile(op: ctypes.Structure, fits: bool, gpu: Gpu) -> tuple[int, int, int, int]:
    """Tokens of a block in eights, its warps, blocks on a multiprocessor, and tiles of 32 columns
    of proj_down.
    """
    low, middle, high = kernels.QUANTIZE_TILES
    m = op.M
    # Three quarters of the multiprocessors busy with twice the tokens are as fast, and read
    # proj_down half as often.
    if not fits or up(m, 32) * 4 < gpu.multiprocessors * 3:
        return low

    def busiest(tokens: int) -> int:
        """Tokens that the busiest multiprocessor gets."""
        return up(up(m, tokens), gpu.multiprocessors) * tokens

    # The highest and the wide ones take 69 KB, more than Turing has.
    if gpu.capability < 80:
        return middle
    fewer = busiest(40) < busiest(32)
    if op.R > _DOWN_COLUMNS:
        wide = kernels.wide_quantize_tiles(kernels.CODES[op.codes])
        return wide[fewer and len(wide) > 1]
    return high if fewer else middle


def quantize_down(op: ctypes.Structure, gpu: Gpu) -> list[Launch]:
    """QuantizeDown -> its launches: one, and on Turing another for a projection in bfloat16."""
    if op.param_dtype == F32:
        raise ValueError("quantize_down on a GPU takes parameters in bfloat16 or float16")
    if op.codes == E4M3 and not gpu.hopper:
        raise ValueError(
            "quantize_down makes 8-bit float codes on GPUs of compute capability 9.0 only"
        )
    if not op.M:
        return []
    x, param = TYPES[op.x_dtype], TYPES[op.param_dtype]
    launches, rank = [], op.R
    if gpu.capability < 80 and (x, param) != ("f16", "f16") and rank:
        grid = (up(op.M, 32), up(rank, _DOWN_COLUMNS))
        shared = (32 * 68 + GROUP * 32) * 4
        launches.append(Launch(kernels.project(x, param), grid, 256, shared, (op,)))
        op = QuantizeDown.from_buffer_copy(op)
        op.R = rank = 0
    form = kernels.FORMS[1 if op.act_unsigned else 2 if op.rotate else 0]
    tile = _quantize_tile(op, kernels.fits_as_it_is(x, param), gpu)
    eights, warps, _, tiles = tile
    sums = warps * 8 * eights * (_DOWN_COLUMNS + 4) * 4
    buffers = 2 if tiles > 1 else 1
    shared = max(warps * (buffers * GROUP * _DOWN_COLUMNS * 2 + 8 * 80), sums)
    kernel = kernels.quantize(x, param, form, kernels.CODES[op.codes], tile)
    grid = (up(op.M, 8 * eights), up(rank, tiles * _DOWN_COLUMNS) or 1)
    return [*launches, Launch(kernel, grid, 32 * warps, shared, (op,))]
