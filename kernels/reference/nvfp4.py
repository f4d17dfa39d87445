"""Linears of 4-bit floats (NVFP4) with a low-rank branch, in plain torch.

    y = (Q(x / smooth) . (E2M1 * weight_scale)^T) * weight_scale_2
        + (x . proj_down) . proj_up^T + bias

A number is one of 0, .5, 1, 1.5, 2, 3, 4, 6 with a sign (e2m1); 16 neighbouring columns share a
scale, an 8-bit float (e4m3). Activations have no scale besides:

    s = e4m3(min(absmax16 / 6, 448))      code = e2m1(v * 6 / absmax16), ties to even

as Nunchaku computes its published files (gemm_w4a4.cuh, quantize_w4a4_fp4_from_fpsum_warp); there
the code is taken by the scale before its rounding, with `rounded` by the scale that the product
uses, which loses less. Nunchaku rounds to 16 bits between the steps; here float32 (float64 where x
is) is kept to the end.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .nibbles import compute_dtype, operand_dtype

COLUMNS = 16
LARGEST = 6.0
LARGEST_SCALE = 448.0
LEVELS = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_MIDDLES = (0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0)


def e2m1_codes(x: Tensor) -> Tensor:
    """Nearest codes 0..15 (int64) of numbers, ties to the even code; bit 3 is the sign, and what is
    beyond 6 becomes 6.
    """
    middles = torch.tensor(_MIDDLES, dtype=x.dtype, device=x.device)
    size = x.abs().contiguous()
    up = torch.bucketize(size, middles, right=True)
    down = torch.bucketize(size, middles)  # another one on ties only
    return torch.where(up % 2 == 0, up, down) + 8 * torch.signbit(x)


def e2m1_values(codes: Tensor, dtype: torch.dtype) -> Tensor:
    """Codes 0..15 as numbers."""
    levels = (*LEVELS, *(-level for level in LEVELS))
    return torch.tensor(levels, dtype=dtype, device=codes.device)[codes]


def quantize_nvfp4(v: Tensor, rounded: bool = False) -> tuple[Tensor, Tensor]:
    """v (..., K) → codes int64 (..., K), scales e4m3 (..., K/16)."""
    groups = v.unflatten(-1, (-1, COLUMNS))
    exact = (groups.abs().amax(-1, keepdim=True) / LARGEST).clamp_max(LARGEST_SCALE)
    scale = exact.float().to(torch.float8_e4m3fn)
    by = scale.to(v.dtype) if rounded else exact
    codes = e2m1_codes(groups / torch.where(by == 0, torch.inf, by))
    return codes.flatten(-2), scale.squeeze(-1)


def dequantize_nvfp4(codes: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Codes (..., K) under scales (..., K/16) as numbers."""
    groups = e2m1_values(codes, dtype).unflatten(-1, (-1, COLUMNS))
    return (groups * scale.to(dtype)[..., None]).flatten(-2)


def decoded_weight(weight: Tensor, weight_scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Packed int8 (N, K/2), low nibble = even column, scales e4m3 (N, K/16) → (N, K)."""
    raw = weight.view(torch.uint8)
    codes = torch.stack([raw & 15, raw >> 4], -1).flatten(-2)
    return dequantize_nvfp4(codes.long(), weight_scale, dtype)


def linear_nvfp4(  # noqa: PLR0913 - an op's operands
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    weight_scale_2: Tensor,
    smooth_factor: Tensor,
    proj_down: Tensor,
    proj_up: Tensor,
    bias: Tensor | None = None,
    rounded: bool = False,
) -> Tensor:
    """The formula above.

    Shapes: x (M, K) · weight int8 (N, K/2) · weight_scale e4m3 (N, K/16) · weight_scale_2 (N,) ·
        smooth_factor (K,) · proj_down (K, R) · proj_up (N, R) · bias (N,) or None -> (M, N) in
        x.dtype
    """
    dtype = compute_dtype(x)
    wide = x.to(dtype)
    codes, scale = quantize_nvfp4(wide / smooth_factor.to(dtype), rounded)
    y = dequantize_nvfp4(codes, scale, dtype) @ decoded_weight(weight, weight_scale, dtype).t()
    return finished(y, wide, weight_scale_2, proj_down, proj_up, bias).to(x.dtype)


def finished(
    y: Tensor,
    x: Tensor,
    weight_scale_2: Tensor,
    proj_down: Tensor,
    proj_up: Tensor,
    bias: Tensor | None,
) -> Tensor:
    """A product y (M, N) scaled, with the low-rank branch of x (M, K) and the bias, in x's
    dtype.
    """
    dtype = x.dtype
    y = y.to(dtype) * weight_scale_2.to(dtype) + (x @ proj_down.to(dtype)) @ proj_up.to(dtype).t()
    return y if bias is None else y + bias.to(dtype)


def linear_nvfp4_decoded(  # noqa: PLR0913 - an op's operands
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    weight_scale_2: Tensor,
    smooth_factor: Tensor,
    proj_down: Tensor,
    proj_up: Tensor,
    bias: Tensor | None = None,
    rounded: bool = False,
) -> Tensor:
    """The same linear with activations left as they are: for GPUs that have no 4-bit floats."""
    dtype = operand_dtype(x)
    wide = x.to(dtype)
    y = (wide / smooth_factor.to(dtype)) @ decoded_weight(weight, weight_scale, dtype).t()
    return finished(y, wide, weight_scale_2, proj_down, proj_up, bias).to(x.dtype)


def linear_nvfp4_grad(
    grad: Tensor, x: Tensor, parameters: tuple[Tensor, ...], needs: tuple[bool, bool, bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of `linear_nvfp4` to (x, proj_down, proj_up), straight through the quantizer, each
    only where `needs` asks for it. parameters: those of `linear_nvfp4` up to proj_up.
    """
    weight, weight_scale, weight_scale_2, smooth_factor, *factors = parameters
    dtype = operand_dtype(x)
    grad, xd = grad.to(dtype), x.to(dtype)
    down, up = (factor.to(dtype) for factor in factors)
    grad_x = grad_down = grad_up = None
    if needs[0]:
        main = (grad * weight_scale_2.to(dtype)) @ decoded_weight(weight, weight_scale, dtype)
        grad_x = (main / smooth_factor.to(dtype) + (grad @ up) @ down.t()).to(x.dtype)
    if needs[1]:
        grad_down = (xd.t() @ (grad @ up)).to(factors[0].dtype)
    if needs[2]:
        grad_up = (grad.t() @ (xd @ down)).to(factors[1].dtype)
    return grad_x, grad_down, grad_up
