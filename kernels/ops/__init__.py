"""Every op once, one file an op family: schema, checks, fake, gradient, and the function to call.

Each function here goes through torch's dispatcher (`torch.ops.nibble.*`), so torch.compile sees one
opaque node, and `torch.inference_mode` and FakeTensor work; the op then refuses what is wrong, and
`backends` chooses what runs it. An eager call that nothing watches takes the short way of `eager`.

    params      the parameters of each op as a record
    w4a4        whole SVDQuant linears: linear_w4a4, linear_w4a4_grouped, mlp_w4a4
    w4a4_parts  their halves: quantize_down, gemm_w4a4_up, and both fused across a GELU
    w4a16       4-bit weights alone: gemv_w4a16, gemm_w4a16, linear_w4a16
    w4a8        4-bit weights read as int8, activations of 8 bits: linear_w4a8
    vq          codebook weights: gemm_vq, linear_vq
    nvfp4       4-bit floats with a low-rank branch: linear_nvfp4
    checks      the refusals that families share
    register    schema, fake and gradient into torch's registry
    eager       the shorter way of plain eager calls: a layer is checked once
"""

from ..backends.choose import TYPICAL, which
from . import nvfp4, vq, w4a4, w4a4_parts, w4a8, w4a16
from .nvfp4 import linear_nvfp4
from .vq import gemm_vq, linear_vq
from .w4a4 import fuses_mlp, linear_w4a4, linear_w4a4_grouped, mlp_w4a4
from .w4a4_parts import gemm_w4a4_up, gemm_w4a4_up_gelu_quantize_down, quantize_down
from .w4a8 import linear_w4a8
from .w4a16 import gemm_w4a16, gemv_w4a16, linear_w4a16

SCHEMAS = {
    **w4a4_parts.SCHEMAS,
    **w4a4.SCHEMAS,
    **w4a8.SCHEMAS,
    **w4a16.SCHEMAS,
    **vq.SCHEMAS,
    **nvfp4.SCHEMAS,
}
"""The schema of every op, by its name."""

__all__ = [
    "SCHEMAS",
    "TYPICAL",
    "fuses_mlp",
    "gemm_vq",
    "gemm_w4a16",
    "gemm_w4a4_up",
    "gemm_w4a4_up_gelu_quantize_down",
    "gemv_w4a16",
    "linear_nvfp4",
    "linear_vq",
    "linear_w4a16",
    "linear_w4a4",
    "linear_w4a4_grouped",
    "linear_w4a8",
    "mlp_w4a4",
    "quantize_down",
    "which",
]
