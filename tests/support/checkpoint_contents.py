"""The smallest valid quantized file, with changes."""

import json

import torch
from safetensors.torch import save_file

from nibble.quant.files.safetensors import checksum


def quantized(path, version="1", facts=None, method="svdquant", **changes):
    """A smallest valid file with one layer."""
    facts = facts or {"format": "svdquant_w4a4", "rank": 16}
    tensors = {
        "x.weight": torch.zeros(8, 32, dtype=torch.int8),
        "x.weight_scale": torch.zeros(1, 8).bfloat16(),
        "x.weight_proj_down": torch.zeros(64, 16).bfloat16(),
        "x.weight_proj_up": torch.zeros(8, 16).bfloat16(),
        "x.weight_smooth_factor": torch.ones(64).bfloat16(),
        "x.comfy_quant": torch.tensor(list(json.dumps(facts).encode()), dtype=torch.uint8),
        **changes,
    }
    tensors = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    sums = json.dumps({name: checksum(tensor) for name, tensor in tensors.items()})
    save_file(
        tensors,
        path,
        {"format": "nibble", "nibble_version": version, "method": method, "checksums": sums},
    )
    return path
