"""Low-bit files in ComfyUI's own loaders: *Load Diffusion Model*, *Load Checkpoint*, and those of
other packs that call `comfy.sd`.

ComfyUI asks the classes in its table `comfy.supported_models.models`, in order, which of them a
state dict belongs to. Ours stands first, and takes one that has a layer in a format of Nibble's
that ComfyUI cannot read by itself. It hands it on to the class that the 16-bit model has, with what
that class lacks:

    ComfyUI                          LowBitModel
    matches(config, state dict) ───► reads the layers, asks the others about the whole model
    model_config(config) ──────────► the model's own class, with `_LowBitConfig` in front
    set_inference_dtype ───────────► the dtypes that it gets when Nibble loads it
    get_model(state dict) ─────────► each layer's tensors become one; NibbleOperations; a hook
      load_state_dict ─────────────► the hook, once: `loading.finish`

No function of ComfyUI's is replaced. Its table of formats, `QUANT_ALGOS`, would not do: what reads
a layer by it (`comfy.ops._load_quantized_module`) knows each format's tensors by name in its own
code, and refuses any other format that the table has.
"""

from __future__ import annotations

import functools
import gc
import logging
from collections.abc import Mapping
from dataclasses import dataclass

import comfy.model_detection
import comfy.model_management
import comfy.supported_models
import comfy.supported_models_base
import comfy.utils
import torch
from comfy.model_patcher import ModelPatcher
from comfy.quant_ops import QUANT_ALGOS

from ....quant.interop.in_memory import StateDictModel
from ....quant.weights.awq_w4a16 import W4A16Weight
from ....quant.weights.base import tensor_json
from . import layouts, loading
from .linear import NibbleOperations

log = logging.getLogger("nibble")

_FOUND = (
    "nibble_found"  # where `matches` leaves what it found, in the config that ComfyUI passes on
)
_PACKED_IN = torch.bfloat16  # what layers call their dtype where no other was asked for


@dataclass
class _Found:
    """A low-bit model in a state dict. config_class: of the 16-bit model; state: its tensors, as
    the layers' formats have them, without prefix; dtype: what ComfyUI would compute in, by itself.
    """

    config_class: type
    file: StateDictModel
    state: dict[str, torch.Tensor]
    dtype: torch.dtype

    def packed(self, dtype: torch.dtype = _PACKED_IN) -> dict[str, torch.Tensor]:
        return loading.packed(self.state, self.file.layers, dtype)


class LowBitModel(comfy.supported_models_base.BASE):
    """The entry in ComfyUI's table."""

    NAME = "nibble"

    @classmethod
    def matches(cls, unet_config, state_dict=None, unet_key_prefix=""):
        """Whether a state dict is ours. Then the config becomes that of the whole model, whose
        shapes ComfyUI did not see. Raises FileRefused for one that is damaged.
        """
        if state_dict is None or not _is_for_us(state_dict, unet_key_prefix):
            return False
        named = _under(state_dict, unet_key_prefix)
        file = StateDictModel(named)
        state = dict(file.tensors())
        loading.check_finite(file, state)
        whole = loading.packed(state, file.layers, _PACKED_IN)
        config = _config_of(whole, named, unet_config)
        if config is None:
            return False
        config_class = next(
            (
                other
                for other in comfy.supported_models.models
                if other is not cls and other.matches(config, whole)
            ),
            None,
        )
        if config_class is None:
            return False
        dtype = _dtype(state_dict, unet_key_prefix, config_class, None)
        unet_config.clear()
        unet_config.update(config | {_FOUND: _Found(config_class, file, state, dtype)})
        return True

    def __new__(cls, unet_config):
        config = dict(unet_config)
        found = config.pop(_FOUND)
        made = _low_bit(found.config_class)(config)
        made.found = found
        return made


def register() -> None:
    """Puts the entry first in ComfyUI's table, in place of one from an earlier call."""
    table = comfy.supported_models.models
    table[:] = [entry for entry in table if getattr(entry, "NAME", None) != LowBitModel.NAME]
    table.insert(0, LowBitModel)


# ---- recognising


def _is_for_us(state_dict: Mapping[str, torch.Tensor], prefix: str) -> bool:
    """Whether a layer has a format of ours that ComfyUI does not read, or lacks what it would read:
    ComfyUI 0.38 has `awq_w4a16`, with zero points.
    """
    for key in state_dict:
        if not (key.startswith(prefix) and key.endswith(".comfy_quant")):
            continue
        kind = _format(state_dict[key])
        symmetric = f"{key.removesuffix('comfy_quant')}weight_zeros" not in state_dict
        if kind in layouts.LAYOUTS and (
            kind not in QUANT_ALGOS or (kind == W4A16Weight.FORMAT and symmetric)
        ):
            return True
    return False


def _format(text: torch.Tensor) -> str | None:
    """A layer's format; None for JSON that cannot be read, which is for ComfyUI to say."""
    try:
        return tensor_json(text).get("format")
    except ValueError:
        return None


def _under(state_dict: Mapping[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    return {
        key.removeprefix(prefix): tensor
        for key, tensor in state_dict.items()
        if key.startswith(prefix)
    }


def _config_of(
    whole: dict[str, torch.Tensor], stored: dict[str, torch.Tensor], given: dict
) -> dict | None:
    """The config that ComfyUI finds for the whole model, with what the file's metadata added to the
    one that it found for the stored tensors; None where it finds none.
    """
    config = comfy.model_detection.detect_unet_config(whole, "")
    if config is None:
        return None
    plain = comfy.model_detection.detect_unet_config(stored, "") or {}
    missing = object()
    return config | {key: value for key, value in given.items() if plain.get(key, missing) != value}


def _dtype(
    state: Mapping[str, torch.Tensor],
    prefix: str,
    config_class: type,
    weight_dtype: torch.dtype | None,
) -> torch.dtype:
    """What ComfyUI computes a model in, if nothing is asked for."""
    return comfy.model_management.unet_dtype(
        model_params=comfy.utils.calculate_parameters(state, prefix),
        supported_dtypes=list(config_class.supported_inference_dtypes),
        weight_dtype=weight_dtype,
    )


# ---- building


class _LowBitConfig:
    """What a model's own config class gets in front of it. Another pack that brings its own
    `custom_operations` gets them, and the tensors as they are.
    """

    custom_operations = NibbleOperations
    found: _Found | None = None
    asked_for: torch.dtype | None = None
    load_device: torch.device | None = None

    def set_inference_dtype(self, dtype, manual_cast_dtype, device=None):
        """The dtypes of a model that Nibble's node loads. An 8-bit float is not heeded, as in
        ComfyUI's own quantized models.
        """
        if self.found is not None:
            self.load_device = device
            is_8bit = dtype in comfy.model_management.FLOAT8_TYPES
            if dtype == self.found.dtype or is_8bit:
                whole = self.found.packed()
                dtype = _dtype(whole, "", self.found.config_class, comfy.utils.weight_dtype(whole))
            else:
                self.asked_for = dtype
            manual_cast_dtype = comfy.model_management.unet_manual_cast(
                dtype, device, self.supported_inference_dtypes
            )
        super().set_inference_dtype(dtype, manual_cast_dtype, device=device)

    def get_model(self, state_dict, prefix="", device=None):
        """The model, without its weights; each layer's tensors in state_dict become one."""
        found, self.found = self.found, None
        if self.custom_operations is not NibbleOperations:
            return super().get_model(state_dict, prefix, device=device)
        self.quant_config = None  # of ComfyUI's own quantized layers
        for key in [key for key in state_dict if key.startswith(prefix)]:
            del state_dict[key]
        whole = found.packed(self.asked_for or _PACKED_IN)
        state_dict.update({f"{prefix}{name}": tensor for name, tensor in whole.items()})
        model = super().get_model(state_dict, prefix, device=device)
        _finish_when_loaded(model, found.file, self.load_device)
        return model


@functools.cache
def _low_bit(config_class: type) -> type:
    """A model's config class with `_LowBitConfig` in front, under the same name."""
    return type(config_class.__name__, (_LowBitConfig, config_class), {})


def _finish_when_loaded(
    model: torch.nn.Module, file: StateDictModel, load_device: torch.device | None
) -> None:
    """Has `loading.finish` run once, as soon as the model has its weights."""

    def loaded(*_) -> None:
        handle.remove()
        loading.finish(_patcher_of(model, load_device), file)

    handle = model.diffusion_model.register_load_state_dict_post_hook(loaded)


def _patcher_of(model: torch.nn.Module, load_device: torch.device | None) -> ModelPatcher:
    """The patcher that ComfyUI has just made for a model. A model does not know it, and LoRAs are
    planned where the patcher's own wrappers run, so it is looked for among all objects.
    """
    for found in gc.get_objects():
        if issubclass(type(found), ModelPatcher) and found.__dict__.get("model") is model:
            return found
    log.warning(
        "this loader makes its model's patcher after loading: LoRAs on 4-bit layers are right, but"
        " slower to apply"
    )
    device = load_device or comfy.model_management.get_torch_device()
    return ModelPatcher(model, device, comfy.model_management.unet_offload_device())
