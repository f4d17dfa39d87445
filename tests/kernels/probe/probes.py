"""The probes: operands, one small kernel each, and what has to come out.

A probe gives its operands to `start(kernel, threads, shared, *arguments)`, which runs the kernel of
kernels.cuh with that name: on a GPU (`on_gpu`) or emulated. Arguments are tensors on the CPU, which
it takes where they have to be and brings back, numbers, or a `Tile`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

Start = Callable[..., None]


class Found(NamedTuple):
    """A probe's result. worst: the largest difference, absolute or, of scales, relative."""

    name: str
    wrong: int
    of: int
    worst: float = 0.0


class Tile(NamedTuple):
    """A matrix of bytes, and the size of the boxes that are copied from it."""

    matrix: Tensor
    box_rows: int
    box_bytes: int


def _found(name: str, out: Tensor, expected: Tensor) -> Found:
    """out == expected, element by element; NaN is wrong."""
    difference = (out.double() - expected.double()).abs()
    wrong = int((out.double() != expected.double()).sum())
    return Found(name, wrong, out.numel(), float(difference.nan_to_num(torch.inf).max()))


def _random(low: int, high: int, *shape: int) -> Tensor:
    return torch.randint(low, high, shape, generator=_random.generator)


_random.generator = torch.Generator()


# ---- mma.sync ------------------------------------------------------------------------------------

_LANE = torch.arange(32)
_G, _T = _LANE // 4, _LANE % 4


def _registers(codes: Tensor, bits: int) -> Tensor:
    """Rows of codes (rows, K) as mma.sync wants them: register (lane, half of k, eight rows)."""
    per, blocks = 32 // bits, codes.shape[0] // 8
    words = torch.zeros(32, 2, blocks, dtype=torch.int64)
    for half in range(2):
        for block in range(blocks):
            for i in range(per):
                k = half * 4 * per + per * _T + i
                field = codes[_G + 8 * block, k] & ((1 << bits) - 1)
                words[:, half, block] |= field << (bits * i)
    return words.to(torch.uint32).reshape(32, 2 * blocks)


def _matrix(sums: Tensor) -> Tensor:
    """Sums (lane, 4) -> (16, 8)."""
    out = torch.zeros(16, 8, dtype=sums.dtype)
    for i in range(4):
        out[_G + i // 2 * 8, 2 * _T + i % 2] = sums[:, i]
    return out


def mma(start: Start) -> Iterator[Found]:
    """Layouts and signs of the integer products; int4 is emulated on a Hopper, with the same
    layouts.
    """
    names = (
        "mma.sync m16n8k64 {}4.s4",
        "mma.sync m8n8k32 {}4.s4, four",
        "mma.sync m16n8k32 {}8.s8",
    )
    for kind, name in enumerate(names):
        for is_unsigned in (False, True):
            bits = 8 if kind == 2 else 4
            k, largest = 256 // bits, 1 << (bits - 1)
            low = 0 if is_unsigned else -largest
            a, b = _random(low, low + 2 * largest, 16, k), _random(-largest, largest, 8, k)
            sums = torch.full((32, 4), -1, dtype=torch.int32)
            words = ("false", "true")[is_unsigned]
            registers = _registers(a, bits), _registers(b, bits)
            start(f"multiply<{kind}, {words}>", 32, 0, *registers, sums)
            yield _found(name.format("su"[is_unsigned]), _matrix(sums), a @ b.t() + 7)


def transpose(start: Start) -> Iterator[Found]:
    """stmatrix, transposed."""
    matrices = _random(0, 1 << 16, 4, 8, 8)
    words = torch.zeros(32, 4, dtype=torch.int64)
    for j in range(4):
        words[:, j] = matrices[j, _G, 2 * _T] | matrices[j, _G, 2 * _T + 1] << 16
    out = torch.zeros(4, 8, 8, dtype=torch.uint16)
    start("transpose<4>", 32, 512, words.to(torch.uint32), out)
    yield _found("stmatrix x4, transposed", out.int(), matrices.transpose(1, 2))


# ---- the copy engine -----------------------------------------------------------------------------

BOXES = (
    # rows and bytes of the matrix, rows and bytes of a box, where it begins
    (200, 384, 128, 128, 0, 0),
    (200, 384, 128, 128, 128, 256),
    (300, 96, 256, 64, 0, 64),
    (300, 192, 256, 64, 256, 0),
    (65, 64, 64, 128, 64, 0),
)


def _swizzled(box: Tensor, box_bytes: int) -> Tensor:
    """The box (rows, bytes) where the copy engine puts its bytes."""
    at = torch.arange(box.numel())
    at = at ^ ((at >> 7 & 7) << 4 if box_bytes == 128 else (at >> 7 & 3) << 4)
    out = torch.empty(box.numel(), dtype=box.dtype)
    out[at] = box.flatten()
    return out


def copies(start: Start) -> Iterator[Found]:
    """Both swizzles, and zeros outside of the matrix."""
    for rows, row_bytes, box_rows, box_bytes, row, byte in BOXES:
        matrix = _random(1, 256, rows, row_bytes).to(torch.uint8)
        out = torch.full((box_rows * box_bytes,), 0xFF, dtype=torch.uint8)
        tile = Tile(matrix, box_rows, box_bytes)
        start("copy", 128, 33 * 1024, tile, out, out.numel(), byte, row)
        box = torch.zeros(box_rows, box_bytes, dtype=torch.uint8)
        inside = matrix[row : row + box_rows, byte : byte + box_bytes]
        box[: inside.shape[0], : inside.shape[1]] = inside
        name = f"copy of {box_rows} x {box_bytes} at ({row}, {byte}) of {rows} x {row_bytes}"
        yield _found(name, out, _swizzled(box, box_bytes))


# ---- products of a warpgroup ---------------------------------------------------------------------


def _codes(low: int, high: int, *shape: int) -> tuple[Tensor, Tensor]:
    """Integers, and the same as bytes of e4m3."""
    codes = _random(low, high, *shape)
    return codes, codes.float().to(torch.float8_e4m3fn).view(torch.uint8)


def products(start: Start) -> Iterator[Found]:
    """Group sums are exact, up to the largest; scales are multiplied as exactly as float32 does."""
    for extreme in (False, True):
        a, a_bytes = _codes(-8, -7, 64, 64) if extreme else _codes(-8, 16, 64, 64)
        b, b_bytes = _codes(15, 16, 64, 128) if extreme else _codes(-8, 16, 64, 128)
        weights = _random(-1023, 1024, 64).float() / 1024
        tokens = _random(1, 1 << 23, 64).float() / (1 << 21)
        for first in (0, 64):
            sums, outer = torch.full((2, 64, 64), torch.nan)
            operands = (a_bytes, b_bytes, weights, tokens, sums, outer, first)
            start("products", 128, 9216, *operands)
            which = "the largest" if extreme else "random"
            name = f"e4m3 group sums, {which}, from byte {first}"
            yield _found(name, sums, a @ b[:, first : first + 64].t())
            exact = weights[:, None].double() * tokens.double()
            relative = ((outer - exact).abs() / exact.abs().clamp_min(1e-30)).nan_to_num(torch.inf)
            wrong = int((relative > 4e-7).sum())
            name = f"tf32 rank one, leading offset 0, {which}, from byte {first}"
            yield Found(name, wrong, outer.numel(), float(relative.max()))


def integers(start: Start) -> Iterator[Found]:
    """Sums of bytes in 32-bit integers, up to the largest that a group of 16 * code has."""
    for extreme in (False, True):
        a = _random(-128, -127, 64, 64) if extreme else _random(-128, 128, 64, 64)
        b = _random(-127, -126, 64, 128) if extreme else _random(-127, 128, 64, 128)
        for first in (0, 64):
            sums = torch.full((64, 64), -1, dtype=torch.int32)
            operands = (a.to(torch.int8).view(torch.uint8), b.to(torch.int8).view(torch.uint8))
            start("integers", 128, 9216, *operands, sums, first)
            which = "the largest" if extreme else "random"
            name = f"s8 group sums, {which}, from byte {first}"
            yield _found(name, sums, a @ b[:, first : first + 64].t())


GROUPS = {
    "mma": mma,
    "transpose": transpose,
    "copies": copies,
    "products": products,
    "integers": integers,
}
"""In the order of trust: a group that hangs costs those behind it nothing, each having a process of
its own."""
HOPPER_ONLY = ("transpose", "copies", "products", "integers")


def run(group: str, start: Start) -> Iterator[Found]:
    """The results of one group, on the same operands every time."""
    _random.generator.manual_seed(1)
    yield from GROUPS[group](start)
