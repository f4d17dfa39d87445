"""4-bit weights that are read as int8 through `nibble_kernels`: tensors into pointers. On a GPU
codes, scales and h lie in scratch memory between the quantizer and the product; not yet measured.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from . import native
from .native import DTYPES, dense, dense_as, dense_rows, optional_as, row_stride

if TYPE_CHECKING:
    from ..params import W4A8Params


def layer_operands(p: W4A8Params, dtype: torch.dtype) -> W4A8Params:
    """Dense, of one dtype and the channels' scales in float32, as files have them; the same tensors
    where they are so already.
    """
    return p._replace(
        weight=dense(p.weight),
        weight_scale=dense(p.weight_scale),
        weight_channel_scale=dense_as(p.weight_channel_scale, torch.float32),
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
        self.device, self.isa, self.on_gpu = device, isa, device.type != "cpu"
        self.module = native.on(device)
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
            "param_dtype": DTYPES[p.smooth_factor.dtype],
            "rotate": p.rotation != 0,
        }
        self.op = native.layer_op(device, "linear_w4a8", arguments)
        self.sizes = {"capability": native.capability(device), "codes": native.INT8}
        self.sizes |= {name: arguments[name] for name in "NKR"}
        # Tokens of the last call, and the scratch that so many want.
        self.last = (-1, 0)

    def __call__(self, x: Tensor) -> Tensor:
        """x (..., K) on `device`, dense (a matrix: its rows) and aligned -> (..., N) in x.dtype."""
        leading = x.shape[:-1]
        m = leading.numel()
        out = x.new_empty((*leading, self.outputs))
        tokens: dict[str, Any] = {"M": m, "x": x.data_ptr(), "x_dtype": DTYPES[x.dtype]}
        tokens["x_stride"] = row_stride(x)
        if self.on_gpu:
            # `scratch` lives until the call has returned; a GPU's work is ordered by its stream.
            scratch = self._scratch(x, m)
            tokens |= {"scratch": scratch.data_ptr(), "scratch_size": scratch.numel()}
        self.op(out=out.data_ptr(), **tokens, **native.place(self.device, self.isa))
        return out

    def _scratch(self, x: Tensor, m: int) -> Tensor:
        """Memory from torch's allocator, so that a CUDA graph can capture the call. On the CPU the
        call has its own.
        """
        last = self.last
        if last[0] != m:
            needed = self.module.workspace_bytes(op="linear_w4a8", M=m, **self.sizes)
            last = self.last = m, needed
        return x.new_empty(last[1], dtype=torch.uint8)


def linear_w4a8(dtype: torch.dtype, x: Tensor, p: W4A8Params, isa: int = 0) -> Tensor:
    operands = layer_operands(p, dtype)  # copies live until the call has returned
    return LinearCall(operands, x.device, isa)(dense_rows(x))
