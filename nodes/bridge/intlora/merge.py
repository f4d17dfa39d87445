"""IntLoRAs folded into a MODEL's layers in memory (Apply IntLoRA's merge mode).

The merged model is a model of its own, made from the base's file as ComfyUI's own copies for other
devices are: the base's weights are not touched, and a merged weight can be streamed, unloaded and
patched like any other. Layers that are not merged share the file's pages with it.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path

import comfy.model_management
import comfy.sd
import torch
from comfy.model_patcher import ModelPatcher

from ....quant.files.errors import FileRefused
from ....quant.interop.opening import open_4bit
from ....quant.intlora import file
from ....quant.intlora.adapter import Adapter
from ....quant.weights.formats import weight_of
from ..host.progress import Progress
from ..quantized import layouts, loading
from . import files
from .apply import APPLIED, apply_beside, refuse_clash
from .bases import MERGED, Bases
from .fold import (
    BRANCHES,
    MergedLayer,
    MergeReport,
    Weight,
    combined,
    fold,
    layers_by_module,
    merged_layer,
    read_adapters,
)

MODES = ("branch", "merge")
Uses = tuple[tuple[str, float], ...]  # path of an IntLoRA and its strength


def apply(
    model: ModelPatcher,
    name: str,
    strength: float,
    mode: str = "branch",
    node_id: str | None = None,
) -> tuple[ModelPatcher, MergeReport | None]:
    """The model with an IntLoRA on it, the model itself staying as it is; and what a merge did to
    each layer. Raises FileRefused with the reason.
    """
    if mode not in MODES:
        raise ValueError(f"mode {mode!r} is not one of {', '.join(MODES)}")
    if mode == "branch":
        return apply_beside(model, name, strength, node_id), None
    path = str(files.path_of(name))
    adapter = file.read(path)
    if adapter.rounded_bits is not None:
        raise FileRefused(
            f"{name} rounds the layers of a 16-bit model, which has no 4-bit weights to merge it"
            " into; set mode to branch."
        )
    bases = Bases(model)
    bases.check(adapter, name)
    applied = refuse_clash(model, adapter, name)
    base, uses = origin(model)
    if strength == 0 and not any(layer.separated for layer in adapter.layers.values()):
        return model.clone(), None
    # so that the order of a stack changes no bit
    merged_uses = tuple(sorted((*uses, (path, float(strength)))))
    adapters = read_adapters(use for use in uses if use[0] != path) | {path: adapter}
    progress = Progress("merging", node_id)
    fresh, layers = _merged_copy(base, merged_uses, adapters, progress, model.is_dynamic())
    patched = model.clone(model_override=(fresh.model, ({}, {}, {}, set())))
    patched.size = fresh.size
    patched.hook_backup = {}
    patched.cached_patcher_init = fresh.cached_patcher_init
    patched.set_attachments(MERGED, (base[0], frozenset(layer.name for layer in layers)))
    if applied:
        patched.set_attachments(APPLIED, applied)
    report = MergeReport(
        name=Path(base[0]).name,
        branch=BRANCHES[1],
        sources=in_words(merged_uses, 0),
        layers=layers,
        bytes_before=sum(layer.bytes_before for layer in layers),
        bytes_after=sum(layer.bytes_after for layer in layers),
    )
    return patched, report


def origin(model: ModelPatcher) -> tuple[tuple, Uses]:
    """(the arguments of `loading.load` that this model came from, the IntLoRAs merged since: path
    and strength). Raises FileRefused for others.
    """
    init = model.cached_patcher_init
    if init is not None and init[0] is loading.load:
        return tuple(init[1]), ()
    if init is not None and init[0] is load_merged:
        return init[1]
    if init is not None and init[0] is comfy.sd.load_diffusion_model and _is_low_bit(model):
        return (init[1][0], False), ()
    raise FileRefused(
        "The connected model does not come from Load SVDQuant Model or Load VQ Model, so it cannot"
        " be merged; connect one of them, or write a 16-bit model with what is on it by Save"
        " Diffusion Model (ModelSave)."
    )


def _is_low_bit(model: ModelPatcher) -> bool:
    return any(layouts.is_ours(tensor) for tensor in model.model.diffusion_model.parameters())


def load_merged(base: tuple, uses: Uses, disable_dynamic: bool = False) -> ModelPatcher:
    """A model as it was merged before, made anew: how ComfyUI copies it for other devices."""
    progress = Progress("merging")
    patcher, _ = _merged_copy(base, uses, read_adapters(uses), progress, not disable_dynamic)
    return patcher


def _merged_copy(
    base: tuple, uses: Uses, adapters: Mapping[str, Adapter], progress: Progress, dynamic: bool
) -> tuple[ModelPatcher, list[MergedLayer]]:
    patcher = loading.load(*base, disable_dynamic=not dynamic)
    device = comfy.model_management.get_torch_device()
    modules = dict(patcher.model.diffusion_model.named_modules())
    bases = Bases(patcher)
    for path, _ in uses:  # the file may be another one than when the model was loaded
        file_name, base_name = Path(path).name, Path(base[0]).name
        file.check_bases(adapters[path], bases, file_name, base_name, bases.digest)
    source, by_module = open_4bit(base[0]), layers_by_module(uses, adapters)
    layers = []
    for done, (name, on_module) in enumerate(by_module.items()):
        progress(done, len(by_module), name)
        began = time.monotonic()
        weight, delta = combined(weight_of(source, name).to(device), on_module, None)
        new, retention = fold(weight, delta, wider=False)
        _put(modules[name], new.to("cpu"))
        layers.append(merged_layer(name, weight, new, retention, began, wider=False))
    progress(len(by_module), len(by_module))
    patcher.size = 0  # counted again, when asked for
    patcher.cached_patcher_init = (load_merged, (base, uses))
    return patcher, layers


def _put(module: torch.nn.Module, weight: Weight) -> None:
    """Gives a fresh module a new weight of the format that it has, and its bias."""
    old, prefix = module.weight, "x"
    tensors = {
        name.removeprefix(f"{prefix}."): tensor for name, tensor in weight.tensors(prefix).items()
    }
    settings, bias = weight.facts(), tensors.pop("bias", None)
    tensors.pop("comfy_quant")
    packed = layouts.pack(tensors, settings, old.params.orig_dtype)
    chosen = getattr(old.params, "act_bits", None)
    if chosen is not None:  # when the model was loaded, and in no file
        packed = layouts.with_fields(packed, act_bits=chosen)
    module.weight = layouts.live(packed)
    if bias is not None:
        module.bias = torch.nn.Parameter(bias.to(module.bias.dtype), requires_grad=False)


def in_words(uses: Uses, patched: int) -> str:
    """What was merged, for people."""
    named = [f"{Path(path).name} at {strength:g}" for path, strength in uses]
    if patched:
        named.append(f"patches of {patched} tensors")
    return ", ".join(named)
