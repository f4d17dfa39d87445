"""IntLoRA's own form: a 16-bit MODEL whose layers are rounded to the nearest integers, and trained
and applied as those.

    W' = s t (U . Z)   (MUL; `quant/intlora/variants.py`)     Z = round((W - R) / s)

A file holds how Z comes of the MODEL's own weights (`quant/intlora/rounding.py`), not Z. Applied,
each layer's W' takes the place of its weight, rounded once to the MODEL's dtype: a patch of
ComfyUI's that stands before all others of the layer, so that LoRAs add to it in any order.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import replace

import comfy.model_management
import torch
from comfy.model_patcher import ModelPatcher
from comfy.quant_ops import QuantizedTensor

from ....quant.files.architectures import plan, recognise
from ....quant.files.errors import FileRefused
from ....quant.files.safetensors import tensor_bytes
from ....quant.intlora import train
from ....quant.intlora.adapter import Adapter, LayerAdapter, module_of
from ....quant.intlora.linear import Grid, IntLoRALinear
from ....quant.intlora.merge import merge
from ....quant.merge.integer_grid import IntBase
from ....quant.svdquant.recipe import Recipe
from ..host.progress import Progress
from ..quantized import layouts
from ..training.session import Session
from .bases import MODEL, PREFIX

BASES = {
    "round to nearest, 8 bits": Grid.of_paper(8),
    "round to nearest, 4 bits": Grid.of_paper(4),
    "round to odd, 4 bits": replace(Grid.of_paper(4), odd=True),
}
WIDE = (torch.bfloat16, torch.float16, torch.float32)
_NEEDS = (
    "rounding to nearest needs the model's own 16-bit weights; connect Load Diffusion Model with"
    " a 16-bit file"
)


class Weights(Mapping):
    """Module name → weight (N, K) of a 16-bit MODEL's linear, without patches, on a device (None:
    where it lies). Raises FileRefused for a MODEL of fewer bits.
    """

    KIND = "16-bit linear layer"

    def __init__(self, model: ModelPatcher, device: torch.device | None = None):
        self.weights: dict[str, torch.Tensor] = {}
        self._diffusion_model = model.model.diffusion_model
        self._device = device
        for name, module in self._diffusion_model.named_modules():
            weight = getattr(module, "weight", None)
            if not isinstance(weight, torch.Tensor) or weight.ndim != 2:
                continue
            if layouts.is_ours(weight) or isinstance(weight, QuantizedTensor):
                raise FileRefused(f"{MODEL.capitalize()} is quantized, and {_NEEDS}.")
            if not isinstance(module, torch.nn.Linear):
                continue
            if weight.dtype not in WIDE:
                stored = str(weight.dtype).removeprefix("torch.")
                raise FileRefused(
                    f"{MODEL.capitalize()} holds {name} in {stored}, and {_NEEDS}, and set its"
                    " weight_dtype to default."
                )
            backup = model.backup.get(f"{PREFIX}{name}.weight")
            self.weights[name] = weight if backup is None else backup.weight

    def __getitem__(self, name: str) -> torch.Tensor:
        weight = self.weights[name].detach()
        return weight if self._device is None else weight.to(self._device)

    def __iter__(self) -> Iterator[str]:
        return iter(self.weights)

    def __len__(self) -> int:
        return len(self.weights)

    def trainable(self) -> list[str]:
        """The layers that SVDQuant would make W4A4: attention and feed-forward of the blocks."""
        shapes = {
            name: tuple(tensor.shape) for name, tensor in self._diffusion_model.state_dict().items()
        }
        family = recognise(shapes, MODEL.capitalize(), native=True)
        layers = plan(shapes, family, Recipe.from_preset("fast", rank=16), MODEL.capitalize())
        return [layer.name for layer in layers if layer.action == "w4a4" and layer.name in self]

    def fingerprint(self, name: str) -> str:
        """16 hex digits of a layer's weight."""
        weight = self.weights[name].detach().cpu()
        head = f"{weight.dtype} {tuple(weight.shape)}".encode()
        return hashlib.sha256(head + bytes(tensor_bytes(weight))).hexdigest()[:16]

    def check(self, adapter: Adapter, file: str) -> None:
        """Refuses an adapter whose layers are not all here, or that acts on 4-bit integers."""
        for key, layer in adapter.layers.items():
            weight = self.weights.get(module_of(key))
            if layer.rounding is None or layer.rows is not None:
                raise FileRefused(
                    f"{file} acts on the integers of a 4-bit model in {key}, and {MODEL} is in 16"
                    " bits; connect Load SVDQuant Model with the file that it was made for."
                )
            if weight is None or tuple(weight.shape) != layer.shape:
                has = "lacks it" if weight is None else f"has it as {_size(weight.shape)}"
                raise FileRefused(
                    f"{file} rounds the layer {key}, {_size(layer.shape)}, and {MODEL} {has};"
                    " choose the model that it was trained on."
                )

    def base(self, name: str, layer: LayerAdapter, file: str) -> IntBase:
        """The integers of a layer that an adapter acts on. Raises FileRefused where they are not
        those that it was trained on.
        """
        base = layer.rounded(self[name])
        if base.digest() != layer.base:
            raise FileRefused(
                f"{file} was trained on another 16-bit model than {MODEL} ({name} is rounded to"
                " other integers), or on the same one in another dtype; load the file that it was"
                " trained on, as it was loaded then."
            )
        return base


def _size(shape) -> str:
    return " x ".join(map(str, shape))


def refuse_patched(model: ModelPatcher, names: list[str]) -> None:
    """Raises FileRefused where something else changes a layer that is to be rounded: what it
    learned beside it would be lost without it.
    """
    for name in names:
        if f"{PREFIX}{name}.weight" in model.patches:
            raise FileRefused(
                f"{MODEL.capitalize()} has a LoRA on {name}, and rounding to nearest acts on the"
                " model's own weights; train without it, or save the model with it and load that."
            )


def attach(
    session: Session,
    names: list[str],
    options: train.AdapterOptions,
    existing: Adapter | None,
    file: str,
) -> dict[str, IntLoRALinear]:
    """`train.attach` on a loaded 16-bit model; an existing adapter, from `file`, goes on with the
    integers that it has.
    """
    weights = Weights(session.guider.model_patcher, session.device)

    def made(name: str):
        Progress.check()
        if existing is None:
            return train.base_of_linear(weights[name], name, options)
        layer = existing.layers[name].to(session.device)
        return weights.base(name, layer, file), layer.rule

    return train.attach(session.model, names, options, made=made)


def options_of(base: str, variant: str, rank: int, seed: int) -> train.AdapterOptions:
    """What is trained on one of BASES."""
    return train.AdapterOptions(variant, rank, seed, grid=BASES[base])


def base_of(adapter: Adapter) -> str | None:
    """Which of BASES an adapter was trained on; None for one of a 4-bit model's integers."""
    found = next((layer.rounding for layer in adapter.layers.values() if layer.rounding), None)
    if found is None:
        return None
    grids = {(grid.bits, grid.odd): name for name, grid in BASES.items()}
    return grids.get((found.bits, found.odd), f"{found.bits} bits")


def apply_rounded(
    model: ModelPatcher, adapter: Adapter, name: str, strength: float, node_id: str | None
) -> ModelPatcher:
    """A clone of a 16-bit MODEL with an adapter on it: none of its layers is rounded at strength 0,
    and at every other strength all that it was trained on are. Raises FileRefused with the reason.
    """
    weights = Weights(model, comfy.model_management.get_torch_device())
    weights.check(adapter, name)
    patched, patches = model.clone(), {}
    if strength == 0:
        return patched
    progress, total = Progress("applying", node_id), len(adapter.layers)
    for done, (module, layer) in enumerate(adapter.layers.items()):
        progress(done, total, module)
        base = weights.base(module, layer, name)
        uses = [(layer.to(base.scale.device), strength)]
        changed = merge(base, uses, bits=32).base.weight()
        patches[f"{PREFIX}{module}.weight"] = (
            "set",
            (changed.to(weights.weights[module].dtype).cpu(),),
        )
    progress(total, total)
    for key in patched.add_patches(patches):
        entries = patched.patches[key]
        entries.insert(0, entries.pop())  # what others add comes after it
    return patched
