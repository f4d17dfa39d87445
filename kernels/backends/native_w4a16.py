"""Linears of 4-bit weights alone through `nibble_kernels`: tensors into pointers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from . import native
from .native import DTYPES, dense, dense_as, optional_as

if TYPE_CHECKING:
    from ..params import W4A16Params


def layer_operands(p: W4A16Params, dtype: torch.dtype) -> W4A16Params:
    """Dense and of one dtype; the same tensors where they are so already."""
    return p._replace(
        weight=dense(p.weight),
        weight_scale=dense_as(p.weight_scale, dtype),
        weight_zeros=optional_as(p.weight_zeros, dtype),
        bias=optional_as(p.bias, dtype),
    )


class LinearCall:
    """One linear, flattened: the native call's arguments but for the tokens'. op: gemv_w4a16 or
    gemm_w4a16.

    p: dense, aligned and of one dtype (`layer_operands`). Holds addresses and no tensor, so it is
    valid as long as whoever calls it makes sure that p's memory is what it was.
    """

    def __init__(self, op: str, p: W4A16Params, device: torch.device, isa: int = 0):
        self.device, self.isa = device, isa
        n, half = p.weight.shape
        self.outputs = n
        arguments: dict[str, Any] = {
            "N": n,
            "K": 2 * half,
            "weight": p.weight.data_ptr(),
            "weight_scale": p.weight_scale.data_ptr(),
            "weight_zeros": native.address(p.weight_zeros),
            "bias": native.address(p.bias),
            "param_dtype": DTYPES[p.weight_scale.dtype],
        }
        self.op = native.layer_op(device, op, arguments)

    def __call__(self, x: Tensor) -> Tensor:
        """x (..., K) on `device`, dense and aligned -> (..., N) in x.dtype."""
        leading = x.shape[:-1]
        out = x.new_empty((*leading, self.outputs))
        self.op(
            M=leading.numel(),
            x=x.data_ptr(),
            x_dtype=DTYPES[x.dtype],
            out=out.data_ptr(),
            **native.place(self.device, self.isa),
        )
        return out


def w4a16(op: str, dtype: torch.dtype, x: Tensor, p: W4A16Params, isa: int = 0) -> Tensor:
    """`gemv_w4a16` or `gemm_w4a16`."""
    operands = layer_operands(p, dtype)  # copies live until the call has returned
    return LinearCall(op, operands, x.device, isa)(dense(x))
