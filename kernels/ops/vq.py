"""Codebook linears, at 1.5, 2, 3 or 4 bits a weight.

    y = x . (codebook[index] * scale)^T + bias      VQ4DiT, arXiv 2408.17131, eq. 2

`linear_vq` adds a low-rank branch, rotates x per group of 64 if asked and takes any leading shape.
Gradients go to x, proj_down, proj_up and bias; indices, codebook and scale are constants.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import reference
from ..backends import native_vq, triton
from ..backends.choose import choose
from ..params import VQParams
from ..reference import vq as reference_vq
from . import checks
from .eager import Call, EagerOp
from .register import Gradient, grad_bias, register

SCHEMAS = {
    "gemm_vq": (
        "(Tensor x, Tensor indices, Tensor codebook, Tensor? scale=None, Tensor? bias=None) ->"
        " Tensor"
    ),
    "linear_vq": (
        "(Tensor x, Tensor indices, Tensor codebook, Tensor? scale=None, Tensor? proj_down=None,"
        " Tensor? proj_up=None, Tensor? bias=None, int rotation=0) -> Tensor"
    ),
}


# ---- checks --------------------------------------------------------------------------------------


def _check_codebook(k: int, indices: Tensor, codebook: Tensor) -> int:
    """N."""
    if not codebook.is_floating_point() or codebook.dim() != 2 or 0 in codebook.shape:
        raise ValueError(
            f"codebook must be floating point (C, D), not {codebook.dtype} {tuple(codebook.shape)}"
        )
    words, vector = codebook.shape
    if words & (words - 1) or not 2 <= words <= 65536:
        raise ValueError(
            f"codebook has C={words} codewords and must have a power of two from 2 to 65536"
        )
    if k % vector:
        raise ValueError(f"K={k} is not a multiple of the sub-vector length D={vector}")
    if indices.dtype != torch.uint8 or indices.dim() != 2:
        raise ValueError(
            f"indices must be packed uint8 (N, K/D * log2(C) / 8), not {indices.dtype}"
            f" {tuple(indices.shape)}"
        )
    n, row = indices.shape
    bits = k // vector * reference_vq.index_bits(codebook)
    if row * 8 != bits:
        raise ValueError(
            f"indices {tuple(indices.shape)} hold {row * 8} bits a row and K={k}, D={vector},"
            f" C={words} need {bits}"
        )
    return n


def _check_product(k: int, x: Tensor, p: VQParams) -> int:
    """N."""
    n = _check_codebook(k, p.indices, p.codebook)
    checks.shape("scale", p.scale, "(N,)", n)
    checks.shape("bias", p.bias, "(N,)", n)
    checks.same_device(x.device, indices=p.indices, codebook=p.codebook, scale=p.scale, bias=p.bias)
    return n


def _check_gemm(x: Tensor, p: VQParams) -> None:
    checks.no_leading_shape("gemm_vq", x, "linear_vq")
    _check_product(checks.floats(x), x, p)


def _check_linear(x: Tensor, p: VQParams) -> None:
    reference.check_flags(False, p.rotation)
    k = checks.features(x) if p.rotation else checks.floats(x)
    n = _check_product(k, x, p)
    if (p.proj_down is None) != (p.proj_up is None):
        raise ValueError("proj_down and proj_up come together or not at all")
    if p.proj_down is not None:
        rank = checks.rank("proj_down", p.proj_down)
        checks.shape("proj_down", p.proj_down, "(K, R)", k, rank)
        checks.shape("proj_up", p.proj_up, "(N, R)", n, rank)
        checks.same_device(x.device, proj_down=p.proj_down, proj_up=p.proj_up)


# ---- fakes, and what runs ------------------------------------------------------------------------


def _gemm_params(parameters: tuple) -> VQParams:
    """`gemm_vq`'s arguments after x: indices, codebook, scale, bias."""
    indices, codebook, scale, bias = (*parameters, None, None)[:4]
    return VQParams(indices, codebook, scale, bias=bias)


def _fake_gemm(x: Tensor, *parameters) -> Tensor:
    p = _gemm_params(parameters)
    _check_gemm(x, p)
    return x.new_empty((x.shape[0], p.indices.shape[0]))


def _fake_linear(x: Tensor, *parameters) -> Tensor:
    p = VQParams(*parameters)
    _check_linear(x, p)
    return x.new_empty((*x.shape[:-1], p.indices.shape[0]))


def way(op: str, x: Tensor, codebook: Tensor) -> str:
    """The backend that takes this layer; a codebook of a layout that the chosen one lacks goes
    through the reference.
    """
    chosen = choose(op, x.device, x.dtype, ()).backend
    if chosen == "native" and native_vq.has_layout(x.device, x.shape[-1], codebook):
        return chosen
    return chosen if chosen == "triton" and triton.vq().has_layout(codebook) else "reference"


def _run_gemm(x: Tensor, *parameters) -> Tensor:
    p = _gemm_params(parameters)
    _check_gemm(x, p)
    found = way("gemm_vq", x, p.codebook)
    if found == "native":
        return native_vq.gemm_vq(x, p)
    if found == "triton":
        return triton.vq().gemm_vq(x, p)
    return reference_vq.linear_vq(x, *p)


def _run_linear(x: Tensor, *parameters) -> Tensor:
    p = VQParams(*parameters)
    _check_linear(x, p)
    rows = x.reshape(-1, x.shape[-1])
    found = way("linear_vq", x, p.codebook)
    if found == "native":
        y = native_vq.linear_vq(rows, p)
    elif found == "triton":
        y = triton.vq().linear_vq(rows, p)
    else:
        y = reference_vq.linear_vq(rows, *p)
    return y.reshape(*x.shape[:-1], len(p.indices))


# ---- gradients -----------------------------------------------------------------------------------


def _save_gemm(ctx: Any, inputs: tuple, output: Tensor) -> None:
    x, indices, codebook, scale, bias = inputs
    ctx.save_for_backward(x, indices, codebook, scale)
    ctx.bias_dtype = None if bias is None else bias.dtype


def _backward_gemm(ctx: Any, grad: Tensor) -> tuple:
    grad_x = None
    if ctx.needs_input_grad[0]:
        x, *kept = ctx.saved_tensors
        grad_x = reference_vq.linear_vq_grad(grad, x, VQParams(*kept), (True, False, False))[0]
    return grad_x, None, None, None, grad_bias(ctx, grad, 4)


def _save_linear(ctx: Any, inputs: tuple, output: Tensor) -> None:
    p = VQParams(*inputs[1:])
    ctx.save_for_backward(inputs[0], *p[:5])
    ctx.bias_dtype = None if p.bias is None else p.bias.dtype
    ctx.rotation = p.rotation


def _backward_linear(ctx: Any, grad: Tensor) -> tuple:
    x, *kept = ctx.saved_tensors
    rows = grad.reshape(-1, grad.shape[-1])
    asked = [*ctx.needs_input_grad, *[False] * (8 - len(ctx.needs_input_grad))]
    grad_x, grad_down, grad_up = reference_vq.linear_vq_grad(
        rows,
        x.reshape(-1, x.shape[-1]),
        VQParams(*kept)._replace(rotation=ctx.rotation),
        (asked[0], asked[4], asked[5]),
    )
    grad_x = None if grad_x is None else grad_x.reshape(x.shape)
    return grad_x, None, None, None, grad_down, grad_up, grad_bias(ctx, rows, 6), None


gemm_vq_op = register(
    "gemm_vq", SCHEMAS["gemm_vq"], _run_gemm, _fake_gemm, Gradient(_save_gemm, _backward_gemm)
)
linear_vq_op = register(
    "linear_vq",
    SCHEMAS["linear_vq"],
    _run_linear,
    _fake_linear,
    Gradient(_save_linear, _backward_linear),
)


def _prepare_linear(x: Tensor, tensors: tuple, options: tuple) -> Call | None:
    """Layers without a low-rank branch and a rotation, which are products of torch's."""
    p = VQParams(*tensors, *options)
    if p.rotation or p.proj_down is not None or way("linear_vq", x, p.codebook) != "native":
        return None
    operands = native_vq.layer_operands(p)
    if any(ours is not theirs for ours, theirs in zip(operands, p, strict=True)):
        return None
    return native_vq.LinearCall(p, x.device, x.shape[-1])


_eager_linear = EagerOp(linear_vq_op, _prepare_linear)


# ---- the functions to call -----------------------------------------------------------------------


def gemm_vq(
    x: Tensor,
    indices: Tensor,
    codebook: Tensor,
    scale: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """Codebook weights and tokens x (M, K), of any float dtype: see `reference.vq.gemm_vq`. Has a
    gradient to x and bias.
    """
    return gemm_vq_op(x, indices, codebook, scale, bias)


def linear_vq(  # noqa: PLR0913 - the schema's arguments
    x: Tensor,
    indices: Tensor,
    codebook: Tensor,
    scale: Tensor | None = None,
    proj_down: Tensor | None = None,
    proj_up: Tensor | None = None,
    bias: Tensor | None = None,
    rotation: int = 0,
) -> Tensor:
    """A whole codebook linear.

    Shapes:
        x (..., K), any float dtype · indices uint8 (N, K/D * log2(C) / 8) · codebook (C, D) · scale
        (N,) or None · proj_down (K, R) and proj_up (N, R), both or neither · bias (N,) or None,
        each in any float dtype -> (..., N) in x.dtype
    rotation: 0, or 64 for a file whose weights were rotated per group; the low-rank branch sees the
        raw x.
    Raises ValueError naming the shapes and the rule that they break.
    """
    return _eager_linear(x, (indices, codebook, scale, proj_down, proj_up, bias), (rotation,))
