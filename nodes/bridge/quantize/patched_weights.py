"""The weights of a MODEL socket, as quant reads them: one at a time, with every LoRA and merge that
the graph put on it; and the metadata without which ComfyUI would not build the model again.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping

import comfy.lora
import comfy.model_detection
import comfy.model_management
import torch
from comfy.model_base import SDXL, BaseModel, ModelType
from comfy.model_patcher import ModelPatcher, get_key_weight
from comfy.quant_ops import QuantizedTensor

from ....quant.files import read_when_built
from ....quant.files.errors import FileRefused
from ....quant.files.safetensors import read_header
from ..quantized import layouts

_PREFIX = "diffusion_model."


def metadata_of(patcher: ModelPatcher) -> dict[str, str]:
    """The metadata of the file that ComfyUI loaded a model from. Of a model that no loader of
    ComfyUI's made from a file: its own options as "config", where ComfyUI would guess others
    without.
    """
    path = _origin(patcher)
    if path is not None:
        return read_header(path).metadata
    options = patcher.model.model_config.unet_config
    told = {"config": json.dumps({"transformer": _plain(options)})}
    weights = dict(PatchedWeights(patcher).items())
    guess, built = (
        comfy.model_detection.detect_unet_config(weights, "", metadata) for metadata in (None, told)
    )
    return {} if guess == built else told


def _origin(patcher: ModelPatcher) -> str | None:
    """The safetensors file that ComfyUI's loaders say a model comes from."""
    loader = patcher.cached_patcher_init
    if loader is None or not loader[1] or not isinstance(loader[1][0], (str, os.PathLike)):
        return None
    path = os.fspath(loader[1][0])
    return path if path.endswith((".safetensors", ".sft")) and os.path.isfile(path) else None


def _plain(options: Mapping) -> dict:
    """The options that JSON can hold, which a dtype is not."""
    kinds = (str, int, float, bool, list, tuple, type(None))
    return {name: value for name, value in options.items() if isinstance(value, kinds)}


def _read_when_built(model: BaseModel) -> dict[str, torch.Tensor]:
    """What ComfyUI has read beside the diffusion model's weights, as its *Save Checkpoint* writes
    it: see quant/files/read_when_built.py.
    """
    saved = model.state_dict_for_saving({})
    saved.pop("v_pred", None)  # written for every model that predicts v, read for SDXL alone
    tensors = {name: saved[name] for name in read_when_built.names(saved)}
    return tensors | (_marks_of(model) if isinstance(model, SDXL) else {})


def _marks_of(model: SDXL) -> dict[str, torch.Tensor]:
    """What tells ComfyUI what an SDXL predicts. Where it asks only whether a name is there, the
    tensor is empty.
    """
    sampling, there = model.model_sampling, torch.tensor([])
    if model.model_type == ModelType.V_PREDICTION:
        return {"v_pred": there} | ({"ztsnr": there} if sampling.zsnr else {})
    if model.model_type == ModelType.V_PREDICTION_EDM:
        return {
            "edm_vpred.sigma_max": sampling.sigma_max.float(),
            "edm_vpred.sigma_min": sampling.sigma_min.float(),
        }
    return {"edm_mean": there, "edm_std": there} if model.model_type == ModelType.EDM else {}


class PatchedWeights(Mapping):
    """Name → tensor of a diffusion model, and of what ComfyUI needs beside it to build it. Indexing
    computes patched weights in float32; `items` gives them as they lie in memory.
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
        self._beside = _read_when_built(patcher.model)
        self._stored |= self._beside

    def _unpatched(self, name: str) -> torch.Tensor:
        backup = self.patcher.backup.get(_PREFIX + name)
        return (
            backup.weight
            if backup is not None
            else get_key_weight(self.patcher.model, _PREFIX + name)[0]
        )

    def __getitem__(self, name: str) -> torch.Tensor:
        key, weight = _PREFIX + name, self._stored[name]
        if name in self._beside:
            return weight
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
