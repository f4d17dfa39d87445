"""The choice of what runs an op: native -> comfy_kitchen -> reference, once for each device and set
of dtypes, with its reason.

The functions under the ops' names are what torch's dispatcher calls: refusals first, then the
chosen backend.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from . import kitchen, launch, reference, reference_vq, refusals

log = logging.getLogger("nibble")

GEMV_TOKENS = 8
"""Up to so many tokens a W4A16 linear is bound by reading its weight, and `gemv_w4a16` runs it;
beyond, `gemm_w4a16`.
"""

PARTS = {
    "linear_w4a4": ("quantize_down", "gemm_w4a4_up"),
    "linear_w4a4_grouped": ("quantize_down", "gemm_w4a4_up"),
    "mlp_w4a4": ("quantize_down", "gemm_w4a4_up_gelu_quantize_down", "gemm_w4a4_up"),
    "linear_w4a16": ("gemv_w4a16", "gemm_w4a16"),
    "linear_vq": ("gemm_vq",),
}
"""Ops made of others."""

TYPICAL = (4608, 3072, 3072)
"""(M, N, K) of a FLUX.1 layer at a megapixel: the shape that `which` speaks of unless told
another.
"""


class Choice(NamedTuple):
    backend: str
    reason: str
    parameters: torch.dtype | None
    """native: the dtype that the layer's parameters are brought to."""


@functools.lru_cache(maxsize=512)
def choose(
    op: str, device: torch.device, dtype: torch.dtype, parameters: tuple[torch.dtype | None, ...]
) -> Choice:
    """What runs `op` for activations of `dtype` and parameters of the given dtypes on `device`."""
    brought_to, native_reason = launch.serves(PARTS.get(op, (op,)), device, dtype, parameters)
    if brought_to is not None:
        choice = Choice("native", native_reason, brought_to)
    else:
        use, why = kitchen.decide(op, device, dtype)
        choice = Choice(
            "comfy_kitchen" if use else "reference", why if use else f"{native_reason}; {why}", None
        )
    log.debug("%s on %s in %s: %s (%s)", op, device, dtype, choice.backend, choice.reason)
    return choice


def which(
    op: str,
    device: torch.device | str,
    dtype: torch.dtype = torch.bfloat16,
    shape: tuple[int, int, int] = TYPICAL,
) -> tuple[str, str]:
    """The backend that runs `op` for activations and parameters of `dtype` on `device`, and the
    reason in words.

    `shape`: (M, N, K) of the layer asked about; the compiled module chooses its path by it.
    Returns ("native" | "comfy_kitchen" | "reference", reason). Raises ValueError for an op that is
    not ours.
    """
    if op not in launch.OPS and op not in PARTS:
        raise ValueError(f"unknown op {op!r}: the ops are {', '.join((*launch.OPS, *PARTS))}")
    device = torch.device(device)
    choice = choose(op, device, dtype, (dtype,))
    if choice.backend != "native":
        return choice.backend, choice.reason
    parts = PARTS.get(op, (op,))
    if op == "mlp_w4a4" and not launch.fuses(device):
        parts = PARTS["linear_w4a4"]
    if op == "linear_w4a16":
        parts = ("gemv_w4a16",) if shape[0] <= GEMV_TOKENS else ("gemm_w4a16",)
    return "native", f"{choice.reason}; " + "; ".join(
        f"{part}: {launch.route(part, device, shape)}" for part in parts
    )


def _dtype(tensor: Tensor | None) -> torch.dtype | None:
    return None if tensor is None else tensor.dtype


# ---- parts ---------------------------------------------------------------------------------------


def quantize_down(
    x: Tensor,
    smooth_factor: Tensor,
    proj_down: Tensor,
    act_unsigned: bool = False,
    rotation: int = 0,
):
    refusals.quantize_down(x, smooth_factor, proj_down, act_unsigned, rotation)
    choice = choose("quantize_down", x.device, x.dtype, (smooth_factor.dtype, proj_down.dtype))
    if choice.backend == "native":
        return launch.quantize_down(
            choice.parameters, x, smooth_factor, proj_down, act_unsigned, rotation
        )
    return reference.quantize_down(x, smooth_factor, proj_down, act_unsigned, rotation)


def gemm_w4a4_up(
    q, ascales, h, weight, weight_scale, proj_up, bias=None, act_unsigned=False, out_dtype=None
):
    refusals.gemm_w4a4_up(q, ascales, h, weight, weight_scale, proj_up, bias)
    out_dtype = out_dtype or ascales.dtype
    dtype = (
        ascales.dtype
        if ascales.dtype == torch.float64 or out_dtype not in launch.DTYPES
        else out_dtype
    )
    choice = choose(
        "gemm_w4a4_up", q.device, dtype, (weight_scale.dtype, proj_up.dtype, _dtype(bias))
    )
    if choice.backend == "native":
        return launch.gemm_w4a4_up(
            choice.parameters,
            q,
            ascales,
            h,
            weight,
            weight_scale,
            proj_up,
            bias,
            act_unsigned,
            out_dtype,
        )
    return reference.gemm_w4a4_up(
        q, ascales, h, weight, weight_scale, proj_up, bias, act_unsigned
    ).to(out_dtype)


def gemm_w4a4_up_gelu_quantize_down(
    q,
    ascales,
    h,
    weight,
    weight_scale,
    proj_up,
    bias,
    smooth_factor2,
    proj_down2,
    act_unsigned=False,
    act_unsigned2=False,
    rotation2=0,
    mid_dtype=None,
):
    op = "gemm_w4a4_up_gelu_quantize_down"
    refusals.gemm_w4a4_up_gelu_quantize_down(
        q,
        ascales,
        h,
        weight,
        weight_scale,
        proj_up,
        bias,
        smooth_factor2,
        proj_down2,
        act_unsigned2,
        rotation2,
    )
    tensors = (q, ascales, h, weight, weight_scale, proj_up, bias, smooth_factor2, proj_down2)
    mid_dtype = mid_dtype or ascales.dtype
    dtype = ascales.dtype if ascales.dtype == torch.float64 else mid_dtype
    choice = choose(op, q.device, dtype, tuple(map(_dtype, tensors[4:])))
    if choice.backend == "native":
        return launch.gemm_w4a4_up_gelu_quantize_down(
            choice.parameters, *tensors, act_unsigned, act_unsigned2, rotation2, mid_dtype
        )
    return reference.gemm_w4a4_up_gelu_quantize_down(
        *tensors, act_unsigned, act_unsigned2, rotation2, mid_dtype
    )


def _tokens_w4a16(op: str, x: Tensor, *parameters: Tensor | None) -> Tensor:
    _, scale, zeros, bias = parameters
    choice = choose(op, x.device, x.dtype, (scale.dtype, _dtype(zeros), _dtype(bias)))
    if choice.backend == "native":
        return launch.w4a16(op, choice.parameters, x, *parameters)
    if choice.backend == "comfy_kitchen" and len(x):
        return kitchen.gemv_w4a16(x, *parameters)
    return reference.gemv_w4a16(x, *parameters)


def gemv_w4a16(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    weight_zeros: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    refusals.tokens_w4a16("gemv_w4a16", x, weight, weight_scale, weight_zeros, bias)
    return _tokens_w4a16("gemv_w4a16", x, weight, weight_scale, weight_zeros, bias)


def gemm_w4a16(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    weight_zeros: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    refusals.tokens_w4a16("gemm_w4a16", x, weight, weight_scale, weight_zeros, bias)
    return _tokens_w4a16("gemm_w4a16", x, weight, weight_scale, weight_zeros, bias)


# ---- whole layers --------------------------------------------------------------------------------


def linear_w4a16(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    weight_zeros: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    refusals.w4a16(x, weight, weight_scale, weight_zeros, bias)
    rows = x.reshape(-1, x.shape[-1])
    op = "gemv_w4a16" if len(rows) <= GEMV_TOKENS else "gemm_w4a16"
    return _tokens_w4a16(op, rows, weight, weight_scale, weight_zeros, bias).reshape(
        *x.shape[:-1], len(weight)
    )


def linear_w4a4(
    x,
    weight,
    weight_scale,
    smooth_factor,
    proj_down,
    proj_up,
    bias=None,
    act_unsigned: bool = False,
    rotation: int = 0,
) -> Tensor:
    refusals.linear_w4a4(
        x, weight, weight_scale, smooth_factor, proj_down, proj_up, bias, act_unsigned, rotation
    )
    rows = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
    y = _rows_w4a4(
        rows, weight, weight_scale, smooth_factor, proj_down, proj_up, bias, act_unsigned, rotation
    )
    return y if x.dim() == 2 else y.reshape(*x.shape[:-1], len(weight))


def _rows_w4a4(rows: Tensor, *arguments) -> Tensor:
    """`linear_w4a4` of checked arguments, x (M, K)."""
    _, scale, smooth, down, up, bias, _, _ = arguments
    choice = choose(
        "linear_w4a4",
        rows.device,
        rows.dtype,
        (scale.dtype, smooth.dtype, down.dtype, up.dtype, _dtype(bias)),
    )
    if choice.backend == "native":
        return launch.linear_w4a4(choice.parameters, rows, *arguments)
    # comfy_kitchen's kernels are not made for an empty batch or for rank 0.
    if choice.backend == "comfy_kitchen" and len(rows) and down.shape[1]:
        return kitchen.linear_w4a4(rows, *arguments)
    return reference.linear_w4a4(rows, *arguments)


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
    refusals.linear_w4a4_grouped(
        x, smooth_factor, weight, weight_scale, proj_down, proj_up, bias, act_unsigned, rotation
    )
    rows = x.reshape(-1, x.shape[-1])
    kinds = tuple(
        sorted(
            {
                _dtype(tensor)
                for tensor in (smooth_factor, *weight_scale, *proj_down, *proj_up, *bias)
            },
            key=str,
        )
    )
    choice = choose("linear_w4a4_grouped", x.device, x.dtype, kinds)
    layers = (weight, weight_scale, proj_down, proj_up, bias)
    if choice.backend == "native":
        ys = launch.linear_w4a4_grouped(
            choice.parameters, rows, smooth_factor, *layers, act_unsigned, rotation
        )
    elif choose("linear_w4a4", x.device, x.dtype, kinds).backend == "comfy_kitchen":
        ys = [
            _rows_w4a4(rows, w, s, smooth_factor, down, up, b, act_unsigned, rotation)
            for w, s, down, up, b in zip(*layers, strict=True)
        ]
    else:
        ys = reference.linear_w4a4_grouped(rows, smooth_factor, *layers, act_unsigned, rotation)
    return [y.reshape(*x.shape[:-1], len(w)) for y, w in zip(ys, weight, strict=True)]


def mlp_w4a4(
    x,
    weight,
    weight_scale,
    smooth_factor,
    proj_down,
    proj_up,
    bias,
    weight2,
    weight_scale2,
    smooth_factor2,
    proj_down2,
    proj_up2,
    bias2,
    act_unsigned: bool = False,
    rotation: int = 0,
    act_unsigned2: bool = False,
    rotation2: int = 0,
) -> Tensor:
    first = (weight, weight_scale, smooth_factor, proj_down, proj_up, bias)
    second = (weight2, weight_scale2, smooth_factor2, proj_down2, proj_up2, bias2)
    flags, flags2 = (act_unsigned, rotation), (act_unsigned2, rotation2)
    refusals.mlp_w4a4(x, first, second, flags, flags2)
    rows = x.reshape(-1, x.shape[-1])
    choice = choose("mlp_w4a4", x.device, x.dtype, tuple(map(_dtype, first[1:] + second[1:])))
    if choice.backend == "native" and launch.fuses(x.device):
        y = launch.mlp_w4a4(choice.parameters, rows, first, second, flags, flags2)
    else:
        hidden = torch.nn.functional.gelu(_rows_w4a4(rows, *first, *flags), approximate="tanh")
        y = _rows_w4a4(hidden, *second, *flags2)
    return y.reshape(*x.shape[:-1], len(weight2))


# ---- codebook weights ----------------------------------------------------------------------------


def _runs_vq(op: str, x: Tensor, codebook: Tensor) -> bool:
    """Whether compiled code takes this layer; a codebook of a layout that it lacks goes through the
    reference.
    """
    return choose(op, x.device, x.dtype, ()).backend == "native" and launch.has_vq_layout(
        x.device, x.shape[-1], codebook
    )


def gemm_vq(
    x: Tensor,
    indices: Tensor,
    codebook: Tensor,
    scale: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    refusals.gemm_vq(x, indices, codebook, scale, bias)
    run = launch.gemm_vq if _runs_vq("gemm_vq", x, codebook) else reference_vq.gemm_vq
    return run(x, indices, codebook, scale, bias)


def linear_vq(
    x: Tensor,
    indices: Tensor,
    codebook: Tensor,
    scale: Tensor | None = None,
    proj_down: Tensor | None = None,
    proj_up: Tensor | None = None,
    bias: Tensor | None = None,
    rotation: int = 0,
) -> Tensor:
    refusals.linear_vq(x, indices, codebook, scale, proj_down, proj_up, bias, rotation)
    run = launch.linear_vq if _runs_vq("linear_vq", x, codebook) else reference_vq.linear_vq
    y = run(
        x.reshape(-1, x.shape[-1]), indices, codebook, scale, proj_down, proj_up, bias, rotation
    )
    return y.reshape(*x.shape[:-1], len(indices))
