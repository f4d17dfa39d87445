"""What every op refuses, in words that name the argument, its shape and the rule: ValueError,
before anything is computed.

Compiled code takes bare pointers, so it is these checks that keep a wrong shape or a tensor of
another device from becoming a wrong memory access. They run in front of every backend, so that all
of them refuse alike.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import reference, reference_vq
from .reference import GROUP


def _floats(x: Tensor) -> int:
    if x.dim() == 0 or not x.is_floating_point():
        raise ValueError(
            f"x must be a floating-point tensor (..., K), not {x.dtype} {tuple(x.shape)}"
        )
    return x.shape[-1]


def _features(x: Tensor) -> int:
    k = _floats(x)
    if k % GROUP:
        raise ValueError(f"K={k} is not a multiple of the group size {GROUP}")
    return k


def _tokens_and_features(op: str, x: Tensor) -> tuple[int, int]:
    if x.dim() != 2:
        raise ValueError(f"{op} takes x (M, K), not {tuple(x.shape)}")
    return x.shape[0], _features(x)


def _outputs(weight: Tensor, k: int, name: str = "weight") -> int:
    if weight.dtype != torch.int8 or weight.dim() != 2:
        raise ValueError(
            f"{name} must be packed int8 (N, K/2), not {weight.dtype} {tuple(weight.shape)}"
        )
    n, half = weight.shape
    if half * 2 != k:
        raise ValueError(f"{name} {tuple(weight.shape)} holds K={half * 2} columns and x has K={k}")
    return n


def _rank(name: str, projection: Tensor) -> int:
    if projection.dim() != 2:
        raise ValueError(f"{name} is {tuple(projection.shape)} and must have two dimensions")
    return projection.shape[1]


def _shape(name: str, tensor: Tensor | None, rule: str, *shape: int) -> None:
    if tensor is not None and tensor.shape != shape:
        raise ValueError(f"{name} is {tuple(tensor.shape)} and must be {rule} = {tuple(shape)}")


def _same_device(device: torch.device, **tensors: Tensor | None) -> None:
    for name, tensor in tensors.items():
        if tensor is not None and tensor.device != device:
            raise ValueError(f"{name} is on {tensor.device} and the activations are on {device}")


def _product(
    k: int,
    n: int,
    weight_scale: Tensor,
    proj_up: Tensor,
    rank: int,
    bias: Tensor | None,
    layer: str = "",
) -> None:
    _shape(f"weight_scale{layer}", weight_scale, "(K/64, N)", k // GROUP, n)
    _shape(f"proj_up{layer}", proj_up, "(N, R)", n, rank)
    _shape(f"bias{layer}", bias, "(N,)", n)


def _quantizer(k: int, smooth_factor: Tensor, proj_down: Tensor, layer: str = "") -> int:
    _shape(f"smooth_factor{layer}", smooth_factor, "(K,)", k)
    rank = _rank(f"proj_down{layer}", proj_down)
    _shape(f"proj_down{layer}", proj_down, "(K, R)", k, rank)
    return rank


def quantize_down(
    x: Tensor, smooth_factor: Tensor, proj_down: Tensor, act_unsigned: bool, rotation: int
) -> None:
    reference.check_flags(act_unsigned, rotation)
    _quantizer(_tokens_and_features("quantize_down", x)[1], smooth_factor, proj_down)
    _same_device(x.device, smooth_factor=smooth_factor, proj_down=proj_down)


def gemm_w4a4_up(
    q: Tensor,
    ascales: Tensor,
    h: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    proj_up: Tensor,
    bias: Tensor | None,
) -> int:
    """Returns N."""
    if q.dtype != torch.int8 or q.dim() != 2:
        raise ValueError(f"q must be packed int8 (M, K/2), not {q.dtype} {tuple(q.shape)}")
    m, k = q.shape[0], q.shape[1] * 2
    if k % GROUP:
        raise ValueError(f"K={k} is not a multiple of the group size {GROUP}")
    n, rank = _outputs(weight, k), _rank("proj_up", proj_up)
    _shape("ascales", ascales, "(K/64, M)", k // GROUP, m)
    _shape("h", h, "(M, R)", m, rank)
    _product(k, n, weight_scale, proj_up, rank, bias)
    _same_device(
        q.device,
        ascales=ascales,
        h=h,
        weight=weight,
        weight_scale=weight_scale,
        proj_up=proj_up,
        bias=bias,
    )
    return n


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
    act_unsigned2: bool,
    rotation2: int,
) -> None:
    reference.check_flags(act_unsigned2, rotation2)
    n = gemm_w4a4_up(q, ascales, h, weight, weight_scale, proj_up, bias)
    if n % GROUP:
        raise ValueError(
            f"N={n} is not a multiple of the group size {GROUP}, and the second layer quantizes it"
        )
    _quantizer(n, smooth_factor2, proj_down2, "2")
    _same_device(q.device, smooth_factor2=smooth_factor2, proj_down2=proj_down2)


def w4a16(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    weight_zeros: Tensor | None,
    bias: Tensor | None,
) -> None:
    k = _features(x)
    n = _outputs(weight, k)
    _shape("weight_scale", weight_scale, "(K/64, N)", k // GROUP, n)
    _shape("weight_zeros", weight_zeros, "(K/64, N)", k // GROUP, n)
    _shape("bias", bias, "(N,)", n)
    _same_device(
        x.device, weight=weight, weight_scale=weight_scale, weight_zeros=weight_zeros, bias=bias
    )


def tokens_w4a16(op: str, x: Tensor, *parameters: Tensor | None) -> None:
    """`w4a16` for the ops that take a matrix of tokens."""
    if x.dim() != 2:
        raise ValueError(
            f"{op} takes x (M, K), not {tuple(x.shape)}; linear_w4a16 takes any leading shape"
        )
    w4a16(x, *parameters)


def linear_w4a4(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    smooth_factor: Tensor,
    proj_down: Tensor,
    proj_up: Tensor,
    bias: Tensor | None,
    act_unsigned: bool,
    rotation: int,
) -> None:
    reference.check_flags(act_unsigned, rotation)
    k = _features(x)
    n = _outputs(weight, k)
    rank = _quantizer(k, smooth_factor, proj_down)
    _product(k, n, weight_scale, proj_up, rank, bias)
    _same_device(
        x.device,
        weight=weight,
        weight_scale=weight_scale,
        smooth_factor=smooth_factor,
        proj_down=proj_down,
        proj_up=proj_up,
        bias=bias,
    )


def linear_w4a4_grouped(
    x: Tensor,
    smooth_factor: Tensor,
    weight: Sequence[Tensor],
    weight_scale: Sequence[Tensor],
    proj_down: Sequence[Tensor],
    proj_up: Sequence[Tensor],
    bias: Sequence[Tensor | None],
    act_unsigned: bool,
    rotation: int,
) -> None:
    counts = {
        "weight": len(weight),
        "weight_scale": len(weight_scale),
        "proj_down": len(proj_down),
        "proj_up": len(proj_up),
        "bias": len(bias),
    }
    if len(set(counts.values())) > 1 or not weight:
        raise ValueError(f"a group of linears needs as many of each and at least one, not {counts}")
    for layer in zip(weight, weight_scale, proj_down, proj_up, bias, strict=True):
        w, scale, down, up, b = layer
        linear_w4a4(x, w, scale, smooth_factor, down, up, b, act_unsigned, rotation)


def mlp_w4a4(
    x: Tensor,
    first: Sequence[Tensor | None],
    second: Sequence[Tensor | None],
    flags: tuple,
    flags2: tuple,
) -> None:
    linear_w4a4(x, *first, *flags)
    reference.check_flags(*flags2)
    weight, weight_scale, smooth_factor, proj_down, proj_up, bias = second
    hidden = first[0].shape[0]
    if hidden % GROUP:
        raise ValueError(
            f"N={hidden} of the first layer is not a multiple of the group size {GROUP}, and the"
            " second quantizes it"
        )
    n = _outputs(weight, hidden, "weight2")
    rank = _quantizer(hidden, smooth_factor, proj_down, "2")
    _product(hidden, n, weight_scale, proj_up, rank, bias, "2")
    _same_device(
        x.device,
        weight2=weight,
        weight_scale2=weight_scale,
        smooth_factor2=smooth_factor,
        proj_down2=proj_down,
        proj_up2=proj_up,
        bias2=bias,
    )


def _codebook(k: int, indices: Tensor, codebook: Tensor) -> int:
    """Returns N."""
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


def _linear_vq(
    k: int, x: Tensor, indices: Tensor, codebook: Tensor, scale: Tensor | None, bias: Tensor | None
) -> int:
    n = _codebook(k, indices, codebook)
    _shape("scale", scale, "(N,)", n)
    _shape("bias", bias, "(N,)", n)
    _same_device(x.device, indices=indices, codebook=codebook, scale=scale, bias=bias)
    return n


def gemm_vq(
    x: Tensor, indices: Tensor, codebook: Tensor, scale: Tensor | None, bias: Tensor | None
) -> None:
    if x.dim() != 2:
        raise ValueError(
            f"gemm_vq takes x (M, K), not {tuple(x.shape)}; linear_vq takes any leading shape"
        )
    _linear_vq(_floats(x), x, indices, codebook, scale, bias)


def linear_vq(
    x: Tensor,
    indices: Tensor,
    codebook: Tensor,
    scale: Tensor | None,
    proj_down: Tensor | None,
    proj_up: Tensor | None,
    bias: Tensor | None,
    rotation: int,
) -> None:
    reference.check_flags(False, rotation)
    k = _features(x) if rotation else _floats(x)
    n = _linear_vq(k, x, indices, codebook, scale, bias)
    if (proj_down is None) != (proj_up is None):
        raise ValueError("proj_down and proj_up come together or not at all")
    if proj_down is not None:
        rank = _rank("proj_down", proj_down)
        _shape("proj_down", proj_down, "(K, R)", k, rank)
        _shape("proj_up", proj_up, "(N, R)", n, rank)
        _same_device(x.device, proj_down=proj_down, proj_up=proj_up)
