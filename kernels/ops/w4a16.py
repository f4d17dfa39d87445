"""Linears whose weights alone have 4 bits.

    y = x . ((W4 - 8) * weight_scale + weight_zeros)^T + bias      AWQ, arXiv 2306.00978

`gemv_w4a16` is for few tokens (modulation), `gemm_w4a16` for many (text); `linear_w4a16` takes any
leading shape and chooses between the two. All three have gradients to x and bias.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .. import reference
from ..backends import kitchen, native_w4a16
from ..backends.choose import GEMV_TOKENS, choose
from ..params import W4A16Params, float_dtypes
from ..reference import GROUP
from . import checks
from .eager import Call, EagerOp
from .register import Gradient, grad_bias, register

_ARGUMENTS = (
    "Tensor x, Tensor weight, Tensor weight_scale, Tensor? weight_zeros=None, Tensor? bias=None"
)
SCHEMAS = {
    "gemv_w4a16": f"({_ARGUMENTS}) -> Tensor",
    "gemm_w4a16": f"({_ARGUMENTS}) -> Tensor",
    "linear_w4a16": f"({_ARGUMENTS}) -> Tensor",
}


def _check_linear(x: Tensor, p: W4A16Params) -> None:
    k = checks.features(x)
    n = checks.outputs(p.weight, k)
    checks.shape("weight_scale", p.weight_scale, "(K/64, N)", k // GROUP, n)
    checks.shape("weight_zeros", p.weight_zeros, "(K/64, N)", k // GROUP, n)
    checks.shape("bias", p.bias, "(N,)", n)
    checks.same_device(x.device, **p._asdict())


def _fake_linear(x: Tensor, *parameters) -> Tensor:
    p = W4A16Params(*parameters)
    _check_linear(x, p)
    return x.new_empty((*x.shape[:-1], p.weight.shape[0]))


def _run_tokens(op: str, x: Tensor, p: W4A16Params) -> Tensor:
    """x (M, K), checked."""
    choice = choose(op, x.device, x.dtype, float_dtypes(*p[1:]))
    if choice.parameters is not None:
        return native_w4a16.w4a16(op, choice.parameters, x, p)
    if choice.backend == "comfy_kitchen" and len(x):
        return kitchen.gemv_w4a16(x, p)
    return reference.gemv_w4a16(x, *p)


def _run_linear(x: Tensor, *parameters) -> Tensor:
    p = W4A16Params(*parameters)
    _check_linear(x, p)
    rows = x.reshape(-1, x.shape[-1])
    op = "gemv_w4a16" if len(rows) <= GEMV_TOKENS else "gemm_w4a16"
    return _run_tokens(op, rows, p).reshape(*x.shape[:-1], len(p.weight))


def _save(ctx: Any, inputs: tuple, output: Tensor) -> None:
    p = W4A16Params(*inputs[1:])
    ctx.save_for_backward(p.weight, p.weight_scale, p.weight_zeros)
    ctx.bias_dtype = None if p.bias is None else p.bias.dtype


def _backward(ctx: Any, grad: Tensor) -> tuple:
    rows = grad.reshape(-1, grad.shape[-1])
    grad_x = None
    if ctx.needs_input_grad[0]:
        grad_x = reference.linear_w4a16_grad(rows, *ctx.saved_tensors)
        grad_x = grad_x.reshape(*grad.shape[:-1], grad_x.shape[-1])
    return grad_x, None, None, None, grad_bias(ctx, rows, 4)


GRADIENT = Gradient(_save, _backward)


def _register_tokens(op: str):
    def check(x: Tensor, p: W4A16Params) -> None:
        checks.no_leading_shape(op, x, "linear_w4a16")
        _check_linear(x, p)

    def run(x: Tensor, *parameters) -> Tensor:
        p = W4A16Params(*parameters)
        check(x, p)
        return _run_tokens(op, x, p)

    def fake(x: Tensor, *parameters) -> Tensor:
        p = W4A16Params(*parameters)
        check(x, p)
        return x.new_empty((x.shape[0], p.weight.shape[0]))

    return register(op, SCHEMAS[op], run, fake, GRADIENT)


gemv_w4a16_op = _register_tokens("gemv_w4a16")
gemm_w4a16_op = _register_tokens("gemm_w4a16")
linear_w4a16_op = register(
    "linear_w4a16", SCHEMAS["linear_w4a16"], _run_linear, _fake_linear, GRADIENT
)


def _prepare_linear(x: Tensor, tensors: tuple, options: tuple) -> Call | None:
    p = W4A16Params(*tensors)
    choice = choose("linear_w4a16", x.device, x.dtype, float_dtypes(*p[1:]))
    if choice.parameters is None:
        return None
    operands = native_w4a16.layer_operands(p, choice.parameters)
    if any(ours is not theirs for ours, theirs in zip(operands, p, strict=True)):
        return None
    few = native_w4a16.LinearCall("gemv_w4a16", p, x.device)
    many = native_w4a16.LinearCall("gemm_w4a16", p, x.device)

    def run(x: Tensor) -> Tensor:
        return few(x) if x.shape[:-1].numel() <= GEMV_TOKENS else many(x)

    return run


_eager_linear = EagerOp(linear_w4a16_op, _prepare_linear)


def gemv_w4a16(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    weight_zeros: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """4-bit weights, with zero points or symmetric, and few tokens x (M, K): see
    `reference.gemv_w4a16`.
    """
    return gemv_w4a16_op(x, weight, weight_scale, weight_zeros, bias)


def gemm_w4a16(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    weight_zeros: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """The same for many tokens; `linear_w4a16` chooses between the two."""
    return gemm_w4a16_op(x, weight, weight_scale, weight_zeros, bias)


def linear_w4a16(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    weight_zeros: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """A whole 4-bit-weight linear: x (..., K) -> (..., N) in x.dtype; parameters as in
    `reference.gemv_w4a16`.

    Raises ValueError naming the shapes and the rule that they break.
    """
    return _eager_linear(x, (weight, weight_scale, weight_zeros, bias))
