"""A text encoder's low-bit file as numbers, by the formats' definitions."""

from pathlib import Path

import torch
from safetensors.torch import load_file

from nibble.quant.files.checkpoint import open_quantized
from nibble.quant.weights.formats import weight_of


def dequantized(path: Path) -> dict[str, torch.Tensor]:
    """The file's encoder in float32, by the formats' definitions."""
    file, state = open_quantized(path), load_file(path)
    whole = {}
    for name, facts in file.layers.items():
        if facts["format"] == "int8_tensorwise":
            codes, scale = state[f"{name}.weight"], state[f"{name}.weight_scale"]
            whole[f"{name}.weight"] = codes.float() * scale
        else:
            whole[f"{name}.weight"] = weight_of(file, name).dequantize()
    kept = [key for key in state if key.rpartition(".")[0] not in file.layers]
    return whole | {key: state[key].float() for key in kept}
