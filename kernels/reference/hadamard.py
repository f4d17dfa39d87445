"""The orthonormal 64-point Hadamard transform that rotates a group of activations.

H[i, j] = (-1)^popcount(i & j) / 8      (Sylvester order; H is symmetric and H . H = 1)
"""

from __future__ import annotations

import torch
from torch import Tensor

from .nibbles import GROUP, compute_dtype


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
