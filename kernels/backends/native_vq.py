"""Codebook linears through `nibble_kernels`: tensors into pointers. The low-rank branch and the
rotation are torch's products around the compiled one.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..reference import GROUP, hadamard64
from ..reference.vq import index_bits
from . import native
from .native import DTYPES, dense, optional_as

if TYPE_CHECKING:
    from ..params import VQParams

GPU_LAYOUTS = ((6, 4), (8, 4), (6, 2), (8, 2))
"""(bits of an index, sub-vector length) that GPU kernels are made for: 1.5, 2, 3 and 4 bits a
weight.
"""


def has_layout(device: torch.device, k: int, codebook: Tensor) -> bool:
    """Whether compiled code exists for K columns and this codebook (C, D)."""
    bits, vector = index_bits(codebook), codebook.shape[1]
    if device.type == "cpu":
        return codebook.dtype in DTYPES and bits <= 12 and vector in (1, 2, 4, 8)
    return codebook.dtype == torch.float16 and k % GROUP == 0 and (bits, vector) in GPU_LAYOUTS


def layer_operands(p: VQParams) -> VQParams:
    """Dense, and scale and bias of one dtype: their own where they agree, else float32."""
    kinds = {tensor.dtype for tensor in (p.scale, p.bias) if tensor is not None}
    kind = kinds.pop() if len(kinds) == 1 and kinds <= set(DTYPES) else torch.float32
    return p._replace(
        indices=dense(p.indices),
        codebook=dense(p.codebook),
        scale=optional_as(p.scale, kind),
        bias=optional_as(p.bias, kind),
    )


class LinearCall:
    """One product, flattened: the native call's arguments but for the tokens'.

    p: from `layer_operands`; its projections and rotation are left to the caller. Holds addresses
    and no tensor, so it is valid as long as whoever calls it makes sure that p's memory is what it
    was.
    """

    def __init__(self, p: VQParams, device: torch.device, k: int, isa: int = 0):
        self.device, self.isa = device, isa
        self.outputs = len(p.indices)
        row = p.bias if p.scale is None else p.scale
        arguments: dict[str, Any] = {
            "N": self.outputs,
            "K": k,
            "bits": index_bits(p.codebook),
            "vector": p.codebook.shape[1],
            "indices": p.indices.data_ptr(),
            "codebook": p.codebook.data_ptr(),
            "codebook_dtype": DTYPES[p.codebook.dtype],
            "scale": native.address(p.scale),
            "bias": native.address(p.bias),
            "param_dtype": DTYPES[torch.float32 if row is None else row.dtype],
        }
        self.op = native.layer_op(device, "gemm_vq", arguments)

    def __call__(
        self, x: Tensor, addend: Tensor | None = None, out_dtype: torch.dtype | None = None
    ) -> Tensor:
        """x (..., K) on `device`, dense and aligned -> (..., N).

        `addend` (..., N), in any of the three dtypes, is added before the result is rounded to
        `out_dtype`, by default x's.
        """
        leading = x.shape[:-1]
        out = x.new_empty((*leading, self.outputs), dtype=out_dtype or x.dtype)
        self.op(
            M=leading.numel(),
            x=x.data_ptr(),
            x_dtype=DTYPES[x.dtype],
            addend=native.address(addend),
            addend_dtype=DTYPES[torch.float32 if addend is None else addend.dtype],
            out=out.data_ptr(),
            out_dtype=DTYPES[out.dtype],
            **native.place(self.device, self.isa),
        )
        return out


def gemm_vq(
    x: Tensor,
    p: VQParams,
    addend: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    isa: int = 0,
) -> Tensor:
    """`addend`, `out_dtype`: as in `LinearCall`."""
    operands = layer_operands(p)  # copies live until the call has returned
    call = LinearCall(operands, x.device, x.shape[-1], isa)
    return call(dense(x), None if addend is None else dense(addend), out_dtype)


def around(x: Tensor, p: VQParams) -> tuple[Tensor, Tensor | None]:
    """(what the product reads, the low-rank branch's part of the result or None) of x (M, K).

    The low-rank branch and the rotation cost 2 R / K and 64 / N of the layer's product. On the CPU
    both stay in float32.
    """
    compute = torch.float32 if x.device.type == "cpu" else x.dtype
    addend, act = None, x
    if p.proj_down is not None and p.proj_up is not None and p.proj_down.shape[1]:
        h = x.to(compute) @ p.proj_down.to(compute)
        addend = h @ p.proj_up.to(compute).t()
    if p.rotation:
        act = hadamard64(x.to(compute))
    return act, addend


def linear_vq(x: Tensor, p: VQParams, isa: int = 0) -> Tensor:
    act, addend = around(x, p)
    return gemm_vq(act, p, addend, x.dtype, isa)
