"""Modulation layers that stay in RAM: computed on the CPU from their 4-bit weights, ahead of the
step that asks for them (`quant/modulation/precompute.py`).

FLUX's modulation holds 27 % of a 4-bit file and sees one token: for each step it turns one vector
(timestep, guidance, pooled text) into shifts, scales and gates, 2 MB in all. So the weights need
not be in VRAM. A `CpuLinear` takes the place of ComfyUI's Linear after loading; it owns no
parameter, so that ComfyUI neither moves nor counts it, and its weights stay in the model's state
dict for LoRAs and saving. Patches become a part of them as of any layer that ComfyUI loads whole:
by its own `patch_weight_to_device`, which keeps a backup and takes them off again.

For a GPU's input the product is torch's own 4-bit one for CPUs, on a second copy of the weights in
RAM, unless compiled kernels bring their own; for an input on the CPU it is the layer itself, so
that the numbers are those of the model without this option.
"""

from __future__ import annotations

import hashlib
import re
import weakref
from fnmatch import fnmatchcase

import comfy.model_management
import torch
from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import CallbacksMP, WrappersMP

from .... import kernels
from ....quant.files.architectures import recognise
from ....quant.modulation.cpu_int4 import CpuInt4Matrix
from ....quant.modulation.precompute import LayerState, ModulationCache
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
        # other nodes' functions of weight and bias
        self.functions: list = []
        self.bias_functions: list = []
        self._packed: tuple[torch.Tensor, CpuInt4Matrix] | None = None  # for inputs from a GPU
        self._bias: tuple[torch.Tensor, bytes] | None = None  # as it was last seen, and its digest

    def __getattr__(self, name: str):
        # what ComfyUI reads off a linear by the names of the state dict; not what would make it
        # load the layer
        if _PASSED_ON.match(name):
            return getattr(self._wrapped[0], name)
        return super().__getattr__(name)

    def __setattr__(self, name: str, value) -> None:
        if name in ("weight", "bias"):
            setattr(self._wrapped[0], name, value)
            self._cache.clear()
        else:
            super().__setattr__(name, value)

    def state_dict(self, *args, **kwargs):
        return self._wrapped[0].state_dict(*args, **kwargs)

    def _load_from_state_dict(self, *args, **kwargs):
        self._cache.clear()
        return self._wrapped[0]._load_from_state_dict(*args, **kwargs)

    @torch.compiler.disable
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """input (…, K) on any device → (…, N) there."""
        if torch.is_grad_enabled() and input.requires_grad:
            return self.compute(input.cpu()).to(input.device)
        # a part of several layers' results, which lie side by side; MiniMax H3 takes views of it
        return self._cache.output(self, input).contiguous()

    def state(self) -> LayerState:
        """What hooks change of it between two steps: they switch the bias in place, and the
        weight's change in its hook cell.
        """
        hooked = self._wrapped[0].weight.params.hooked
        bias, digest = self._seen_bias()
        # by a weak reference: a result that is remembered must not keep a whole change in memory
        change = None if hooked is None else weakref.ref(hooked)
        return LayerState((digest, change), bias, hooked)

    def _seen_bias(self) -> tuple[torch.Tensor | None, bytes]:
        """(a copy of the bias that nobody writes into, its digest)."""
        bias = self._wrapped[0].bias
        if bias is None:
            return None, b""
        if self._bias is None or not _same_bits(self._bias[0], bias):
            seen = bias.detach().clone()
            digest = hashlib.blake2b(seen.view(torch.uint8).numpy().tobytes()).digest()
            self._bias = (seen, digest)
        return self._bias

    def compute(
        self, rows: torch.Tensor, fast: bool = False, state: LayerState | None = None
    ) -> torch.Tensor:
        """The layer itself in that state (None: as it is), on the CPU; fast: by torch's 4-bit
        product where that can do it.
        """
        state = self.state() if state is None else state
        weight, bias = self._wrapped[0].weight, state.bias
        plain = not (self.functions or self.bias_functions or _is_patched(weight))
        if fast and plain and state.change is None:
            packed = self._pack(weight, rows.dtype)
            if packed is not None:
                return packed.product(rows, bias)
        if bias is not None:
            # others' functions may write into it
            bias = bias.to(rows.dtype, copy=bool(self.bias_functions))
        for function in self.bias_functions:
            bias = function(bias)
        return patched_linear(rows, layouts.hooked_by(weight, state.change), bias, self.functions)

    def _pack(self, weight, dtype: torch.dtype) -> CpuInt4Matrix | None:
        """The weight packed for the CPU, once for its codes; None where that is impossible or of
        no use.
        """
        base = layouts.unpack(weight)
        if self._packed is not None:
            codes, packed = self._packed
            if codes.data_ptr() == base.qweight.data_ptr() and packed.dtype == dtype:
                return packed
        self._packed = None
        if (
            layouts.is_padded(weight)
            or not CpuInt4Matrix.supports(base)
            or kernels.which("gemv_w4a16", torch.device("cpu"))[0] == "native"
        ):
            return None
        packed = CpuInt4Matrix(base, dtype)
        self._packed = (base.qweight, packed)  # kept: no other codes can have their address
        return packed

    @property
    def nbytes(self) -> int:
        """Bytes in RAM."""
        return comfy.model_management.module_size(self._wrapped[0])


def _same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    if (one.dtype, one.shape) != (other.dtype, other.shape):
        return False
    return torch.equal(one.view(torch.uint8), other.detach().view(torch.uint8))


def _is_patched(weight: torch.Tensor) -> bool:
    """Whether a patch is part of the weight itself."""
    return weight.params.proj_up is not None or not weight.params.side.is_empty


def keep_in_ram(patcher: ModelPatcher) -> int:
    """Puts the 4-bit modulation layers of a fresh model into RAM for good; returns their bytes.
    Other layers are not touched, nor those that embed one of the vector's sources.
    """
    model = patcher.model.diffusion_model
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    if "input_blocks.0.0.weight" in shapes:  # a U-Net has none
        return 0
    patterns = recognise(_detectable(shapes), "The model", native=True).modulation
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
    """Patches every layer in RAM as the patcher that was just loaded says, once: what ComfyUI has a
    backup of is patched already.
    """
    layers = cpu_layers(patcher)
    for layer in layers:
        for parameter, functions in (("weight", layer.functions), ("bias", layer.bias_functions)):
            key = f"diffusion_model.{layer.name}.{parameter}"
            if key in patcher.patches and key not in patcher.backup:
                patcher.patch_weight_to_device(key, device_to=torch.device("cpu"))
            functions[:] = patcher.weight_wrapper_patches.get(key, ())
    for cache in {layer._cache for layer in layers}:
        cache.clear()
