"""kernels/ - the arithmetic. Knows tensors, not models; imports torch, and comfy_kitchen where it is installed.

The shape alphabet, used in every signature, comment and test:

    M tokens · K in · N out · R rank · G group (64 columns share a scale) · C codewords · D sub-vector

`ops` holds every op once and decides what runs it, `reference` is the truth in plain torch, `native` and `kitchen` are the
two ways to run faster. `which(op, device)` says which one is used and why.
"""

from .ops import gemm_w4a4_up, gemv_w4a16, linear_w4a4, linear_w4a16, quantize_down, which
from .reference import GROUP, SHIFT, hadamard64

__all__ = [
    "GROUP", "SHIFT", "gemm_w4a4_up", "gemv_w4a16", "hadamard64", "linear_w4a4", "linear_w4a16", "quantize_down", "which",
]
