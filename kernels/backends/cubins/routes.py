"""The paths of the W4A4 product by number, so that each of them, and each tile of them, can be
asked for on one GPU.

    1 sm75     int4 m8n8k32       1032, 1064, 1128   the same with tiles of so many tokens
    2 sm80     int4 m16n8k64      2032, 2064, 2128, 2256
    3 sm90     wgmma, 8-bit floats or int8    3001, 3002, 3003   its tiles, the largest first
    4 sm100    int8 m16n8k32      4032, 4064, 4128

0 is what the GPU itself would get. ptxas makes int4 products for later GPUs out of other
instructions (slow, and right), so a Hopper has all of them.
"""

from __future__ import annotations

import ctypes

from . import kernels, plans
from .plans import Gpu, Launch
from .structs import E4M3, INT8, PACKED

PATHS = {1: "sm75", 2: "sm80", 3: "sm90", 4: "sm100"}
HOPPER = 3
MMAS = {1: "Turing", 2: "Int4", 4: "Int8"}
_HOPPER_TILES = dict(enumerate(kernels.HOPPER_TILES, 3001))


def path_of(route: int) -> int:
    """The path that a route belongs to, 0 for none in particular."""
    return route // 1000 or route


def codes_of(route: int, capability: int) -> int:
    """The form of 4-bit activation codes that a route reads."""
    wide = capability // 10 == 9 and path_of(route) in (0, HOPPER)
    return E4M3 if wide else PACKED


def _paths(capability: int) -> list[int]:
    if capability < 80:
        return [1]
    if capability < 90:
        return [1, 2]
    return [1, 2, 3, 4] if capability // 10 == 9 else [1, 2, 4]


def of(op: str, capability: int) -> dict[int, str]:
    """Number -> name of the routes that an op has on a GPU; where there is one way only, it has no
    number of its own. The fused MLP op chooses its tiles itself.
    """
    if op == "gemm_w4a4_up_gelu_quantize_down":
        return {path: PATHS[path] for path in _paths(capability) if path in MMAS}
    if op != "gemm_w4a4_up":
        return {0: "cuda"}
    found = {}
    for path in _paths(capability):
        found[path] = PATHS[path]
        if path in MMAS:
            heights = kernels.tile_heights(MMAS[path])
            found |= {1000 * path + rows: f"{PATHS[path]}, {rows} tokens" for rows in heights}
    if HOPPER in found:
        for number, (blocks, tokens) in _HOPPER_TILES.items():
            found[number] = f"sm90, {128 * blocks} x {tokens}"
    return found


def check(op: str, route: int, capability: int) -> None:
    """Raises ValueError for a route that an op does not have on a GPU."""
    known = of(op, capability)
    if route and route not in known:
        listed = ", ".join(f"{number} ({name})" for number, name in known.items())
        raise ValueError(f"{op}: route {route} is none of {listed}")


def product(op: ctypes.Structure, gpu: Gpu, route: int) -> list[Launch]:
    """GemmW4A4Up by a route -> its launches. Raises ValueError for one that the GPU has not."""
    if not route:
        return plans.gemm_w4a4_up(op, gpu)
    check("gemm_w4a4_up", route, gpu.capability)
    if path_of(route) == HOPPER:
        return _hopper(op, gpu, route)
    mma = MMAS[path_of(route)]
    multiplied = kernels.act8(mma) if op.codes == INT8 else mma
    chosen = plans.tile_rows(op.M, op.N, gpu.multiprocessors, multiplied)
    return plans.mma_product(op, mma, route % 1000 if route >= 1000 else chosen)


def w4a8_rows(route: int) -> int:
    """Tokens of a tile of linear_w4a8 by a route: one of kernels.W4A8_ROWS, or 0, the GPU's own
    choice, which a path of W4A4 that is set for a whole process leaves alone. Raises ValueError.
    """
    if route in kernels.W4A8_ROWS:
        return route
    if route and path_of(route) not in PATHS:
        heights = ", ".join(map(str, kernels.W4A8_ROWS))
        raise ValueError(f"linear_w4a8: route {route} is none of {heights}")
    return 0


def _hopper(op: ctypes.Structure, gpu: Gpu, route: int) -> list[Launch]:
    """The wgmma product, with the tile that a route names in place of the one that is chosen."""
    launches = plans.hopper(op, gpu)
    if not launches or route not in _HOPPER_TILES:
        return launches
    widened = op.codes == PACKED and op.K
    codes = op.workspace if widened else op.q
    return [*launches[:-1], plans.hopper_product(op, codes, _HOPPER_TILES[route], gpu)]


def fused(op: ctypes.Structure, gpu: Gpu, route: int) -> list[Launch]:
    """GemmW4A4UpGeluQuantizeDown by a route -> its launches. Raises ValueError as `product`."""
    check("gemm_w4a4_up_gelu_quantize_down", route, gpu.capability)
    return plans.gemm_w4a4_up_gelu_quantize_down(op, gpu, MMAS.get(route, ""))
