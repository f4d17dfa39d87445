"""Autograd of the whole linears: straight through the quantizer, to x, proj_down, proj_up and bias;
codes, scales, codebooks and smoothing are constants.

A backward pass dequantizes the weight once and keeps only the layer's inputs. It runs in plain
torch on every backend.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import reference, reference_vq


def save_w4a4(ctx, inputs, output) -> None:
    x, weight, weight_scale, smooth_factor, proj_down, proj_up, bias, _, rotation = inputs
    ctx.save_for_backward(x, weight, weight_scale, smooth_factor, proj_down, proj_up)
    ctx.bias_dtype = None if bias is None else bias.dtype
    ctx.rotation = rotation


def _grad_bias(ctx, grad: Tensor, position: int) -> Tensor | None:
    """Sum over tokens in float32 or wider, if asked for."""
    # The dispatcher drops trailing arguments that equal their defaults, so a bias of None may have
    # no entry at all.
    if ctx.bias_dtype is None or not ctx.needs_input_grad[position]:
        return None
    return grad.sum(0, dtype=torch.promote_types(grad.dtype, torch.float32)).to(ctx.bias_dtype)


def backward_w4a4(ctx, grad: Tensor):
    x, *parameters = ctx.saved_tensors
    rows = grad.reshape(-1, grad.shape[-1])
    needs = (ctx.needs_input_grad[0], ctx.needs_input_grad[4], ctx.needs_input_grad[5])
    grad_x, grad_down, grad_up = reference.linear_w4a4_grad(
        rows, x.reshape(-1, x.shape[-1]), *parameters, rotation=ctx.rotation, needs=needs
    )
    grad_x = None if grad_x is None else grad_x.reshape(x.shape)
    return grad_x, None, None, None, grad_down, grad_up, _grad_bias(ctx, rows, 6), None, None


def save_w4a16(ctx, inputs, output) -> None:
    _, weight, weight_scale, weight_zeros, bias = inputs
    ctx.save_for_backward(weight, weight_scale, weight_zeros)
    ctx.bias_dtype = None if bias is None else bias.dtype


def backward_w4a16(ctx, grad: Tensor):
    rows = grad.reshape(-1, grad.shape[-1])
    grad_x = None
    if ctx.needs_input_grad[0]:
        grad_x = reference.linear_w4a16_grad(rows, *ctx.saved_tensors)
        grad_x = grad_x.reshape(*grad.shape[:-1], grad_x.shape[-1])
    return grad_x, None, None, None, _grad_bias(ctx, rows, 4)


def save_gemm_vq(ctx, inputs, output) -> None:
    x, indices, codebook, scale, bias = inputs
    ctx.save_for_backward(x, indices, codebook, scale)
    ctx.bias_dtype = None if bias is None else bias.dtype


def backward_gemm_vq(ctx, grad: Tensor):
    grad_x = None
    if ctx.needs_input_grad[0]:
        grad_x = reference_vq.linear_vq_grad(
            grad, *ctx.saved_tensors, None, None, 0, (True, False, False)
        )[0]
    return grad_x, None, None, None, _grad_bias(ctx, grad, 4)


def save_linear_vq(ctx, inputs, output) -> None:
    x, indices, codebook, scale, proj_down, proj_up, bias, rotation = inputs
    ctx.save_for_backward(x, indices, codebook, scale, proj_down, proj_up)
    ctx.bias_dtype = None if bias is None else bias.dtype
    ctx.rotation = rotation


def backward_linear_vq(ctx, grad: Tensor):
    x, *parameters = ctx.saved_tensors
    rows = grad.reshape(-1, grad.shape[-1])
    asked = [*ctx.needs_input_grad, *[False] * (8 - len(ctx.needs_input_grad))]
    grad_x, grad_down, grad_up = reference_vq.linear_vq_grad(
        rows, x.reshape(-1, x.shape[-1]), *parameters, ctx.rotation, (asked[0], asked[4], asked[5])
    )
    grad_x = None if grad_x is None else grad_x.reshape(x.shape)
    return grad_x, None, None, None, grad_down, grad_up, _grad_bias(ctx, rows, 6), None
