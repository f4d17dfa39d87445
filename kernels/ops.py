"""Every op once: schema, fake, autograd, and the choice native -> comfy_kitchen -> reference.

The functions here are the ones to call. Each goes through torch's dispatcher (`torch.ops.nibble.*`), so torch.compile sees
one opaque node, `torch.inference_mode` and FakeTensor work, and `linear_w4a4` and `linear_w4a16` have gradients (straight
through the quantizer: to x, proj_down, proj_up and bias; codes, scales and smoothing are constants).

torch keeps one registry a process. A second copy of this package (ComfyUI's folder beside an installed one) finds the ops
registered and uses them; if its schemas differ it refuses to load, because the two copies would call each other's code.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable

import torch
from torch import Tensor

from . import kitchen, native, reference
from .reference import GROUP

log = logging.getLogger("nibble")

_LINEAR_W4A4 = "Tensor weight, Tensor weight_scale, Tensor smooth_factor, Tensor proj_down, Tensor proj_up, Tensor? bias=None"
_LINEAR_W4A16 = "Tensor x, Tensor weight, Tensor weight_scale, Tensor? weight_zeros=None, Tensor? bias=None"
SCHEMAS = {
    "quantize_down": "(Tensor x, Tensor smooth_factor, Tensor proj_down, bool act_unsigned=False, int rotation=0) "
    "-> (Tensor, Tensor, Tensor)",
    "gemm_w4a4_up": "(Tensor q, Tensor ascales, Tensor h, Tensor weight, Tensor weight_scale, Tensor proj_up, Tensor? bias=None, "
    "bool act_unsigned=False, ScalarType? out_dtype=None) -> Tensor",
    "gemv_w4a16": f"({_LINEAR_W4A16}) -> Tensor",
    "linear_w4a4": f"(Tensor x, {_LINEAR_W4A4}, bool act_unsigned=False, int rotation=0) -> Tensor",
    "linear_w4a16": f"({_LINEAR_W4A16}) -> Tensor",
}


# ---- dispatch ------------------------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=256)
def _choose(op: str, device: torch.device, dtype: torch.dtype) -> tuple[str, str]:
    needed = {"linear_w4a4": ("quantize_down", "gemm_w4a4_up"), "linear_w4a16": ("gemv_w4a16",)}.get(op, (op,))
    if set(needed) <= set(native.table(device.type)):
        return "native", native.module()[1]
    use, why = kitchen.decide(op, device, dtype)
    backend = "comfy_kitchen" if use else "reference"
    log.debug("%s on %s in %s: %s (%s; %s)", op, device, dtype, backend, native.module()[1], why)
    return backend, why if use else f"{native.module()[1]}; {why}"


def which(op: str, device: torch.device | str, dtype: torch.dtype = torch.bfloat16) -> tuple[str, str]:
    """The backend that runs `op` for activations of `dtype` on `device`, and the reason in words.

    Returns ("native" | "comfy_kitchen" | "reference", reason). Raises ValueError for an op that is not ours.
    """
    if op not in SCHEMAS:
        raise ValueError(f"unknown op {op!r}: the ops are {', '.join(SCHEMAS)}")
    return _choose(op, torch.device(device), dtype)


def _quantize_down(x: Tensor, smooth_factor: Tensor, proj_down: Tensor, act_unsigned: bool = False, rotation: int = 0):
    _check_quantize(x, smooth_factor, proj_down, act_unsigned, rotation)
    backend, _ = _choose("quantize_down", x.device, x.dtype)
    run = native.table(x.device.type)["quantize_down"] if backend == "native" else reference.quantize_down
    return run(x, smooth_factor, proj_down, act_unsigned, rotation)


def _gemm_w4a4_up(q, ascales, h, weight, weight_scale, proj_up, bias=None, act_unsigned=False, out_dtype=None):
    _check_gemm(q, ascales, h, weight, weight_scale, proj_up, bias)
    backend, _ = _choose("gemm_w4a4_up", q.device, ascales.dtype)
    run = native.table(q.device.type)["gemm_w4a4_up"] if backend == "native" else reference.gemm_w4a4_up
    return run(q, ascales, h, weight, weight_scale, proj_up, bias, act_unsigned).to(out_dtype or ascales.dtype)


def _gemv_w4a16(x: Tensor, weight: Tensor, weight_scale: Tensor, weight_zeros: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
    if x.dim() != 2:
        raise ValueError(f"gemv_w4a16 takes x (M, K), not {tuple(x.shape)}; linear_w4a16 takes any leading shape")
    _check_w4a16(x, weight, weight_scale, weight_zeros, bias)
    return _run_w4a16(x, weight, weight_scale, weight_zeros, bias)


def _run_w4a16(x: Tensor, *parameters: Tensor | None) -> Tensor:
    backend, _ = _choose("gemv_w4a16", x.device, x.dtype)
    if backend == "native":
        return native.table(x.device.type)["gemv_w4a16"](x, *parameters)
    if backend == "comfy_kitchen" and len(x):
        return kitchen.gemv_w4a16(x, *parameters)
    return reference.gemv_w4a16(x, *parameters)


def _linear_w4a16(x: Tensor, weight: Tensor, weight_scale: Tensor, weight_zeros: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
    _check_w4a16(x, weight, weight_scale, weight_zeros, bias)
    return _run_w4a16(x.reshape(-1, x.shape[-1]), weight, weight_scale, weight_zeros, bias).reshape(*x.shape[:-1], len(weight))


def _linear_w4a4(
    x, weight, weight_scale, smooth_factor, proj_down, proj_up, bias=None, act_unsigned: bool = False, rotation: int = 0
) -> Tensor:
    _check_w4a4(x, weight, weight_scale, smooth_factor, proj_down, proj_up, bias, act_unsigned, rotation)
    rows = x.reshape(-1, x.shape[-1])
    backend, _ = _choose("linear_w4a4", x.device, x.dtype)
    if backend == "native":
        compiled = native.table(x.device.type)
        q, ascales, h = compiled["quantize_down"](rows, smooth_factor, proj_down, act_unsigned, rotation)
        y = compiled["gemm_w4a4_up"](q, ascales, h, weight, weight_scale, proj_up, bias, act_unsigned).to(x.dtype)
    else:
        # comfy_kitchen's kernels are not made for an empty batch or for rank 0.
        use_kitchen = backend == "comfy_kitchen" and len(rows) and proj_down.shape[1]
        run = kitchen.linear_w4a4 if use_kitchen else reference.linear_w4a4
        y = run(rows, weight, weight_scale, smooth_factor, proj_down, proj_up, bias, act_unsigned, rotation)
    return y.reshape(*x.shape[:-1], len(weight))


# ---- what is refused -----------------------------------------------------------------------------------------------


def _check_x(x: Tensor) -> int:
    if x.dim() == 0 or not x.is_floating_point():
        raise ValueError(f"x must be a floating-point tensor (..., K), not {x.dtype} {tuple(x.shape)}")
    if x.shape[-1] % GROUP:
        raise ValueError(f"K={x.shape[-1]} is not a multiple of the group size {GROUP}")
    return x.shape[-1]


def _check_weight(weight: Tensor, k: int) -> int:
    if weight.dtype != torch.int8 or weight.dim() != 2:
        raise ValueError(f"weight must be packed int8 (N, K/2), not {weight.dtype} {tuple(weight.shape)}")
    if weight.shape[1] * 2 != k:
        raise ValueError(f"weight {tuple(weight.shape)} holds K={weight.shape[1] * 2} columns and x has K={k}")
    return weight.shape[0]


def _check_shape(name: str, tensor: Tensor | None, rule: str, *shape: int) -> None:
    if tensor is not None and tensor.shape != shape:
        raise ValueError(f"{name} is {tuple(tensor.shape)} and must be {rule} = {tuple(shape)}")


def _check_quantize(x: Tensor, smooth_factor: Tensor, proj_down: Tensor, act_unsigned: bool, rotation: int) -> None:
    reference.check_flags(act_unsigned, rotation)
    k = _check_x(x)
    if x.dim() != 2:
        raise ValueError(f"quantize_down takes x (M, K), not {tuple(x.shape)}")
    _check_shape("smooth_factor", smooth_factor, "(K,)", k)
    _check_shape("proj_down", proj_down, "(K, R)", k, *proj_down.shape[1:2])


def _check_gemm(q: Tensor, ascales: Tensor, h: Tensor, weight: Tensor, weight_scale: Tensor, proj_up: Tensor, bias: Tensor | None) -> None:
    if q.dtype != torch.int8 or q.dim() != 2:
        raise ValueError(f"q must be packed int8 (M, K/2), not {q.dtype} {tuple(q.shape)}")
    m, k = q.shape[0], q.shape[1] * 2
    if k % GROUP:
        raise ValueError(f"K={k} is not a multiple of the group size {GROUP}")
    n = _check_weight(weight, k)
    _check_shape("ascales", ascales, "(K/64, M)", k // GROUP, m)
    _check_shape("weight_scale", weight_scale, "(K/64, N)", k // GROUP, n)
    _check_shape("h", h, "(M, R)", m, *proj_up.shape[1:2])
    _check_shape("proj_up", proj_up, "(N, R)", n, *proj_up.shape[1:2])
    _check_shape("bias", bias, "(N,)", n)


def _check_w4a16(x: Tensor, weight: Tensor, weight_scale: Tensor, weight_zeros: Tensor | None, bias: Tensor | None) -> None:
    k = _check_x(x)
    n = _check_weight(weight, k)
    _check_shape("weight_scale", weight_scale, "(K/64, N)", k // GROUP, n)
    _check_shape("weight_zeros", weight_zeros, "(K/64, N)", k // GROUP, n)
    _check_shape("bias", bias, "(N,)", n)


def _check_w4a4(x, weight, weight_scale, smooth_factor, proj_down, proj_up, bias, act_unsigned: bool, rotation: int) -> None:
    reference.check_flags(act_unsigned, rotation)
    k = _check_x(x)
    n = _check_weight(weight, k)
    _check_shape("weight_scale", weight_scale, "(K/64, N)", k // GROUP, n)
    _check_shape("smooth_factor", smooth_factor, "(K,)", k)
    _check_shape("proj_down", proj_down, "(K, R)", k, *proj_down.shape[1:2])
    _check_shape("proj_up", proj_up, "(N, R)", n, *proj_down.shape[1:2])
    _check_shape("bias", bias, "(N,)", n)


# ---- fakes: the shapes and dtypes of results, after the same refusals ----------------------------------------------------


def _fake_quantize_down(x, smooth_factor, proj_down, act_unsigned=False, rotation=0):
    _check_quantize(x, smooth_factor, proj_down, act_unsigned, rotation)
    (m, k), dtype = x.shape, reference.compute_dtype(x)
    return (
        x.new_empty((m, k // 2), dtype=torch.int8),
        x.new_empty((k // GROUP, m), dtype=dtype),
        x.new_empty((m, proj_down.shape[1]), dtype=dtype),
    )


def _fake_gemm_w4a4_up(q, ascales, h, weight, weight_scale, proj_up, bias=None, act_unsigned=False, out_dtype=None):
    _check_gemm(q, ascales, h, weight, weight_scale, proj_up, bias)
    return ascales.new_empty((q.shape[0], weight.shape[0]), dtype=out_dtype or ascales.dtype)


def _fake_linear_w4a16(x, weight, weight_scale, weight_zeros=None, bias=None):
    _check_w4a16(x, weight, weight_scale, weight_zeros, bias)
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


def _fake_linear_w4a4(
    x, weight, weight_scale, smooth_factor, proj_down, proj_up, bias=None, act_unsigned: bool = False, rotation: int = 0
):
    _check_w4a4(x, weight, weight_scale, smooth_factor, proj_down, proj_up, bias, act_unsigned, rotation)
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


# ---- autograd ------------------------------------------------------------------------------------------------------


def _save_w4a4(ctx, inputs, output) -> None:
    x, weight, weight_scale, smooth_factor, proj_down, proj_up, bias, _, rotation = inputs
    ctx.save_for_backward(x, weight, weight_scale, smooth_factor, proj_down, proj_up)
    ctx.bias_dtype = None if bias is None else bias.dtype
    ctx.rotation = rotation


def _grad_bias(ctx, grad: Tensor, position: int) -> Tensor | None:
    """Sum over tokens in float32 or wider, if asked for."""
    # The dispatcher drops trailing arguments that equal their defaults, so a bias of None may have no entry at all.
    if ctx.bias_dtype is None or not ctx.needs_input_grad[position]:
        return None
    return grad.sum(0, dtype=torch.promote_types(grad.dtype, torch.float32)).to(ctx.bias_dtype)


def _backward_w4a4(ctx, grad: Tensor):
    x, *parameters = ctx.saved_tensors
    rows = grad.reshape(-1, grad.shape[-1])
    needs = (ctx.needs_input_grad[0], ctx.needs_input_grad[4], ctx.needs_input_grad[5])
    grad_x, grad_down, grad_up = reference.linear_w4a4_grad(
        rows, x.reshape(-1, x.shape[-1]), *parameters, rotation=ctx.rotation, needs=needs
    )
    grad_x = None if grad_x is None else grad_x.reshape(x.shape)
    return grad_x, None, None, None, grad_down, grad_up, _grad_bias(ctx, rows, 6), None, None


def _save_w4a16(ctx, inputs, output) -> None:
    _, weight, weight_scale, weight_zeros, bias = inputs
    ctx.save_for_backward(weight, weight_scale, weight_zeros)
    ctx.bias_dtype = None if bias is None else bias.dtype


def _backward_w4a16(ctx, grad: Tensor):
    rows = grad.reshape(-1, grad.shape[-1])
    grad_x = None
    if ctx.needs_input_grad[0]:
        grad_x = reference.linear_w4a16_grad(rows, *ctx.saved_tensors)
        grad_x = grad_x.reshape(*grad.shape[:-1], grad_x.shape[-1])
    return grad_x, None, None, None, _grad_bias(ctx, rows, 4)


# ---- registration --------------------------------------------------------------------------------------------------


def _register(op: str, run: Callable, fake: Callable, backward: Callable | None = None, save: Callable | None = None):
    """Define one op, or find it defined by another copy of this package with the same schema. Returns its overload."""
    name, schema = f"nibble::{op}", torch._C.parse_schema(f"nibble::{op}{SCHEMAS[op]}")
    found = getattr(torch.ops.nibble, op, None)
    if found is None:
        torch.library.define(name, SCHEMAS[op], tags=(torch.Tag.pt2_compliant_tag,))
        torch.library.impl(name, "default", run)
        torch.library.register_fake(name, fake)
        if backward is not None:
            torch.library.register_autograd(name, backward, setup_context=save)
    elif found.default._schema != schema:
        raise ImportError(
            f"another version of Nibble in this process defines {found.default._schema} where this one has {schema}: "
            "keep only one of the two installations"
        )
    return getattr(torch.ops.nibble, op).default


quantize_down_op = _register("quantize_down", _quantize_down, _fake_quantize_down)
gemm_w4a4_up_op = _register("gemm_w4a4_up", _gemm_w4a4_up, _fake_gemm_w4a4_up)
gemv_w4a16_op = _register("gemv_w4a16", _gemv_w4a16, _fake_linear_w4a16, _backward_w4a16, _save_w4a16)
linear_w4a4_op = _register("linear_w4a4", _linear_w4a4, _fake_linear_w4a4, _backward_w4a4, _save_w4a4)
linear_w4a16_op = _register("linear_w4a16", _linear_w4a16, _fake_linear_w4a16, _backward_w4a16, _save_w4a16)


def quantize_down(
    x: Tensor, smooth_factor: Tensor, proj_down: Tensor, act_unsigned: bool = False, rotation: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """int4 codes, their scales and x . proj_down: see `reference.quantize_down`. Has no gradient; `linear_w4a4` does."""
    return quantize_down_op(x, smooth_factor, proj_down, act_unsigned, rotation)


def gemm_w4a4_up(
    q: Tensor,
    ascales: Tensor,
    h: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    proj_up: Tensor,
    bias: Tensor | None = None,
    act_unsigned: bool = False,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """int4 product + low-rank up + bias: see `reference.gemm_w4a4_up`. (M, N) in `out_dtype`, by default that of ascales."""
    return gemm_w4a4_up_op(q, ascales, h, weight, weight_scale, proj_up, bias, act_unsigned, out_dtype)


def gemv_w4a16(x: Tensor, weight: Tensor, weight_scale: Tensor, weight_zeros: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
    """4-bit weights, with zero points or symmetric, 16-bit x (M, K): see `reference.gemv_w4a16`."""
    return gemv_w4a16_op(x, weight, weight_scale, weight_zeros, bias)


def linear_w4a4(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    smooth_factor: Tensor,
    proj_down: Tensor,
    proj_up: Tensor,
    bias: Tensor | None = None,
    act_unsigned: bool = False,
    rotation: int = 0,
) -> Tensor:
    """A whole SVDQuant linear.

    Shapes:
        x (..., K), any float dtype · weight int8 (N, K/2) · weight_scale (K/64, N) · smooth_factor (K,)
        proj_down (K, R) · proj_up (N, R) · bias (N,) or None, each in any float dtype -> (..., N) in x.dtype
    act_unsigned: x follows a GELU, codes are 0..15 and `bias` already holds -SHIFT * sum_k W[n, k] / smooth[k].
    rotation: 0, or 64 for a file whose weights were rotated per group.
    Raises ValueError naming the shapes and the rule that they break.
    """
    return linear_w4a4_op(x, weight, weight_scale, smooth_factor, proj_down, proj_up, bias, act_unsigned, rotation)


def linear_w4a16(x: Tensor, weight: Tensor, weight_scale: Tensor, weight_zeros: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
    """A whole 4-bit-weight linear: x (..., K) -> (..., N) in x.dtype; parameters as in `reference.gemv_w4a16`."""
    return linear_w4a16_op(x, weight, weight_scale, weight_zeros, bias)
