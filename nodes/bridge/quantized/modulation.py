"""Modulation layers that stay in RAM: computed on the CPU from their 4-bit weights, ahead of the
step that asks for them (`quant/modulation/precompute.py`).

FLUX's modulation holds 27 % of a 4-bit file and sees one token: for each step it turns one vector
(timestep, guidance, pooled text) into shifts, scales and gates, 2 MB in all. So the weights need
not be in VRAM. A `CpuLinear` takes the place of ComfyUI's Linear after loading; it owns no
parameter, so that ComfyUI neither moves nor counts it, and its weights stay in the model's state
dict for LoRAs and saving.

For a GPU's input the product is torch's own 4-bit one for CPUs, on a second copy of the weights in
RAM, unless compiled kernels bring their own; for an input on the CPU it is the layer itself, so
that the numbers are those of the model without this option.
"""

from __future__ import annotations

import re
import weakref
from fnmatch import fnmatchcase

import comfy.model_management
import torch
from comfy.model_patcher import LowVramPatch, ModelPatcher
from comfy.patcher_extension import CallbacksMP, WrappersMP

from .... import kernels
from ....quant.files.architectures import recognise
from ....quant.modulation.cpu_int4 import CpuInt4Matrix
from ....quant.modulation.precompute import ModulationCache
from ....quant.weights.awq_w4a16 import W4A16Weight
from . import layouts
from .linear import patched_linear

KEY = "nibble_modulation"
_PASSED_ON = re.compile(
    r"(weight|bias|comfy_quant|weight_(?!function|lowvram)\w+"
    r"|(set|convert)_(weight|bias)|(in|out)_features)$"
)


class CpuLinear(torch.nn.Module):
    """A linear whose weights stay in RAM. `wrapped` is the layer that it stands for."""

    def __init__(self, wrapped: torch.nn.Module, name: str, cache: ModulationCache):
        super().__init__()
        self._wrapped = (wrapped,)  # in a tuple: not a child, so that nothing moves it
        self.name = name
        self._cache = cache
        # patches of the weight, as ComfyUI hands them to a layer that it streams
        self.functions: list = []
        self.bias_functions: list = []
        self._packed: CpuInt4Matrix | None = None  # for inputs from a GPU

    def __getattr__(self, name: str):
        # what ComfyUI reads off a linear by the names of the state dict; not what would make it
        # load the layer
        if _PASSED_ON.match(name):
            return getattr(self._wrapped[0], name)
        return super().__getattr__(name)

    def __setattr__(self, name: str, value) -> None:
        if name in ("weight", "bias"):
            setattr(self._wrapped[0], name, value)
        else:
            super().__setattr__(name, value)

    def state_dict(self, *args, **kwargs):
        return self._wrapped[0].state_dict(*args, **kwargs)

    def _load_from_state_dict(self, *args, **kwargs):
        return self._wrapped[0]._load_from_state_dict(*args, **kwargs)

    @torch.compiler.disable
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """input (…, K) on any device → (…, N) there."""
        if torch.is_grad_enabled() and input.requires_grad:
            return self.compute(input.cpu()).to(input.device)
        return self._cache.output(self, input)

    def compute(self, rows: torch.Tensor, fast: bool = False) -> torch.Tensor:
        """The layer itself, on the CPU; fast: by torch's 4-bit product where that can do it."""
        weight, bias = self._wrapped[0].weight, self._wrapped[0].bias
        if (
            fast
            and not (self.functions or self.bias_functions or self.is_patched)
            and self._pack(weight, rows.dtype)
        ):
            return self._packed.product(rows, bias)
        bias = None if bias is None else bias.to(rows.dtype)
        for function in self.bias_functions:
            bias = function(bias)
        return patched_linear(rows, weight, bias, self.functions)

    def _pack(self, weight, dtype: torch.dtype) -> bool:
        """Packs the weight for the CPU, once; whether that was possible and is of use."""
        base = layouts.unpack(weight)
        if self._packed is not None and self._packed.dtype != dtype:
            self._packed = None
        if (
            self._packed is None
            and CpuInt4Matrix.supports(base)
            and kernels.which("gemv_w4a16", torch.device("cpu"))[0] != "native"
        ):
            self._packed = CpuInt4Matrix(base, dtype)
        return self._packed is not None

    @property
    def is_patched(self) -> bool:
        """Whether a patch or a hook is part of the weight itself."""
        params = self._wrapped[0].weight.params
        return self.is_hooked or params.proj_up is not None or not params.side.is_empty

    @property
    def is_hooked(self) -> bool:
        """Whether a LoRA hook is on: what it changes comes and goes between steps."""
        return self._wrapped[0].weight.params.hooked is not None

    @property
    def nbytes(self) -> int:
        """Bytes in RAM."""
        return comfy.model_management.module_size(self._wrapped[0])


def keep_in_ram(patcher: ModelPatcher) -> int:
    """Puts the 4-bit modulation layers of a fresh model into RAM for good; returns their bytes.
    Other layers are not touched, nor those that embed one of the vector's sources.
    """
    model = patcher.model.diffusion_model
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    if "input_blocks.0.0.weight" in shapes:  # a U-Net has none
        return 0
    patterns = recognise(_detectable(shapes), "The model").modulation
    # a strong one would keep the model alive through its own layers
    base = weakref.ref(patcher.model)
    cache = ModulationCache(lambda sigmas: base().model_sampling.timestep(sigmas))
    for name, module in list(model.named_modules()):
        weight = getattr(module, "weight", None)
        if layouts.format_of(weight) == W4A16Weight.FORMAT and _is_modulation(
            name, module, patterns
        ):
            parent, _, child = name.rpartition(".")
            layer = CpuLinear(module, name, cache)
            setattr(model.get_submodule(parent), child, layer)
            cache.layers.append(layer)
    size = sum(layer.nbytes for layer in cache.layers)
    if size:
        patcher.size = patcher.model_size() - size  # what ComfyUI reserves VRAM for
        patcher.add_callback_with_key(CallbacksMP.ON_LOAD, KEY, _attach)
        patcher.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, KEY, cache.around)
    return size


def _is_modulation(name: str, module: torch.nn.Module, patterns: tuple[str, ...]) -> bool:
    """Whether a layer makes shifts, scales and gates: more numbers than it reads."""
    return module.out_features > module.in_features and any(
        fnmatchcase(name, pattern) for pattern in patterns
    )


def _detectable(shapes: dict) -> dict:
    """Some keys under which a family is recognised are called otherwise once a model is built."""
    return shapes | {
        name.removesuffix("weight") + "scale": shape
        for name, shape in shapes.items()
        if name.endswith("_norm.weight")
    }


def cpu_layers(patcher: ModelPatcher) -> list[CpuLinear]:
    """The layers of a model that stay in RAM."""
    return [
        module
        for module in patcher.model.diffusion_model.modules()
        if isinstance(module, CpuLinear)
    ]


def _attach(patcher: ModelPatcher, *_) -> None:
    """Gives every layer in RAM the patches of the patcher that was just loaded."""
    layers = cpu_layers(patcher)
    for layer in layers:
        for parameter, functions in (("weight", layer.functions), ("bias", layer.bias_functions)):
            key = f"diffusion_model.{layer.name}.{parameter}"
            functions[:] = [LowVramPatch(key, patcher.patches)] if key in patcher.patches else []
            functions.extend(patcher.weight_wrapper_patches.get(key, ()))
    for cache in {layer._cache for layer in layers}:
        cache.clear()
