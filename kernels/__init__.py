"""kernels/ - the arithmetic. Knows tensors, not models; imports torch, and nibble_kernels, Triton
and comfy_kitchen where they are installed.

The shape alphabet, used in every signature, comment and test:

    M tokens · K in · N out · R rank · G group (64 columns share a scale) · C codewords · D
    sub-vector

`ops` holds every op once, one file an op family; `params` the parameters of each op as a record;
`reference` is the truth in plain torch; `backends` decides what runs an op and holds the three
ways to run faster: compiled kernels, Triton's and comfy-kitchen's. `which(op, device)` says which
one is used and why. `activations` says where 8 bits of them cost nothing; `preparation` has GPU
kernels compiled ahead; `environment` tells what a machine has; `optional` imports what can be done
without.
"""

from .activations import ActBits, act_bits
from .ops import (
    fuses_mlp,
    gemm_vq,
    gemm_w4a4_up,
    gemm_w4a4_up_gelu_quantize_down,
    gemm_w4a16,
    gemv_w4a16,
    linear_nvfp4,
    linear_vq,
    linear_w4a4,
    linear_w4a4_grouped,
    linear_w4a8,
    linear_w4a16,
    mlp_w4a4,
    quantize_down,
    which,
)
from .preparation import CompileError, prepare
from .reference import GROUP, SHIFT, hadamard64

__all__ = [
    "GROUP",
    "SHIFT",
    "ActBits",
    "CompileError",
    "act_bits",
    "fuses_mlp",
    "gemm_vq",
    "gemm_w4a16",
    "gemm_w4a4_up",
    "gemm_w4a4_up_gelu_quantize_down",
    "gemv_w4a16",
    "hadamard64",
    "linear_nvfp4",
    "linear_vq",
    "linear_w4a16",
    "linear_w4a4",
    "linear_w4a4_grouped",
    "linear_w4a8",
    "mlp_w4a4",
    "prepare",
    "quantize_down",
    "which",
]
