"""Whole W4A4 linears of any leading shape: what layers call.

    y = Q(x / smooth) . (W4 * weight_scale)^T + (x . proj_down) . proj_up^T + bias
                                                     SVDQuant, arXiv 2411.05007, eq. 3 and 9

    linear_w4a4          one linear, with gradients
    linear_w4a4_grouped  several linears of one x that share its smoothing (q, k, v)
    mlp_w4a4             linear -> GELU (tanh) -> linear

Gradients go straight through the quantizer, to x, proj_down, proj_up and bias; codes, scales and
smoothing are constants. A backward pass dequantizes the weight once and keeps only the layer's
inputs; it runs in plain torch on every backend. The two fused ops have no gradient: where one is
needed, their functions call the linears one by one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import reference
from ..backends import kitchen, native, native_w4a4, triton
from ..backends.choose import choose
from ..params import GroupParams, MLPParams, W4A4Params, float_dtypes
from ..reference import GROUP
from . import checks
from .eager import Call, EagerOp
from .register import Gradient, grad_bias, need_gradients, register
from .w4a4_parts import FLAGS, UNSIGNED_FROM, check_product, check_quantizer

_LINEAR = (
    "Tensor weight, Tensor weight_scale, Tensor smooth_factor, Tensor proj_down, Tensor proj_up,"
    " Tensor? bias"
)
_SECOND = (
    "Tensor weight2, Tensor weight_scale2, Tensor smooth_factor2, Tensor proj_down2, Tensor"
    " proj_up2, Tensor? bias2"
)
SCHEMAS = {
    "linear_w4a4": f"(Tensor x, {_LINEAR}=None, {FLAGS}, {UNSIGNED_FROM}) -> Tensor",
    "linear_w4a4_grouped": (
        "(Tensor x, Tensor smooth_factor, Tensor[] weight, Tensor[] weight_scale, Tensor[]"
        f" proj_down, Tensor[] proj_up, Tensor?[] bias, {FLAGS}) -> Tensor[]"
    ),
    "mlp_w4a4": (
        f"(Tensor x, {_LINEAR}, {_SECOND}, {FLAGS}, bool act_unsigned2=False, int"
        " rotation2=0) -> Tensor"
    ),
}


# ---- checks --------------------------------------------------------------------------------------


def _check_layer(k: int, device: torch.device, p: W4A4Params, layer: str = "") -> int:
    """N. `layer` is "2" for the second layer of an MLP."""
    n = checks.outputs(p.weight, k, f"weight{layer}")
    rank = check_quantizer(k, p.quantizer, layer)
    check_product(k, n, rank, p.product, layer)
    tensors = {f"{name}{layer}": tensor for name, tensor in zip(p._fields[:6], p[:6], strict=True)}
    checks.same_device(device, **tensors)
    return n


def check_linear(x: Tensor, p: W4A4Params) -> int:
    """N. Raises ValueError naming the shapes and the rule that they break."""
    reference.check_flags(p.act_unsigned, p.rotation, p.unsigned_from)
    return _check_layer(checks.features(x), x.device, p)


def _check_grouped(x: Tensor, p: GroupParams) -> None:
    lists = dict(zip(p._fields[1:6], p[1:6], strict=True))
    counts = {name: len(tensors) for name, tensors in lists.items()}
    if len(set(counts.values())) > 1 or not p.weight:
        raise ValueError(f"a group of linears needs as many of each and at least one, not {counts}")
    for layer in p.layers:
        check_linear(x, layer)


def _check_mlp(x: Tensor, p: MLPParams) -> None:
    hidden = check_linear(x, p.first)
    reference.check_flags(p.act_unsigned2, p.rotation2)
    if hidden % GROUP:
        raise ValueError(
            f"N={hidden} of the first layer is not a multiple of the group size {GROUP}, and the"
            " second quantizes it"
        )
    _check_layer(hidden, x.device, p.second, "2")


# ---- fakes ---------------------------------------------------------------------------------------


def _fake_linear(x: Tensor, *parameters) -> Tensor:
    n = check_linear(x, W4A4Params(*parameters))
    return x.new_empty((*x.shape[:-1], n))


def _fake_grouped(x: Tensor, *parameters) -> list[Tensor]:
    p = GroupParams(*parameters)
    _check_grouped(x, p)
    return [x.new_empty((*x.shape[:-1], weight.shape[0])) for weight in p.weight]


def _fake_mlp(x: Tensor, *parameters) -> Tensor:
    p = MLPParams(*parameters)
    _check_mlp(x, p)
    return x.new_empty((*x.shape[:-1], p.weight2.shape[0]))


# ---- what runs -----------------------------------------------------------------------------------


def _run_rows(rows: Tensor, p: W4A4Params) -> Tensor:
    """`linear_w4a4` of checked arguments, x (M, K)."""
    choice = choose("linear_w4a4", rows.device, rows.dtype, float_dtypes(*p[1:6]))
    if choice.parameters is not None:
        return native_w4a4.linear_w4a4(choice.parameters, rows, p)
    if choice.backend == "triton":
        return triton.w4a4().linear_w4a4(rows, p)
    # comfy_kitchen's kernels are not made for an empty batch or for rank 0.
    if choice.backend == "comfy_kitchen" and len(rows) and p.proj_down.shape[1]:
        return kitchen.linear_w4a4(rows, p)
    return reference.linear_w4a4(rows, *p)


def _run_linear(x: Tensor, *parameters) -> Tensor:
    p = W4A4Params(*parameters)
    check_linear(x, p)
    if x.dim() == 2:
        return _run_rows(x, p)
    return _run_rows(x.reshape(-1, x.shape[-1]), p).reshape(*x.shape[:-1], len(p.weight))


def _run_grouped(x: Tensor, *parameters) -> list[Tensor]:
    p = GroupParams(*parameters)
    _check_grouped(x, p)
    rows = x.reshape(-1, x.shape[-1])
    kinds = float_dtypes(p.smooth_factor, *p.weight_scale, *p.proj_down, *p.proj_up, *p.bias)
    kinds = tuple(sorted(set(kinds), key=str))
    choice = choose("linear_w4a4_grouped", x.device, x.dtype, kinds)
    if choice.parameters is not None:
        ys = native_w4a4.linear_w4a4_grouped(choice.parameters, rows, p)
    elif choice.backend == "triton":
        ys = triton.w4a4().linear_w4a4_grouped(rows, p)
    elif choose("linear_w4a4", x.device, x.dtype, kinds).backend == "comfy_kitchen":
        ys = [_run_rows(rows, layer) for layer in p.layers]
    else:
        ys = reference.linear_w4a4_grouped(rows, *p)
    return [y.reshape(*x.shape[:-1], len(w)) for y, w in zip(ys, p.weight, strict=True)]


def _run_mlp(x: Tensor, *parameters) -> Tensor:
    p = MLPParams(*parameters)
    _check_mlp(x, p)
    rows = x.reshape(-1, x.shape[-1])
    choice = choose("mlp_w4a4", x.device, x.dtype, float_dtypes(*p[1:6], *p[7:12]))
    if choice.parameters is not None and native.fuses(x.device):
        y = native_w4a4.mlp_w4a4(choice.parameters, rows, p.first, p.second)
    else:
        hidden = torch.nn.functional.gelu(_run_rows(rows, p.first), approximate="tanh")
        y = _run_rows(hidden, p.second)
    return y.reshape(*x.shape[:-1], len(p.weight2))


# ---- gradients -----------------------------------------------------------------------------------


def _save(ctx: Any, inputs: tuple, output: Tensor) -> None:
    p = W4A4Params(*inputs[1:])
    ctx.save_for_backward(inputs[0], *p[:5])
    ctx.bias_dtype = None if p.bias is None else p.bias.dtype
    ctx.rotation = p.rotation


def _backward(ctx: Any, grad: Tensor) -> tuple:
    x, *kept = ctx.saved_tensors
    rows = grad.reshape(-1, grad.shape[-1])
    needs = (ctx.needs_input_grad[0], ctx.needs_input_grad[4], ctx.needs_input_grad[5])
    p = W4A4Params(*kept)._replace(rotation=ctx.rotation)
    grad_x, grad_down, grad_up = reference.linear_w4a4_grad(
        rows, x.reshape(-1, x.shape[-1]), p, needs
    )
    grad_x = None if grad_x is None else grad_x.reshape(x.shape)
    grads = (grad_x, None, None, None, grad_down, grad_up, grad_bias(ctx, rows, 6))
    return (*grads, None, None, None)


def fuses_mlp(device: torch.device, dtype: torch.dtype, parameters: tuple) -> bool:
    """Whether `mlp_w4a4` runs through the fused op for activations of a dtype and parameters of
    such dtypes, rather than as two linears.
    """
    fused = choose("mlp_w4a4", device, dtype, parameters).parameters is not None
    return fused and native.fuses(device)


linear_w4a4_op = register(
    "linear_w4a4", SCHEMAS["linear_w4a4"], _run_linear, _fake_linear, Gradient(_save, _backward)
)
linear_w4a4_grouped_op = register(
    "linear_w4a4_grouped", SCHEMAS["linear_w4a4_grouped"], _run_grouped, _fake_grouped
)
mlp_w4a4_op = register("mlp_w4a4", SCHEMAS["mlp_w4a4"], _run_mlp, _fake_mlp)


def _prepare_linear(x: Tensor, tensors: tuple, options: tuple) -> Call | None:
    p = W4A4Params(*tensors, *options)
    choice = choose("linear_w4a4", x.device, x.dtype, float_dtypes(*p[1:6]))
    if choice.parameters is None:
        return None
    operands = native_w4a4.layer_operands(p, choice.parameters)
    copied = any(ours is not theirs for ours, theirs in zip(operands, p, strict=True))
    return None if copied else native_w4a4.LinearCall(p, x.device)


_eager_linear = EagerOp(linear_w4a4_op, _prepare_linear)


# ---- the functions to call -----------------------------------------------------------------------


def linear_w4a4(  # noqa: PLR0913 - the schema's arguments
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    smooth_factor: Tensor,
    proj_down: Tensor,
    proj_up: Tensor,
    bias: Tensor | None = None,
    act_unsigned: bool = False,
    rotation: int = 0,
    unsigned_from: int = 0,
) -> Tensor:
    """A whole SVDQuant linear.

    Shapes:
        x (..., K), any float dtype · weight int8 (N, K/2) · weight_scale (K/64, N) · smooth_factor
        (K,) · proj_down (K, R) · proj_up (N, R) · bias (N,) or None, each in any float dtype ->
        (..., N) in x.dtype
    act_unsigned: x follows a GELU, codes are 0..15 and `bias` already holds -SHIFT * sum_k W[n, k]
        / smooth[k].
    rotation: 0, or 64 for a file whose weights were rotated per group.
    unsigned_from: 0, or the column from which on x follows a GELU, as where a linear reads
        attention and a GELU side by side (FLUX's linear2); beside neither of the other two.
    Raises ValueError naming the shapes and the rule that they break.
    """
    return _eager_linear(
        x,
        (weight, weight_scale, smooth_factor, proj_down, proj_up, bias),
        (act_unsigned, rotation, unsigned_from),
    )


def linear_w4a4_grouped(  # noqa: PLR0913 - the schema's arguments
    x: Tensor,
    smooth_factor: Tensor,
    weight: Sequence[Tensor],
    weight_scale: Sequence[Tensor],
    proj_down: Sequence[Tensor],
    proj_up: Sequence[Tensor],
    bias: Sequence[Tensor | None],
    act_unsigned: bool = False,
    rotation: int = 0,
) -> list[Tensor]:
    """Several linears of one x that share its smoothing (q, k, v), with x quantized once: a list of
    (..., N) in x.dtype.

    The lists hold for each linear what `linear_w4a4` takes. Where a gradient is needed, the linears
    run one by one.
    """
    lists = (weight, weight_scale, proj_down, proj_up, bias)
    if need_gradients(x, *proj_down, *proj_up, *bias):
        layers = GroupParams(smooth_factor, *lists, act_unsigned, rotation).layers
        return [linear_w4a4(x, *layer) for layer in layers]
    return linear_w4a4_grouped_op(x, smooth_factor, *lists, act_unsigned, rotation)


def mlp_w4a4(  # noqa: PLR0913 - two layers, and two flags of each
    x: Tensor,
    first: Sequence[Any],
    second: Sequence[Any],
    act_unsigned: bool = False,
    rotation: int = 0,
    act_unsigned2: bool = False,
    rotation2: int = 0,
) -> Tensor:
    """linear_w4a4 -> GELU (tanh approximation) -> linear_w4a4: x (..., K) -> (..., N of the second)
    in x.dtype.

    `first`, `second`: weight, weight_scale, smooth_factor, proj_down, proj_up, bias of each layer.
        The hidden activations of the compiled op are never stored. Where a gradient is needed, the
        two linears run one by one.
    """
    flags = (act_unsigned, rotation, act_unsigned2, rotation2)
    p = MLPParams(*(*first, *second, *flags))
    if need_gradients(x, *first, *second):
        hidden = torch.nn.functional.gelu(linear_w4a4(x, *p.first), approximate="tanh")
        return linear_w4a4(hidden, *p.second)
    return mlp_w4a4_op(x, *p)
