"""Whole linears of 4-bit floats: see `reference/nvfp4.py` for the formula.

Gradients go straight through the quantizer, to x, proj_down, proj_up and bias.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..backends import native_nvfp4, triton
from ..backends import nvfp4 as scaled
from ..backends.choose import choose
from ..params import NVFP4Params, float_dtypes
from ..reference import nvfp4 as reference
from . import checks
from .register import Gradient, grad_bias, register

SCHEMAS = {
    "linear_nvfp4": (
        "(Tensor x, Tensor weight, Tensor weight_scale, Tensor weight_scale_2, Tensor"
        " smooth_factor, Tensor proj_down, Tensor proj_up, Tensor? bias=None, bool"
        " rounded=False) -> Tensor"
    )
}


def _check(x: Tensor, p: NVFP4Params) -> int:
    """N. Raises ValueError naming the shapes and the rule that they break."""
    k = checks.features(x)
    n = checks.outputs(p.weight, k)
    if p.weight_scale.dtype != torch.float8_e4m3fn:
        raise ValueError(f"weight_scale must be float8_e4m3fn, not {p.weight_scale.dtype}")
    checks.shape("weight_scale", p.weight_scale, "(N, K/16)", n, k // reference.COLUMNS)
    checks.shape("weight_scale_2", p.weight_scale_2, "(N,)", n)
    checks.shape("smooth_factor", p.smooth_factor, "(K,)", k)
    rank = checks.rank("proj_down", p.proj_down)
    checks.shape("proj_down", p.proj_down, "(K, R)", k, rank)
    checks.shape("proj_up", p.proj_up, "(N, R)", n, rank)
    checks.shape("bias", p.bias, "(N,)", n)
    checks.same_device(x.device, **dict(zip(p._fields[:7], p[:7], strict=True)))
    return n


def _fake(x: Tensor, *parameters) -> Tensor:
    return x.new_empty((*x.shape[:-1], _check(x, NVFP4Params(*parameters))))


def _run(x: Tensor, *parameters) -> Tensor:
    p = NVFP4Params(*parameters)
    n = _check(x, p)
    rows = x.reshape(-1, x.shape[-1])
    choice = choose("linear_nvfp4", x.device, x.dtype, float_dtypes(*p[4:7]))
    if choice.parameters is not None and len(rows):
        y = native_nvfp4.linear_nvfp4(choice.parameters, rows, p)
    elif choice.backend == "triton" and len(rows):
        y = triton.nvfp4().linear_nvfp4(rows, p)
    elif choice.backend == "scaled_mm" and len(rows):
        y = scaled.linear_nvfp4(rows, p)
    elif choice.backend == "decoded":
        y = reference.linear_nvfp4_decoded(rows, *p)
    else:
        y = reference.linear_nvfp4(rows, *p)
    return y.reshape(*x.shape[:-1], n)


def _save(ctx: Any, inputs: tuple, output: Tensor) -> None:
    p = NVFP4Params(*inputs[1:])
    ctx.save_for_backward(inputs[0], *p[:6])
    ctx.bias_dtype = None if p.bias is None else p.bias.dtype


def _backward(ctx: Any, grad: Tensor) -> tuple:
    x, *kept = ctx.saved_tensors
    rows = grad.reshape(-1, grad.shape[-1])
    needs = (ctx.needs_input_grad[0], ctx.needs_input_grad[5], ctx.needs_input_grad[6])
    grad_x, grad_down, grad_up = reference.linear_nvfp4_grad(
        rows, x.reshape(-1, x.shape[-1]), tuple(kept), needs
    )
    grad_x = None if grad_x is None else grad_x.reshape(x.shape)
    return (grad_x, None, None, None, None, grad_down, grad_up, grad_bias(ctx, rows, 7), None)


linear_nvfp4_op = register(
    "linear_nvfp4", SCHEMAS["linear_nvfp4"], _run, _fake, Gradient(_save, _backward)
)


def linear_nvfp4(x: Tensor, p: NVFP4Params) -> Tensor:
    """A whole linear of 4-bit floats: x (..., K) -> (..., N) in x.dtype."""
    return linear_nvfp4_op(x, *p)
