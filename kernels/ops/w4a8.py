"""Whole linears whose 4-bit weights are read as int8, and whose activations have 8 bits a token.

    y = (Q8(x / smooth) . W8^T) * ascale * channel_scale + (x . proj_down) . proj_up^T + bias
                        SVDQuant, arXiv 2411.05007, eq. 3 and 9; W8: `reference.w4a8`

Gradients go straight through the quantizer, to x, proj_down, proj_up and bias; codes, scales, table
and smoothing are constants.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import reference
from ..backends import native_w4a8, triton
from ..backends.choose import choose
from ..params import W4A8Params, float_dtypes
from ..reference import w4a8 as reference_w4a8
from . import checks
from .eager import Call, EagerOp
from .register import Gradient, grad_bias, register

SCHEMAS = {
    "linear_w4a8": (
        "(Tensor x, Tensor weight, Tensor weight_scale, Tensor weight_channel_scale, Tensor"
        " weight_table, Tensor smooth_factor, Tensor? proj_down=None, Tensor? proj_up=None, Tensor?"
        " bias=None, int rotation=0) -> Tensor"
    )
}


# ---- checks --------------------------------------------------------------------------------------


def check_linear(x: Tensor, p: W4A8Params) -> int:
    """N. Raises ValueError naming the shapes and the rule that they break."""
    reference.check_flags(False, p.rotation)
    k = checks.features(x)
    n = checks.outputs(p.weight, k)
    _check_scales(k, n, p)
    checks.shape("weight_channel_scale", p.weight_channel_scale, "(N,)", n)
    checks.shape("smooth_factor", p.smooth_factor, "(K,)", k)
    checks.shape("bias", p.bias, "(N,)", n)
    if (p.proj_down is None) != (p.proj_up is None):
        raise ValueError("proj_down and proj_up come together or not at all")
    if p.proj_down is not None:
        rank = checks.rank("proj_down", p.proj_down)
        checks.shape("proj_down", p.proj_down, "(K, R)", k, rank)
        checks.shape("proj_up", p.proj_up, "(N, R)", n, rank)
    checks.same_device(x.device, **dict(zip(p._fields[:8], p[:8], strict=True)))
    return n


def _check_scales(k: int, n: int, p: W4A8Params) -> None:
    scale, table = p.weight_scale, p.weight_table
    groups = [k // group for group in reference_w4a8.GROUPS]
    if scale.dtype != torch.int8 or scale.dim() != 2 or len(scale) not in groups:
        raise ValueError(
            f"weight_scale must be int8 (K/g, N) for groups of {reference_w4a8.GROUPS} columns, not"
            f" {scale.dtype} {tuple(scale.shape)} with K={k}"
        )
    checks.shape("weight_scale", scale, "(K/g, N)", len(scale), n)
    if table.dtype != torch.int8 or table.shape != (reference_w4a8.LEVELS,):
        raise ValueError(f"weight_table must be int8 (16,), not {table.dtype} {tuple(table.shape)}")


# ---- fake, and what runs -------------------------------------------------------------------------


def _fake_linear(x: Tensor, *parameters) -> Tensor:
    n = check_linear(x, W4A8Params(*parameters))
    return x.new_empty((*x.shape[:-1], n))


def _run_linear(x: Tensor, *parameters) -> Tensor:
    p = W4A8Params(*parameters)
    check_linear(x, p)
    rows = x.reshape(-1, x.shape[-1])
    choice = choose("linear_w4a8", x.device, x.dtype, _dtypes(p))
    if choice.parameters is not None:
        y = native_w4a8.linear_w4a8(choice.parameters, rows, p)
    elif choice.backend == "triton":
        y = triton.w4a8().linear_w4a8(rows, p)
    else:
        y = reference_w4a8.linear_w4a8(rows, *p)
    return y.reshape(*x.shape[:-1], len(p.weight))


def _dtypes(p: W4A8Params) -> tuple[torch.dtype | None, ...]:
    """Of the parameters by which a backend is chosen: every one takes the channels' scales in
    float32, as files have them.
    """
    return float_dtypes(*p[4:8])


# ---- gradients -----------------------------------------------------------------------------------


def _save(ctx: Any, inputs: tuple, output: Tensor) -> None:
    p = W4A8Params(*inputs[1:])
    ctx.save_for_backward(inputs[0], *p[:7])
    ctx.bias_dtype = None if p.bias is None else p.bias.dtype
    ctx.rotation = p.rotation


def _backward(ctx: Any, grad: Tensor) -> tuple:
    x, *kept = ctx.saved_tensors
    rows = grad.reshape(-1, grad.shape[-1])
    asked = [*ctx.needs_input_grad, *[False] * (10 - len(ctx.needs_input_grad))]
    grad_x, grad_down, grad_up = reference_w4a8.linear_w4a8_grad(
        rows,
        x.reshape(-1, x.shape[-1]),
        W4A8Params(*kept)._replace(rotation=ctx.rotation),
        (asked[0], asked[6], asked[7]),
    )
    grad_x = None if grad_x is None else grad_x.reshape(x.shape)
    constants = (None,) * 5
    return (grad_x, *constants, grad_down, grad_up, grad_bias(ctx, rows, 8), None)


linear_w4a8_op = register(
    "linear_w4a8", SCHEMAS["linear_w4a8"], _run_linear, _fake_linear, Gradient(_save, _backward)
)


def _prepare_linear(x: Tensor, tensors: tuple, options: tuple) -> Call | None:
    p = W4A8Params(*tensors, *options)
    choice = choose("linear_w4a8", x.device, x.dtype, _dtypes(p))
    if choice.parameters is None:
        return None
    operands = native_w4a8.layer_operands(p, choice.parameters)
    copied = any(ours is not theirs for ours, theirs in zip(operands, p, strict=True))
    return None if copied else native_w4a8.LinearCall(p, x.device)


_eager_linear = EagerOp(linear_w4a8_op, _prepare_linear)


# ---- the function to call ------------------------------------------------------------------------


def linear_w4a8(  # noqa: PLR0913 - the schema's arguments
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    weight_channel_scale: Tensor,
    weight_table: Tensor,
    smooth_factor: Tensor,
    proj_down: Tensor | None = None,
    proj_up: Tensor | None = None,
    bias: Tensor | None = None,
    rotation: int = 0,
) -> Tensor:
    """A whole W4A8 linear.

    Shapes:
        x (..., K), any float dtype · weight int8 (N, K/2), codes 0..15, low nibble = even column ·
        weight_scale int8 (K/g, N), g = 16, 32 or 64 · weight_channel_scale (N,), float32 in files ·
        weight_table int8 (16,) · smooth_factor (K,) · proj_down (K, R) and proj_up (N, R), both or
        neither · bias (N,) or None, each in any float dtype -> (..., N) in x.dtype
    rotation: 0, or 64 for a layer whose weights were rotated per 64 columns.
    Raises ValueError naming the shapes and the rule that they break.
    """
    tensors = (weight, weight_scale, weight_channel_scale, weight_table, smooth_factor)
    return _eager_linear(x, (*tensors, proj_down, proj_up, bias), (rotation,))
