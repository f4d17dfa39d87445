"""The weights of a MODEL socket, as quant reads them: one at a time, with every LoRA and merge that
the graph put on it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import comfy.lora
import comfy.model_management
import torch
from comfy.model_patcher import ModelPatcher, get_key_weight
from comfy.quant_ops import QuantizedTensor

from ....quant.files.errors import FileRefused
from ..quantized import layouts

_PREFIX = "diffusion_model."


class PatchedWeights(Mapping):
    """Name → tensor of a diffusion model. Indexing computes patched weights in float32; `items`
    gives them as they lie in memory.
    """

    def __init__(self, patcher: ModelPatcher):
        self.patcher = patcher
        model = patcher.model.diffusion_model
        self._stored = {
            name: self._unpatched(name)
            for name, _ in [*model.named_parameters(), *model.named_buffers()]
        }
        if any(layouts.is_ours(tensor) for tensor in self._stored.values()):
            raise FileRefused(
                "The connected model is quantized by Nibble already; connect the 16-bit model that"
                " it was made from."
            )

    def _unpatched(self, name: str) -> torch.Tensor:
        backup = self.patcher.backup.get(_PREFIX + name)
        return (
            backup.weight
            if backup is not None
            else get_key_weight(self.patcher.model, _PREFIX + name)[0]
        )

    def __getitem__(self, name: str) -> torch.Tensor:
        key, weight = _PREFIX + name, self._stored[name]
        _, _, convert = get_key_weight(self.patcher.model, key)
        if key not in self.patcher.patches:
            return weight.dequantize() if isinstance(weight, QuantizedTensor) else weight
        device = comfy.model_management.get_torch_device()
        weight = comfy.model_management.cast_to_device(weight, device, torch.float32, copy=True)
        weight = weight if convert is None else convert(weight, inplace=True)
        return comfy.lora.calculate_weight(self.patcher.patches[key], weight.float(), key).cpu()

    def items(self):
        return self._stored.items()

    def __iter__(self) -> Iterator[str]:
        return iter(self._stored)

    def __len__(self) -> int:
        return len(self._stored)
