"""The choice of what runs an op, once for each device and set of dtypes, with its reason:

    native -> triton -> comfy_kitchen -> reference

Each way is asked only where those before it do not serve, and none is imported before it is asked.
"""

from __future__ import annotations

import functools
import logging
from typing import NamedTuple

import torch

from . import kitchen, native, native_nvfp4, nvfp4, triton

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
    "linear_nvfp4": ("quantize_nvfp4_down", "gemm_nvfp4_up"),
}
"""Ops made of others."""

NAMES = {
    "native": "compiled kernels",
    "triton": "Triton",
    "comfy_kitchen": "comfy-kitchen",
    "reference": "plain torch",
    "scaled_mm": "torch's scaled matrix product",
    "decoded": "a 16-bit product of decoded weights",
}
"""Backends in words."""

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
    op: str,
    device: torch.device,
    dtype: torch.dtype,
    parameters: tuple[torch.dtype | None, ...],
    act_bits: int = 4,
) -> Choice:
    """What runs `op` for activations of `dtype`, quantized (W4A4 ops) to `act_bits` bits, and
    parameters of the given dtypes on `device`.
    """
    if op == "linear_nvfp4":
        return _nvfp4(device, dtype, parameters)
    brought_to, why = native.serves(PARTS.get(op, (op,)), device, dtype, parameters, act_bits)
    if brought_to is not None:
        choice = Choice("native", why, brought_to)
    else:
        choice = _other(op, device, dtype, parameters, why, act_bits)
    log.debug("%s on %s in %s: %s (%s)", op, device, dtype, choice.backend, choice.reason)
    return choice


def _other(  # noqa: PLR0913 - `choose`'s arguments, and what came of its first question
    op: str,
    device: torch.device,
    dtype: torch.dtype,
    parameters: tuple,
    native_reason: str,
    act_bits: int,
) -> Choice:
    """The first of the ways after native, and why those before it do not serve."""
    use, why = triton.serves(op, device, dtype, parameters, act_bits)
    if use:
        choice = Choice("triton", f"{why}; not native: {native_reason}", None)
    else:
        reasons = f"{native_reason}; {why}"
        use, why = kitchen.decide(op, device, dtype, act_bits)
        if use:
            choice = Choice("comfy_kitchen", f"{why}; {reasons}", None)
        else:
            choice = Choice("reference", f"{reasons}; {why}", None)
    asked_by_layers = op in ("linear_w4a8", "linear_vq")
    asked_by_layers |= op == "linear_w4a4" and act_bits == 4
    if device.type != "cpu" and asked_by_layers:
        _say(device, choice.backend, choice.reason)
    return choice


def _nvfp4(device: torch.device, dtype: torch.dtype, parameters: tuple) -> Choice:
    """4-bit floats: where they are multiplied, else decoded to 16 bits; a CPU, for which neither is
    faster, computes what Blackwell does. Each way is tried on the GPU before it is taken.
    """
    if device.type == "cpu":
        return Choice("reference", "no 4-bit floats on cpu; the formula", None)
    choice = _nvfp4_multiplied(device, dtype, parameters)
    _say(device, choice.backend, choice.reason)
    return choice


def _nvfp4_multiplied(device: torch.device, dtype: torch.dtype, parameters: tuple) -> Choice:
    brought_to, why = native.serves(PARTS["linear_nvfp4"], device, dtype, parameters)
    if brought_to is not None:
        use, why = native_nvfp4.tried(device)
        if use:
            return Choice("native", why, brought_to)
    reasons = f"not native: {why}"
    use, why = triton.serves("linear_nvfp4", device, dtype, parameters)
    if use:
        return Choice("triton", f"{why}; {reasons}", None)
    reasons = f"{reasons}; {why}"
    use, why = nvfp4.serves(device, dtype)
    if use:
        return Choice("scaled_mm", f"{why}; {reasons}", None)
    return Choice("decoded", f"{why}; 4-bit memory at 16-bit speed; {reasons}", None)


@functools.lru_cache(maxsize=64)
def _say(device: torch.device, backend: str, reason: str) -> None:
    """Once: on a GPU that native kernels do not serve, what does instead and why."""
    log.info("4-bit layers on %s: %s (%s)", device, NAMES[backend], reason)


def which(
    op: str,
    device: torch.device | str,
    dtype: torch.dtype = torch.bfloat16,
    shape: tuple[int, int, int] = TYPICAL,
    act_bits: int = 4,
) -> tuple[str, str]:
    """The backend that runs `op` for activations and parameters of `dtype` on `device`, and the
    reason in words. act_bits: to which a W4A4 op quantizes its activations.

    `shape`: (M, N, K) of the layer asked about; the compiled module chooses its path by it.
    Returns (one of NAMES, reason). Raises ValueError for an op that is not ours.
    """
    if op not in native.OPS and op not in PARTS:
        raise ValueError(f"unknown op {op!r}: the ops are {', '.join((*native.OPS, *PARTS))}")
    device = torch.device(device)
    choice = choose(op, device, dtype, (dtype,), act_bits)
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
