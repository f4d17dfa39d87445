"""A quantizer of diffusers' own interface: `from_pretrained(..., quantization_config=...)`.

NibbleConfig(...) given   a 16-bit model is quantized from its weights while it loads, a layer in
                          memory at a time
a folder that was saved   its config.json tells the layers; they are loaded as they are

FLUX.1 is planned as in ComfyUI, where q, k and v are one layer: they are joined, quantized and
split again, so that the model is the one that `load_quantized` gives of a file made by the same
options. Of other models each linear is a layer of its own, and each convolution of 1 x 1 in SANA.

What quantizes is not of this room: `register` is given it.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from enum import Enum
from typing import Any, Protocol

import torch
from diffusers.quantizers import auto
from diffusers.quantizers.base import DiffusersQuantizer
from diffusers.quantizers.quantization_config import QuantizationConfigMixin
from torch import Tensor, nn

from ..files import pointwise, unet_names
from ..files.architectures import LayerPlan
from ..weights import linears
from ..weights.base import StoredLinear, tensor_json
from ..weights.formats import FORMATS, Weight
from ..weights.modules import as_module
from .names import diffusers_parts, flux_module, in_other_order, swap_rows, to_flux_names
from .pointwise import is_pointwise, on_channels, takes_channels


class QuantMethod(str, Enum):
    """Nibble's name among diffusers' methods."""

    NIBBLE = "nibble"


class LayerByLayer(Protocol):
    """What quantizes layers from their weights alone."""

    def plan(self, shapes: Mapping[str, tuple[int, ...]], name: str) -> list[LayerPlan]:
        """What becomes of each linear."""

    def layer(self, plan: LayerPlan, weight: Tensor, bias: Tensor | None) -> Weight:
        """A linear, quantized."""


_methods: list[Callable[[Mapping[str, Any]], LayerByLayer]] = []


def register(method: Callable[[Mapping[str, Any]], LayerByLayer]) -> None:
    """Enters the quantizer in diffusers' tables. method: options → what quantizes by them."""
    _methods[:] = [method]
    auto.AUTO_QUANTIZER_MAPPING[QuantMethod.NIBBLE.value] = NibbleQuantizer
    auto.AUTO_QUANTIZATION_CONFIG_MAPPING[QuantMethod.NIBBLE.value] = NibbleConfig


class NibbleConfig(QuantizationConfigMixin):
    """4-bit weights and activations beside a 16-bit low-rank branch, for diffusers'
    `quantization_config`.

    options  of the quantization from the weights alone: rank=32, act_bits=4 or 8,
             format="svdquant_w4a4", modulation="w4a16" or "keep", seed=0,
             keep=["double_blocks.0.*"] (16 bit; FLUX.1's and SDXL's layers by ComfyUI's names), …
    layers   of a model that is quantized: written by `save_pretrained`, not by hand

    Raises ValueError for options that cannot be.
    """

    def __init__(
        self,
        layers: list[dict[str, Any]] | None = None,
        quant_method: str = QuantMethod.NIBBLE.value,
        **options: Any,
    ):
        self.quant_method = QuantMethod(quant_method)
        self.layers = layers
        self.options = options
        if layers is None:
            _methods[0](options)

    def to_dict(self) -> dict[str, Any]:
        """As config.json has it."""
        own = {"quant_method": self.quant_method.value, "layers": copy.deepcopy(self.layers)}
        return own | copy.deepcopy(self.options)

    def to_diff_dict(self) -> dict[str, Any]:
        """The same, for `repr`."""
        return self.to_dict()


class Pending(nn.Module):
    """Stands for a quantized linear until all its tensors are there; on no device."""

    pointwise = False  # in the place of a convolution

    def __init__(self, tensors: list[str]):
        super().__init__()
        for name in tensors:
            self.register_buffer(name, torch.empty(0, device="meta"))


class NibbleQuantizer(DiffusersQuantizer):
    """What diffusers' loader calls; see `DiffusersQuantizer` for when."""

    required_packages = ["accelerate"]
    is_serializable = True
    is_trainable = True  # by adapters beside the layers
    is_compileable = True

    def __init__(self, quantization_config: NibbleConfig, **kwargs):
        super().__init__(quantization_config, **kwargs)
        self.config = quantization_config
        self.pre_quantized = quantization_config.layers is not None
        self.plans: dict[str, LayerPlan] = {}
        self.parts: dict[str, list[str]] = {}  # layer → diffusers' modules of it, in row order
        self.layer_of: dict[str, str] = {}  # the other way round
        self.read: dict[str, dict[str, Tensor]] = {}  # layer → its tensors so far
        if not self.pre_quantized:
            self.method = _methods[0](quantization_config.options)

    def update_torch_dtype(self, torch_dtype: torch.dtype | None) -> torch.dtype:
        """Of what stays in 16 bit."""
        return torch.bfloat16 if torch_dtype is None else torch_dtype

    def _process_model_before_weight_loading(self, model: nn.Module, **kwargs) -> None:
        if self.pre_quantized:
            for group in self.config.layers or []:
                for name in group["modules"]:
                    pending = Pending(group["tensors"])
                    pending.pointwise = is_pointwise(linears.replace(model, name, pending))
            return
        state = model.state_dict()
        names = _Names(state)
        for plan in self.method.plan(names.shapes, type(model).__name__):
            parts = names.parts(plan.name)
            linear = all(_is_linear(model.get_submodule(part)) for part in parts)
            if plan.action in ("w4a4", "w4a16") and linear:
                self.plans[plan.name], self.parts[plan.name] = plan, parts
                self.layer_of |= dict.fromkeys(parts, plan.name)

    def check_if_quantized_param(
        self, model: nn.Module, param_value: Tensor, param_name: str, state_dict: dict, **kwargs
    ) -> bool:
        """Whether a tensor is a part of a quantized layer."""
        owner = param_name.rpartition(".")[0]
        return owner in self.layer_of or isinstance(model.get_submodule(owner), Pending)

    def create_quantized_param(
        self,
        model: nn.Module,
        param_value: Tensor,
        param_name: str,
        target_device: torch.device,
        state_dict: dict[str, Tensor],
        *args,
        **kwargs,
    ) -> None:
        """Takes a tensor of the checkpoint; a layer that has all of its own is made."""
        owner, _, name = param_name.rpartition(".")
        stored = state_dict[param_name]  # param_value was cast already
        if self.pre_quantized:
            model.get_submodule(owner)._buffers[name] = stored.to(target_device)
            return
        layer = self.layer_of[owner]
        read = self.read.setdefault(layer, {})
        read[param_name] = stored.to(target_device)
        kinds = ("weight", "bias") if self.plans[layer].bias else ("weight",)
        if len(read) == len(kinds) * len(self.parts[layer]):
            self._make(model, layer, self.read.pop(layer))

    def _make(self, model: nn.Module, layer: str, read: Mapping[str, Tensor]) -> None:
        """Quantizes a layer, and puts its parts in their places."""
        plan, parts = self.plans.pop(layer), self.parts[layer]
        weights = [read[f"{part}.weight"].flatten(1) for part in parts]
        joined = in_other_order(layer, torch.cat(weights))
        bias = None
        if plan.bias:
            bias = in_other_order(layer, torch.cat([read[f"{part}.bias"] for part in parts]))
        whole = swap_rows(layer, self.method.layer(plan, joined, bias))
        start = 0
        for part, weight in zip(parts, weights, strict=True):
            _put(model, part, as_module(whole.rows(start, start + len(weight))))
            start += len(weight)

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs) -> nn.Module:
        if self.plans:
            raise ValueError(
                f"the checkpoint lacks the weights of {next(iter(self.plans))}; download it again"
            )
        for name, module in list(model.named_modules()):
            if isinstance(module, Pending):
                layer = as_module(_finished(name, module))
                linears.replace(model, name, on_channels(layer) if module.pointwise else layer)
        self.config.layers = described(model)
        return model

    def get_state_dict_and_metadata(
        self, state_dict: dict[str, Tensor], safe_serialization: bool = False
    ) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """For `save_pretrained`: parts of one layer share memory, which no file can. Raises
        ValueError while adapters are loaded: a saved model has none.
        """
        if any(".lora_A." in name for name in state_dict):
            raise ValueError(
                "LoRAs are loaded beside the 4-bit layers, which save_pretrained cannot write; call"
                " unload_lora_weights first, or save_lora_adapter for the LoRA alone"
            )
        return _apart(state_dict), {}

    def _dequantize(self, model: nn.Module) -> nn.Module:
        """Every layer as the 16-bit linear that it stands for."""
        dtype = next(p.dtype for p in model.parameters() if p.is_floating_point())
        for name, module in list(model.named_modules()):
            if isinstance(module, StoredLinear):
                linear = _plain(module.quantized(), dtype)
                linears.replace(
                    model, name, on_channels(linear) if takes_channels(module) else linear
                )
        self.config.layers = None
        return model


class _Names:
    """What a model's layers are called where they are planned: FLUX.1's and SDXL's as in ComfyUI,
    others as in diffusers.
    """

    def __init__(self, state: Mapping[str, Tensor]):
        self._flux = all(flux_module(name.rpartition(".")[0]) for name in state)
        self._theirs: dict[str, str] = {}
        if self._flux:
            state = to_flux_names(dict(state))
        elif unet_names.is_sdxl(state):
            ours = unet_names.to_comfyui(state)
            self._theirs = {
                new.removesuffix(".weight"): old.removesuffix(".weight")
                for old, new in ours.items()
            }
            state = {ours[name]: tensor for name, tensor in state.items()}
        self.shapes = {
            name: pointwise.matrix(name, tuple(tensor.shape)) for name, tensor in state.items()
        }

    def parts(self, layer: str) -> list[str]:
        """diffusers' modules of a layer, in the order of its rows."""
        return diffusers_parts(layer) if self._flux else [self._theirs.get(layer, layer)]


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) or is_pointwise(module)


def _put(model: nn.Module, name: str, layer: nn.Module) -> None:
    """A quantized layer in the place of a linear, or of a convolution of 1 x 1."""
    if is_pointwise(linears.replace(model, name, layer)):
        on_channels(layer)


def attach(model: nn.Module) -> None:
    """Gives a quantized model of `load_quantized` its quantizer, so that it is saved as one that
    `from_pretrained` made.
    """
    config = NibbleConfig(described(model))
    found: Any = model  # a ModelMixin
    found.is_quantized = True
    found.quantization_method = config.quant_method
    found.hf_quantizer = NibbleQuantizer(config)
    found.register_to_config(quantization_config=config)


def described(model: nn.Module) -> list[dict[str, Any]]:
    """A model's quantized layers for its config.json: modules, tensors and facts of equal ones
    together.
    """
    groups: dict[str, dict[str, Any]] = {}
    for name, module in model.named_modules():
        if isinstance(module, StoredLinear):
            tensors = sorted(module.state_dict())
            group = {"tensors": tensors, "facts": dict(module.facts), "modules": []}
            groups.setdefault(repr(group), group)["modules"].append(name)
    return list(groups.values())


def _finished(name: str, pending: Pending) -> Weight:
    """The weight of a layer that was read. Raises ValueError where it is not whole."""
    buffers = {key: tensor for key, tensor in pending.named_buffers()}
    missing = [key for key, tensor in buffers.items() if tensor.is_meta]
    if missing:
        raise ValueError(f"the checkpoint lacks {name}.{missing[0]}; download it again")
    facts = tensor_json(buffers["comfy_quant"])
    kind = facts.get("format")
    if kind not in FORMATS:
        raise ValueError(f"{name} has the format {kind!r}, which this version does not know")
    return FORMATS[kind].from_tensors(
        {f"{name}.{key}": tensor for key, tensor in buffers.items()}, name
    )


def _apart(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same values, each tensor in memory of its own."""
    seen: set[int] = set()
    apart = {}
    for name, tensor in state.items():
        storage = tensor.untyped_storage()
        alone = storage.data_ptr() not in seen and storage.nbytes() == tensor.nbytes
        seen.add(storage.data_ptr())
        apart[name] = tensor if alone else tensor.clone()
    return apart


def _plain(weight: Any, dtype: torch.dtype) -> nn.Linear:
    matrix, bias = weight.dequantize(), weight.effective_bias()
    linear = nn.Linear(matrix.shape[1], matrix.shape[0], bias is not None, dtype=dtype)
    linear.weight.data.copy_(matrix)
    if bias is not None:
        linear.bias.data.copy_(bias)
    return linear.to(weight.device)
