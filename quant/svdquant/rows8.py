"""8-bit rows: tables of embeddings, heads and vision towers of text encoders, in ComfyUI's own
format `int8_tensorwise`, from which it looks single rows up.

    code = round(w / scale),  scale = max |w of the row| / 127,  w ~ code * scale
"""

import math

import torch
from torch import Tensor

from ..files.safetensors import TensorSpec
from ..job.run_metadata import JSON_BYTES, padded
from ..weights.base import json_tensor

FORMAT = "int8_tensorwise"
_ROWS = 16384  # at once: a vocabulary of 260,000 words is 4 GB in float32


def specs(name: str, n: int, k: int) -> list[TensorSpec]:
    """The tensors of a layer of N rows of K weights, without its bias."""
    return [
        TensorSpec(f"{name}.weight", torch.int8, (n, k)),
        TensorSpec(f"{name}.weight_scale", torch.float32, (n, 1)),
        TensorSpec(f"{name}.comfy_quant", torch.uint8, (JSON_BYTES,)),
    ]


def quantize_rows(weight: Tensor, device: torch.device) -> tuple[Tensor, Tensor, float]:
    """(codes int8 (N, K), scale float32 (N, 1), signal to noise of the weights in dB) of a matrix
    (N, K) of any float dtype, in portions on the device; the codes lie on the CPU.
    """
    codes = torch.empty(weight.shape, dtype=torch.int8)
    scales = torch.empty(len(weight), 1)
    signal = noise = 0.0
    for start in range(0, len(weight), _ROWS):
        rows = weight[start : start + _ROWS].to(device).float()
        scale = (rows.abs().amax(1, keepdim=True) / 127).clamp_min(torch.finfo(torch.float32).tiny)
        rounded = (rows / scale).round()
        codes[start : start + _ROWS] = rounded.to("cpu", torch.int8)
        scales[start : start + _ROWS] = scale.cpu()
        signal += rows.square().sum(dtype=torch.float64).item()
        noise += (rounded * scale - rows).square().sum(dtype=torch.float64).item()
    ratio = signal / noise if noise else math.inf
    return codes, scales, 10 * math.log10(ratio) if ratio else -math.inf


def tensors(name: str, codes: Tensor, scale: Tensor) -> dict[str, Tensor]:
    """They, under their names on disk, as `specs` has them."""
    return {
        f"{name}.weight": codes,
        f"{name}.weight_scale": scale,
        f"{name}.comfy_quant": padded(json_tensor({"format": FORMAT})),
    }
