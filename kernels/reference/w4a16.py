"""Linears whose weights alone have 4 bits, in plain torch.

    y = x . ((W4 - 8) * weight_scale + weight_zeros)^T + bias      AWQ, arXiv 2306.00978

Arithmetic is float32, or float64 where x is float64. On CUDA a bfloat16 x keeps bfloat16 operands
for the product, because tensor cores accumulate it in float32 anyway.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .nibbles import compute_dtype, dequantize_w4_zeros, operand_dtype


def gemv_w4a16(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    weight_zeros: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """x . ((W4 - 8) * weight_scale + weight_zeros)^T + bias. The same formula for few tokens and,
    under the name `gemm_w4a16`, for many.

    Shapes: x (M, K) · weight int8 (N, K/2), codes 0..15 · weight_scale (K/64, N) · weight_zeros
        (K/64, N) or None · bias (N,) or None -> (M, N) in x.dtype
    """
    dtype = operand_dtype(x)
    dense = dequantize_w4_zeros(weight, weight_scale, weight_zeros, compute_dtype(x)).to(dtype)
    return torch.nn.functional.linear(
        x.to(dtype), dense, None if bias is None else bias.to(dtype)
    ).to(x.dtype)


gemm_w4a16 = gemv_w4a16


def linear_w4a16_grad(
    grad: Tensor, weight: Tensor, weight_scale: Tensor, weight_zeros: Tensor | None
) -> Tensor:
    """Gradient of `gemv_w4a16` to x. Shapes: grad (M, N) -> (M, K) in grad's dtype, which is that
    of x.
    """
    dtype = operand_dtype(grad)
    return (
        grad.to(dtype)
        @ dequantize_w4_zeros(weight, weight_scale, weight_zeros, compute_dtype(grad)).to(dtype)
    ).to(grad.dtype)
