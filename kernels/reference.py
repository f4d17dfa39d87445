"""Every op in plain torch: the truth that the compiled versions are compared with, and the CPU path
that users run.

    y = Q(x / smooth) . (W4 * weight_scale)^T + (x . proj_down) . proj_up^T + bias
      SVDQuant, arXiv 2411.05007, eq. 3 and 9
    y = x . ((W4 - 8) * weight_scale + weight_zeros)^T + bias                                AWQ,
      arXiv 2306.00978

Arithmetic is float32, or float64 where x is float64. On CUDA a bfloat16 x keeps bfloat16 *operands*
for the large product, because tensor cores accumulate it in float32 anyway. Letters for shapes are
explained in the package's docstring.

The dequantized product is as exact as the integer one: a code times a bfloat16 scale has 4 + 8
significant bits and is exact in float32, and an int4 x int4 sum over a group is at most 64 * 15 * 8
= 7680, far below 2^24. What is left is the rounding of the float32 accumulation across groups,
which the integer kernels have as well.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

GROUP = 64
"""Columns of K that share one scale."""

SHIFT = 0.171875
"""Added to activations that follow a GELU (whose minimum is -0.17) so that codes 0..15 cover them;
exact in bfloat16.
"""

SIGNED_MAX = 7
UNSIGNED_MAX = 15
FLIP_HIGHEST_BITS = -120  # 0x88 as int8


def compute_dtype(x: Tensor) -> torch.dtype:
    """float64 for float64 input, float32 for every other."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def operand_dtype(x: Tensor) -> torch.dtype:
    """dtype of the large product's operands. float16 is widened: a de-smoothed outlier may pass its
    65504.
    """
    return torch.bfloat16 if x.is_cuda and x.dtype == torch.bfloat16 else compute_dtype(x)


# ---- nibbles -------------------------------------------------------------------------------------


def pack_nibbles(codes: Tensor) -> Tensor:
    """(..., K) integers -> (..., K/2) int8; the low nibble is the even column. Only the lowest four
    bits are read.
    """
    codes = codes.to(torch.int8)
    return (codes[..., 0::2] & 0x0F) | (codes[..., 1::2] << 4)


def unpack_nibbles(packed: Tensor, signed: bool, dtype: torch.dtype = torch.int8) -> Tensor:
    """Inverse of `pack_nibbles`: (..., K/2) int8 -> (..., K) in `dtype`, -8..7 if signed, else
    0..15.
    """
    # Two shifts and two strided writes: as fast as a 256-entry table of pairs on CPU, and it needs
    # no index tensor.
    codes = packed.new_empty((*packed.shape, 2), dtype=dtype)
    codes[..., 0] = (packed << 4) >> 4 if signed else packed & 0x0F
    codes[..., 1] = packed >> 4 if signed else (packed >> 4) & 0x0F
    return codes.flatten(-2)


def _per_group(values: Tensor, dtype: torch.dtype) -> Tensor:
    """(K/64, N) -> (N, K/64, 1), ready to broadcast over groups of an (N, K/64, 64) view."""
    return values.t().to(dtype).unsqueeze(-1)


def dequantize_w4(
    weight: Tensor, weight_scale: Tensor, dtype: torch.dtype = torch.float32
) -> Tensor:
    """W4 * weight_scale.

    Shapes: weight int8 (N, K/2), codes -8..7; weight_scale (K/64, N) -> (N, K) in `dtype`.
    """
    codes = unpack_nibbles(weight, True, dtype)
    return codes.unflatten(-1, (-1, GROUP)).mul_(_per_group(weight_scale, dtype)).flatten(-2)


def dequantize_w4_zeros(
    weight: Tensor,
    weight_scale: Tensor,
    weight_zeros: Tensor | None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """(W4 - 8) * weight_scale + weight_zeros; without zeros the weights are symmetric.

    Shapes: weight int8 (N, K/2), codes 0..15; weight_scale, weight_zeros (K/64, N) -> (N, K) in
        `dtype`.
    """
    # Flipping the highest bit of a nibble turns an unsigned code u into the signed code u - 8: one
    # pass over floats less.
    codes = unpack_nibbles(weight ^ FLIP_HIGHEST_BITS, True, dtype).unflatten(-1, (-1, GROUP))
    codes = codes.mul_(_per_group(weight_scale, dtype))
    return (codes if weight_zeros is None else codes.add_(_per_group(weight_zeros, dtype))).flatten(
        -2
    )


def check_flags(act_unsigned: bool, rotation: int) -> None:
    """Raises ValueError for a rotation other than 0 and 64, and for unsigned codes of rotated
    (hence signed) values.
    """
    if rotation not in (0, GROUP):
        raise ValueError(f"rotation={rotation} is neither 0 nor the group size {GROUP}")
    if rotation and act_unsigned:
        raise ValueError(
            f"act_unsigned and rotation={rotation} exclude one another: rotated activations have"
            " both signs"
        )


# ---- activations ---------------------------------------------------------------------------------


def _sylvester(device: torch.device | str) -> Tensor:
    """H[i, j] = (-1)^popcount(i & j) / 8, (64, 64) float32, made on the device: no copy from the
    host, so CUDA graphs can capture it.
    """
    i = torch.arange(GROUP, device=device)
    bits = i[:, None] & i[None, :]
    bits = bits ^ (bits >> 4)
    bits = bits ^ (bits >> 2)
    return (0.125 - 0.25 * ((bits ^ (bits >> 1)) & 1)).float()


with torch.inference_mode(False):
    _SYLVESTER_CPU = _sylvester("cpu")


def hadamard64(x: Tensor) -> Tensor:
    """Orthonormal 64-point Hadamard transform (Sylvester order) of each group of 64 along the last
    axis; its own inverse.

    Shapes: x (..., K) any float dtype -> (..., K) same dtype; 16-bit input is transformed in
        float32.
    """
    # Making the matrix costs more than a small product on CPU. Fake and functional tensors must not
    # meet a real constant.
    matrix = (
        _SYLVESTER_CPU if type(x) is Tensor and x.device.type == "cpu" else _sylvester(x.device)
    )
    dtype = compute_dtype(x)
    return (x.to(dtype).unflatten(-1, (-1, GROUP)) @ matrix.to(dtype)).flatten(-2).to(x.dtype)


def _quantize_groups_of(
    x: Tensor, smooth_factor: Tensor, act_unsigned: bool, rotation: int
) -> tuple[Tensor, Tensor]:
    """Smoothed, rotated, rounded: x (M, K) in compute dtype -> float codes (M, K/64, 64), scale (M,
    K/64, 1).
    """
    check_flags(act_unsigned, rotation)
    smooth = smooth_factor.to(x.dtype)
    xs = (x + SHIFT).div_(smooth) if act_unsigned else x / smooth
    if rotation:
        xs = hadamard64(xs)
    groups = xs.unflatten(-1, (-1, GROUP))
    if act_unsigned:
        scale = groups.amax(-1, keepdim=True).clamp_min_(0) / UNSIGNED_MAX
    else:
        scale = groups.abs().amax(-1, keepdim=True) / SIGNED_MAX
    # A group of zeros has scale 0; dividing by the smallest normal number instead gives codes 0 and
    # never 0/0.
    codes = groups.div_(scale.clamp_min(torch.finfo(scale.dtype).tiny)).round_()
    return (codes.clamp_min_(0) if act_unsigned else codes), scale


def quantize_down(
    x: Tensor,
    smooth_factor: Tensor,
    proj_down: Tensor,
    act_unsigned: bool = False,
    rotation: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    """x -> int4 codes, their scales, and the input of the low-rank branch, in one read of x.

    Signed: scale = absmax / 7, codes -7..7. Unsigned: x + SHIFT, scale = max / 15, codes 0..15.
        Rounded half to even.
    A NaN or infinity in x makes the scale of its own group NaN or infinite and touches no other
    token.

    Shapes:
        x (M, K) · smooth_factor (K,) · proj_down (K, R)
        -> q int8 (M, K/2), low nibble = even column · ascales float32 (K/64, M) · h float32 (M, R)
        from the raw x
    """
    x = x.to(compute_dtype(x))
    codes, scale = _quantize_groups_of(x, smooth_factor, act_unsigned, rotation)
    q = pack_nibbles(codes.nan_to_num_(0, UNSIGNED_MAX, -SIGNED_MAX).to(torch.int8).flatten(-2))
    return q, scale.squeeze(-1).t().contiguous(), x @ proj_down.to(x.dtype)


# ---- products ------------------------------------------------------------------------------------


def _matmul_up(
    act: Tensor, weight: Tensor, h: Tensor, proj_up: Tensor, bias: Tensor | None
) -> Tensor:
    """act . weight^T + h . proj_up^T + bias; the low-rank part comes first so that the large
    product adds onto it once.
    """
    if h.shape[-1] == 0:
        return torch.nn.functional.linear(act, weight, None if bias is None else bias.to(act.dtype))
    y = torch.nn.functional.linear(
        h, proj_up.to(h.dtype), None if bias is None else bias.to(h.dtype)
    )
    return y.to(act.dtype).addmm_(act, weight.t())


def gemm_w4a4_up(
    q: Tensor,
    ascales: Tensor,
    h: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    proj_up: Tensor,
    bias: Tensor | None = None,
    act_unsigned: bool = False,
) -> Tensor:
    """int4 product, group scales, low-rank up-projection and bias.

    Shapes:
        q int8 (M, K/2) · ascales (K/64, M) · h (M, R) · weight int8 (N, K/2), codes -8..7 ·
        weight_scale (K/64, N) proj_up (N, R) · bias (N,) or None -> (M, N) float32, float64 if
        ascales is float64
    """
    dtype = compute_dtype(ascales)
    act = (
        unpack_nibbles(q, not act_unsigned, dtype)
        .unflatten(-1, (-1, GROUP))
        .mul_(_per_group(ascales, dtype))
        .flatten(-2)
    )
    return _matmul_up(act, dequantize_w4(weight, weight_scale, dtype), h.to(dtype), proj_up, bias)


def gemm_w4a4_up_gelu_quantize_down(
    q: Tensor,
    ascales: Tensor,
    h: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    proj_up: Tensor,
    bias: Tensor | None,
    smooth_factor2: Tensor,
    proj_down2: Tensor,
    act_unsigned: bool = False,
    act_unsigned2: bool = False,
    rotation2: int = 0,
    mid_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """quantize_down(GELU(gemm_w4a4_up(...))): the first layer of an MLP straight into the input of
    its second.

    The product is rounded to `mid_dtype`, as the first layer's output would be; the GELU (tanh
    approximation) of it is not rounded.

    Shapes: as `gemm_w4a4_up`, with N a multiple of 64 · smooth_factor2 (N,) · proj_down2 (N, R2)
        -> q2 int8 (M, N/2) · ascales2 float32 (N/64, M) · h2 float32 (M, R2)
    """
    y = gemm_w4a4_up(q, ascales, h, weight, weight_scale, proj_up, bias, act_unsigned)
    hidden = torch.nn.functional.gelu(y.to(mid_dtype or y.dtype).to(y.dtype), approximate="tanh")
    return quantize_down(hidden, smooth_factor2, proj_down2, act_unsigned2, rotation2)


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


# ---- whole layers --------------------------------------------------------------------------------


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
    """`quantize_down` followed by `gemm_w4a4_up`, without packing the codes in between.

    Shapes: x (M, K), the rest as there -> (M, N) in x.dtype
    """
    layers = [weight], [weight_scale], [proj_down], [proj_up], [bias]
    return linear_w4a4_grouped(x, smooth_factor, *layers, act_unsigned, rotation)[0]


def linear_w4a4_grouped(
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
    """Several linears of one x that share its smoothing (q, k and v): x is quantized once.

    Shapes: x (M, K) · smooth_factor (K,) · the lists hold what `linear_w4a4` takes for each -> (M,
        N) each, in x.dtype
    """
    xc, dtype = x.to(compute_dtype(x)), operand_dtype(x)
    codes, scale = _quantize_groups_of(xc, smooth_factor, act_unsigned, rotation)
    act = codes.mul_(scale).flatten(-2).to(dtype)
    return [
        _matmul_up(act, dequantize_w4(w, scale, dtype), xc @ down.to(xc.dtype), up, b).to(x.dtype)
        for w, scale, down, up, b in zip(
            weight, weight_scale, proj_down, proj_up, bias, strict=True
        )
    ]


def mlp_w4a4(
    x: Tensor,
    first: Sequence[Tensor | None],
    second: Sequence[Tensor | None],
    flags: tuple = (False, 0),
    flags2: tuple = (False, 0),
) -> Tensor:
    """linear_w4a4 -> GELU (tanh approximation) -> linear_w4a4.

    `first`, `second`: weight, weight_scale, smooth_factor, proj_down, proj_up, bias. `flags`:
        act_unsigned, rotation of each.
    Shapes: x (M, K) -> (M, N of the second) in x.dtype
    """
    return linear_w4a4(
        torch.nn.functional.gelu(linear_w4a4(x, *first, *flags), approximate="tanh"),
        *second,
        *flags2,
    )


# ---- gradients: the straight-through model, in which Q is the identity ---------------------------


def linear_w4a4_grad(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    smooth_factor: Tensor,
    proj_down: Tensor,
    proj_up: Tensor,
    rotation: int,
    needs: tuple[bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of `linear_w4a4` to (x, proj_down, proj_up), each only where `needs` asks for it.

    Shapes: grad (M, N) · x (M, K) -> (M, K), (K, R), (N, R) in the dtypes of their inputs
    """
    dtype = operand_dtype(x)
    grad, xd = grad.to(dtype), x.to(dtype)
    down, up = proj_down.to(dtype), proj_up.to(dtype)
    grad_x = grad_down = grad_up = None
    if needs[0] or needs[1]:
        grad_h = grad @ up
    if needs[0]:
        main = grad @ dequantize_w4(weight, weight_scale, dtype)
        main = (hadamard64(main) if rotation else main) / smooth_factor.to(dtype)
        grad_x = (main + grad_h @ down.t()).to(x.dtype)
    if needs[1]:
        grad_down = (xd.t() @ grad_h).to(proj_down.dtype)
    if needs[2]:
        grad_up = (grad.t() @ (xd @ down)).to(proj_up.dtype)
    return grad_x, grad_down, grad_up


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
