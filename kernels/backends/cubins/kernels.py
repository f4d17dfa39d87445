"""Every instance of the GPU kernels: its C++ name, the header that has it, and the architectures
that it is built for.

A name is a C++ expression in the namespaces nibble and nibble::cuda, such as
`gemm_w4a4<Int4, bf16, 128, false, Store>`: what NVRTC is asked for, and what `plans` starts.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import NamedTuple

TYPES = ("float", "f16", "bf16")
"""C++ names, in the order of Dtype in nibble.h."""
HALVES = ("f16", "bf16")
FORMS = ("Form::signed_codes", "Form::unsigned_codes", "Form::rotated")
SIGNS = ("false", "true")
CODES = ("packed", "e4m3", "int8")
"""In the order of Codes in nibble.h."""
W4A16_TILINGS = ("FewTokens", "SomeTokens", "ManyTokens")
VQ_TILINGS = ("VqFewTokens", "VqSomeTokens", "VqManyTokens")
VQ_LAYOUTS = ((6, 4), (8, 4), (6, 2), (8, 2))
"""(bits of an index, columns of a codeword)."""
HOPPER_CODES = CODES[1:]
"""What wgmma multiplies: a byte a code."""
HOPPER_TILES = ((2, 128), (1, 128), (1, 64))
"""(blocks of 128 weight rows, tokens)."""
QUANTIZE_TILES = ((2, 12, 1, 1), (4, 6, 2, 1), (5, 12, 1, 1))
WIDE_QUANTIZE_TILES = ((4, 8, 1, 3), (5, 8, 1, 3))
"""(eights of tokens, warps, blocks on a multiprocessor, tiles of 32 columns of proj_down); the
first takes every type, the others what fits the matrix unit as it is. Wide ones: for ranks over 32.
"""

NVFP4_QUANTIZE_TILES = ((2, 12, 1), (4, 6, 2))
"""(eights of tokens, warps, blocks on a multiprocessor); the first takes every type."""
NVFP4_ROWS = (64, 128, 256)
"""Tokens of a tile."""
W4A8_QUANTIZE_TILES = NVFP4_QUANTIZE_TILES
W4A8_ROWS = (32, 64, 128)


class Kernel(NamedTuple):
    """header: below csrc; name: the C++ expression."""

    header: str
    name: str


def gemm(mma: str, param: str, rows: int, sign: str) -> Kernel:
    return Kernel("cuda/gemm_w4a4/store.cuh", f"gemm_w4a4<{mma}, {param}, {rows}, {sign}, Store>")


def gelu(mma: str, param: str, rows: int, sign: str) -> Kernel:
    epilogue = f"GeluQuantizeDown<{mma}, {param}>"
    return Kernel(
        "cuda/gemm_w4a4/gelu.cuh", f"gemm_w4a4<{mma}, {param}, {rows}, {sign}, {epilogue}>"
    )


def add_tiles(mma: str) -> Kernel:
    return Kernel("cuda/gemm_w4a4/gelu.cuh", f"add_tiles<{mma}>")


def hopper(codes: str, param: str, blocks: int, tokens: int) -> Kernel:
    """codes: one of HOPPER_CODES."""
    name = f"sm90::gemm_kernel<Codes::{codes}, {param}, {blocks}, {tokens}>"
    return Kernel("cuda/gemm_w4a4/sm90/kernel.cuh", name)


def widen(sign: str) -> Kernel:
    return Kernel("cuda/gemm_w4a4/sm90/kernel.cuh", f"sm90::widen_kernel<{sign}>")


def quantize(x: str, param: str, form: str, codes: str, tile: tuple[int, ...]) -> Kernel:
    sizes = ", ".join(map(str, tile))
    return Kernel(
        "cuda/quantize_down/kernel.cuh",
        f"quantize_down_kernel<{x}, {param}, {form}, Codes::{codes}, {sizes}>",
    )


def project(x: str, param: str) -> Kernel:
    return Kernel("cuda/quantize_down/kernel.cuh", f"down_kernel<{x}, {param}>")


def w4a16_gemv(x: str, param: str, tokens: int) -> Kernel:
    return Kernel("cuda/w4a16/gemv.cuh", f"gemv_kernel<{x}, {param}, {tokens}>")


def w4a16_gemm(x: str, param: str, tiling: str) -> Kernel:
    return Kernel("cuda/w4a16/gemm.cuh", f"w4a16_gemm_kernel<{x}, {param}, {tiling}>")


def vq_gemv(x: str, layout: tuple[int, int], tokens: int) -> Kernel:
    return Kernel(
        "cuda/vq/gemv.cuh", f"vq_gemv_kernel<{x}, Layout<{layout[0]}, {layout[1]}>, {tokens}>"
    )


def vq_gemm(x: str, layout: tuple[int, int], tiling: str) -> Kernel:
    return Kernel(
        "cuda/vq/gemm.cuh", f"vq_gemm_kernel<{x}, {tiling}<Layout<{layout[0]}, {layout[1]}>>>"
    )


def nvfp4_quantize(x: str, param: str, tile: tuple[int, ...]) -> Kernel:
    sizes = ", ".join(map(str, tile))
    return Kernel("cuda/nvfp4/quantize.cuh", f"quantize_nvfp4_kernel<{x}, {param}, {sizes}>")


def nvfp4_gemm(param: str, rows: int) -> Kernel:
    return Kernel("cuda/nvfp4/gemm.cuh", f"nvfp4::gemm_kernel<{param}, {rows}>")


def w4a8_quantize(x: str, param: str, form: str, tile: tuple[int, ...]) -> Kernel:
    sizes = ", ".join(map(str, tile))
    name = f"w4a8::quantize_tokens_kernel<{x}, {param}, {form}, {sizes}>"
    return Kernel("cuda/w4a8/quantize.cuh", name)


def w4a8_gemm(turing: bool, param: str, rows: int) -> Kernel:
    return Kernel("cuda/w4a8/gemm.cuh", f"w4a8::w4a8_gemm_kernel<{SIGNS[turing]}, {param}, {rows}>")


# ---- architectures -------------------------------------------------------------------------------

MMAS = {"75": "Turing", "80": "Int4", "86": "Int4", "89": "Int4", "90a": "Int8"}
"""How an architecture multiplies 4-bit codes with mma.sync; Int8 in all that are not named."""


def act8(mma: str) -> str:
    """The same for activations of 8 bits, where 4-bit codes are multiplied by `mma`."""
    return "TuringAct8" if mma == "Turing" else "Act8"


PTX = "ptx80"
"""Text that a driver compiles for GPUs that none of the cubins fits."""
ARCHITECTURES = ("75", "80", "86", "89", "90a", "100f", "120f", PTX)
"""What a package carries."""


def architecture(capability: int) -> str:
    """The cubin that a GPU of 10 * major + minor runs: code of a GPU's own major version and a
    minor version that is not later, of a family (f), or of the chip itself (a).
    """
    if capability < 80:
        return "75"
    if capability < 90:
        return {86: "86", 87: "86", 89: "89"}.get(capability, "80")
    if capability < 100:
        return "90a"
    return {10: "100f", 12: "120f"}.get(capability // 10, PTX)


def multiplies_nvfp4(arch: str) -> bool:
    """Whether an architecture has block-scaled products of 4-bit floats by mma.sync."""
    return arch[-1] in "af" and arch[:2] == "12"


def fits_as_it_is(x: str, param: str) -> bool:
    """Whether the matrix unit multiplies x and proj_down without splitting either into terms."""
    return x == param != "float"


def of(arch: str) -> Iterator[Kernel]:
    """Every kernel that an architecture can be asked for."""
    mma = MMAS.get(arch, "Int8")
    yield from _products(mma)
    yield from _act8_products(act8(mma))
    for codes in ("packed", "int8"):
        yield from _quantizers(codes, arch)
    yield from _w4a8(arch)
    if arch == "75":
        yield from (project(x, p) for x in TYPES for p in HALVES if (x, p) != ("f16", "f16"))
    if arch == "90a":
        yield from _quantizers("e4m3", arch)
        forms = itertools.product(HOPPER_CODES, HALVES, HOPPER_TILES)
        yield from (hopper(codes, p, *tile) for codes, p, tile in forms)
        yield from map(widen, SIGNS)
    if multiplies_nvfp4(arch):
        yield from (nvfp4_gemm(p, rows) for p in HALVES for rows in NVFP4_ROWS)
        for x, param in itertools.product(TYPES, HALVES):
            tiles = NVFP4_QUANTIZE_TILES[: 1 + fits_as_it_is(x, param)]
            yield from (nvfp4_quantize(x, param, tile) for tile in tiles)
    halves = ("f16",) if arch == "75" else HALVES  # Turing multiplies float16 alone
    yield from (w4a16_gemv(x, p, t) for x in TYPES for p in HALVES for t in (1, 2, 4))
    yield from (w4a16_gemm(x, p, t) for x in halves for p in HALVES for t in W4A16_TILINGS)
    for layout in VQ_LAYOUTS:
        yield from (vq_gemv(x, layout, t) for x in TYPES for t in (1, 4) if (x, t) != ("f16", 4))
        yield from (vq_gemm(x, layout, t) for x in halves for t in VQ_TILINGS)


def tile_heights(mma: str) -> tuple[int, ...]:
    """Tokens of a tile of the product by mma.sync, every height that there is."""
    return (32, 64, 128, 256) if mma == "Int4" else (32, 64, 128)


def gelu_rows(mma: str) -> int:
    """Tokens of the fused op's tall tile: widened fragments need more registers."""
    return 128 if mma in ("Turing", "Int4") else 64


def _products(mma: str) -> Iterator[Kernel]:
    for param, sign in itertools.product(HALVES, SIGNS):
        yield from (gemm(mma, param, rows, sign) for rows in tile_heights(mma))
        yield from (gelu(mma, param, rows, sign) for rows in (32, gelu_rows(mma)))
    yield add_tiles(mma)


def _act8_products(mma: str) -> Iterator[Kernel]:
    """Codes of 8 bits have both signs."""
    for param in HALVES:
        yield from (gemm(mma, param, rows, "false") for rows in tile_heights(mma))
        yield from (gelu(mma, param, rows, "false") for rows in (32, gelu_rows(mma)))
    yield add_tiles(mma)


def _w4a8(arch: str) -> Iterator[Kernel]:
    yield from (w4a8_gemm(arch == "75", p, rows) for p in HALVES for rows in W4A8_ROWS)
    for x, param, form in itertools.product(TYPES, HALVES, (FORMS[0], FORMS[2])):
        tiles = W4A8_QUANTIZE_TILES[: 1 + fits_as_it_is(x, param)]
        yield from (w4a8_quantize(x, param, form, tile) for tile in tiles)


def wide_quantize_tiles(codes: str) -> tuple[tuple[int, int, int, int], ...]:
    """Those of WIDE_QUANTIZE_TILES for codes; 40 tokens of int8 would spill registers on 12.0."""
    return WIDE_QUANTIZE_TILES[:1] if codes == "int8" else WIDE_QUANTIZE_TILES


def _quantizers(codes: str, arch: str) -> Iterator[Kernel]:
    wide = () if arch == "75" else wide_quantize_tiles(codes)
    for x, param, form in itertools.product(TYPES, HALVES, FORMS):
        every = (*QUANTIZE_TILES, *wide)
        tiles = every if fits_as_it_is(x, param) else every[:1]
        yield from (quantize(x, param, form, codes, tile) for tile in tiles)
