"""Every op in plain torch, one file an op family: the truth that the compiled versions are compared
with, and what runs where nothing faster is installed. It runs in float64 too.

    w4a4      4-bit weights and activations with a low-rank branch (SVDQuant)
    w4a16     4-bit weights alone (AWQ)
    vq        codebook weights (VQ4DiT); not exported here, as its names are of another subject
    w4a8      4-bit weights read as int8, activations of 8 bits; like vq
    nvfp4     4-bit floats with a low-rank branch; not exported either
    nibbles   4-bit codes: packing and dequantizing; the dtypes of arithmetic
    hadamard  the 64-point rotation
"""

from .hadamard import hadamard64
from .nibbles import (
    FLIP_HIGHEST_BITS,
    GROUP,
    compute_dtype,
    dequantize_w4,
    dequantize_w4_zeros,
    operand_dtype,
    pack_nibbles,
    unpack_nibbles,
)
from .w4a4 import (
    ACT_BITS,
    SHIFT,
    SIGNED_MAX,
    UNSIGNED_MAX,
    check_flags,
    gemm_w4a4_up,
    gemm_w4a4_up_gelu_quantize_down,
    linear_w4a4,
    linear_w4a4_grad,
    linear_w4a4_grouped,
    mlp_w4a4,
    quantize_down,
)
from .w4a16 import gemm_w4a16, gemv_w4a16, linear_w4a16_grad

__all__ = [
    "ACT_BITS",
    "FLIP_HIGHEST_BITS",
    "GROUP",
    "SHIFT",
    "SIGNED_MAX",
    "UNSIGNED_MAX",
    "check_flags",
    "compute_dtype",
    "dequantize_w4",
    "dequantize_w4_zeros",
    "gemm_w4a4_up",
    "gemm_w4a4_up_gelu_quantize_down",
    "gemm_w4a16",
    "gemv_w4a16",
    "hadamard64",
    "linear_w4a4",
    "linear_w4a4_grad",
    "linear_w4a4_grouped",
    "linear_w4a16_grad",
    "mlp_w4a4",
    "operand_dtype",
    "pack_nibbles",
    "quantize_down",
    "unpack_nibbles",
]
