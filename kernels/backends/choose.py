"""The choice of what runs an op: native -> comfy_kitchen -> reference, once for each device and set
of dtypes, with its reason.
"""

from __future__ import annotations

import functools
import logging
from typing import NamedTuple

import torch

from . import kitchen, native

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
    """The dtype that native kernels want a layer's parameters in; None for other backends."""


@functools.lru_cache(maxsize=512)
def choose(
    op: str, device: torch.device, dtype: torch.dtype, parameters: tuple[torch.dtype | None, ...]
) -> Choice:
    """What runs `op` for activations of `dtype` and parameters of the given dtypes on `device`."""
    brought_to, native_reason = native.serves(PARTS.get(op, (op,)), device, dtype, parameters)
    if brought_to is not None:
        choice = Choice("native", native_reason, brought_to)
    else:
        use, why = kitchen.decide(op, device, dtype)
        if use:
            choice = Choice("comfy_kitchen", why, None)
        else:
            choice = Choice("reference", f"{native_reason}; {why}", None)
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
    if op not in native.OPS and op not in PARTS:
        raise ValueError(f"unknown op {op!r}: the ops are {', '.join((*native.OPS, *PARTS))}")
    device = torch.device(device)
    choice = choose(op, device, dtype, (dtype,))
    if choice.backend != "native":
        return choice.backend, choice.reason
    parts = PARTS.get(op, (op,))
    if op == "mlp_w4a4" and not native.fuses(device):
        parts = PARTS["linear_w4a4"]
    if op == "linear_w4a16":
        parts = ("gemv_w4a16",) if shape[0] <= GEMV_TOKENS else ("gemm_w4a16",)
    return "native", f"{choice.reason}; " + "; ".join(
        f"{part}: {native.route(part, device, shape)}" for part in parts
    )
