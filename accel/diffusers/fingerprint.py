"""Tells a transformer of diffusers from others, as a calibration keeps it."""

from __future__ import annotations

import hashlib

import torch

PIECES, SAMPLE = 24, 64  # tensors whose values are read, and how many of each
PLAIN, LOW_BIT = "16 bit or more", "low bit"


def fingerprint(model: torch.nn.Module) -> str:
    """32 hex digits, by class, names, shapes and dtypes of what it holds, and by some values."""
    digest = hashlib.sha256(type(model).__name__.encode())
    held = sorted(model.state_dict().items())
    for name, tensor in held:
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
    vectors = [tensor for _, tensor in held if tensor.ndim == 1 and tensor.is_floating_point()]
    for tensor in vectors[:: max(len(vectors) // PIECES, 1)][:PIECES]:
        digest.update(tensor.detach()[:SAMPLE].to("cpu", torch.float32).numpy().tobytes())
    return digest.hexdigest()[:32]


def is_low_bit(model: torch.nn.Module) -> bool:
    """Whether layers hold their weights in whole numbers."""
    return any(
        tensor.ndim > 1 and not tensor.is_floating_point() and not tensor.is_complex()
        for tensor in [*model.buffers(), *model.parameters()]
    )


def weights_of(model: torch.nn.Module) -> str:
    """In words."""
    return LOW_BIT if is_low_bit(model) else PLAIN
