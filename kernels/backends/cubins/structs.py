"""The structs of csrc/nibble.h, as ctypes lays them out; tests compare their sizes with the
compiler's.
"""

import ctypes

SIZE = ctypes.c_int64
POINTER = ctypes.c_void_p
INT = ctypes.c_int
BOOL = ctypes.c_bool
F32, F16, BF16 = 0, 1, 2
PACKED, E4M3, INT8 = 0, 1, 2
GROUP = 64


def struct(name: str, fields: str) -> type[ctypes.Structure]:
    """A struct of fields "name:kind", kind i (int64), p (pointer), e (int, enum) or b (bool)."""
    kinds = {"i": SIZE, "p": POINTER, "e": INT, "b": BOOL}
    pairs = [field.split(":") for field in fields.split()]
    members = {"_fields_": [(field, kinds[kind]) for field, kind in pairs]}
    return type(name, (ctypes.Structure,), members)


QuantizeDown = struct(
    "QuantizeDown",
    "M:i K:i R:i x:p x_stride:i x_dtype:e smooth:p proj_down:p param_dtype:e act_unsigned:b"
    " rotate:b unsigned_from:i codes:e q:p ascales:p h:p",
)
GemmW4A4Up = struct(
    "GemmW4A4Up",
    "M:i N:i K:i R:i codes:e q:p act_unsigned:b unsigned_from:i ascales:p h:p h_stride:i weight:p"
    " weight_scale:p proj_up:p bias:p param_dtype:e out:p out_dtype:e workspace:p",
)
W4A16 = struct(
    "W4A16",
    "M:i N:i K:i x:p x_dtype:e weight:p weight_scale:p weight_zeros:p bias:p param_dtype:e out:p",
)
GemmVQ = struct(
    "GemmVQ",
    "M:i N:i K:i bits:e vector:e x:p x_dtype:e indices:p codebook:p codebook_dtype:e scale:p bias:p"
    " param_dtype:e addend:p addend_dtype:e out:p out_dtype:e",
)
LinearW4A8 = struct(
    "LinearW4A8",
    "M:i N:i K:i R:i group:i x:p x_stride:i x_dtype:e smooth:p proj_down:p weight:p weight_scale:p"
    " channel_scale:p table:p proj_up:p bias:p param_dtype:e rotate:b out:p scratch:p",
)
QuantizeNvfp4Down = struct(
    "QuantizeNvfp4Down",
    "M:i K:i R:i x:p x_stride:i x_dtype:e smooth:p proj_down:p param_dtype:e rounded:b q:p"
    " ascales:p h:p",
)
GemmNvfp4Up = struct(
    "GemmNvfp4Up",
    "M:i N:i K:i R:i q:p ascales:p h:p weight:p weight_scale:p weight_scale_2:p proj_up:p bias:p"
    " param_dtype:e out:p out_dtype:e",
)
W4A8Levels = struct("W4A8Levels", "channel_scale:p table:p group:i")
"""`w4a8::Levels` of csrc/cuda/w4a8/gemm.cuh."""
HopperProduct = struct(
    "HopperProduct",
    "M:e N:e K:e R:e across:e tiles:e ascales:p h:p h_stride:i weight_scale:p proj_up:p bias:p"
    " out:p out_dtype:e paired:b",
)
"""`sm90::Parameters` of csrc/cuda/gemm_w4a4/sm90/tile.cuh."""


class GemmW4A4UpGeluQuantizeDown(ctypes.Structure):
    """The first layer's struct, and what the fused epilogue needs of the second."""

    _fields_ = [
        ("first", GemmW4A4Up),
        ("R2", SIZE),
        ("smooth2", POINTER),
        ("proj_down2", POINTER),
        ("act_unsigned2", BOOL),
        ("rotate2", BOOL),
        ("codes2", INT),
        ("q2", POINTER),
        ("ascales2", POINTER),
        ("h2", POINTER),
        ("workspace", POINTER),
    ]
