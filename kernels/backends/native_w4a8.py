"""4-bit weights that are read as int8 through `nibble_kernels`: tensors into pointers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from . import native
from .native import DTYPES, dense, dense_as, dense_rows, optional_as, row_stride

if TYPE_CHECKING:
    from ..params import W4A8Params


def layer_operands(p: W4A8Params, dtype: torch.dtype) -> W4A8Params:
    """Dense and of one dtype; the same tensors where they are so already."""
    return p._replace(
        weight=dense(p.weight),
        weight_scale=dense(p.weight_scale),
        weight_channel_scale=dense_as(p.weight_channel_scale, dtype),
        weight_table=dense(p.weight_table),
        smooth_factor=dense_as(p.smooth_factor, dtype),
        proj_down=optional_as(p.proj_down, dtype),
        proj_up=optional_as(p.proj_up, dtype),
        bias=optional_as(p.bias, dtype),
    )


class LinearCall:
    """One linear, flattened: the native call's arguments but for the tokens'.

    p: dense, aligned and of one dtype (`layer_operands`). Holds addresses and no tensor, so it is
    valid as long as whoever calls it makes sure that p's memory is what it was.
    """

    def __init__(self, p: W4A8Params, device: torch.device, isa: int = 0):
        self.device, self.isa = device, isa
        self.outputs, half = p.weight.shape
        columns, groups = 2 * half, len(p.weight_scale)
        arguments: dict[str, Any] = {
            "N": self.outputs,
            "K": columns,
            "R": 0 if p.proj_down is None else p.proj_down.shape[1],
            "group": columns // groups if groups else native.GROUP,
            "smooth": p.smooth_factor.data_ptr(),
            "proj_down": native.address(p.proj_down),
            "weight": p.weight.data_ptr(),
            "weight_scale": p.weight_scale.data_ptr(),
            "channel_scale": p.weight_channel_scale.data_ptr(),
            "table": p.weight_table.data_ptr(),
            "proj_up": native.address(p.proj_up),
            "bias": native.address(p.bias),
            "param_dtype": DTYPES[p.weight_channel_scale.dtype],
            "rotate": p.rotation != 0,
        }
        self.op = native.layer_op(device, "linear_w4a8", arguments)

    def __call__(self, x: Tensor) -> Tensor:
        """x (..., K) on `device`, dense (a matrix: its rows) and aligned -> (..., N) in x.dtype."""
        leading = x.shape[:-1]
        out = x.new_empty((*leading, self.outputs))
        self.op(
            M=leading.numel(),
            x=x.data_ptr(),
            x_stride=row_stride(x),
            x_dtype=DTYPES[x.dtype],
            out=out.data_ptr(),
            **native.place(self.device, self.isa),
        )
        return out


def linear_w4a8(dtype: torch.dtype, x: Tensor, p: W4A8Params, isa: int = 0) -> Tensor:
    operands = layer_operands(p, dtype)  # copies live until the call has returned
    return LinearCall(operands, x.device, isa)(dense_rows(x))
