"""An IntLoRA onto a MODEL, beside its 4-bit weights (Apply IntLoRA's branch mode), or in place of
its 16-bit weights (`rounded`).

What an adapter changes is handed back to ComfyUI as patches of its own: low-rank factors as a LoRA,
which joins the layer's 16-bit branch, anything else as a difference of weights. So the 4-bit codes
are never written, and taking the patches off gives the base back bit for bit.
"""

from __future__ import annotations

import comfy.model_management
import torch
from comfy.model_patcher import ModelPatcher
from comfy.weight_adapter import LoRAAdapter

from ....quant.files.errors import FileRefused
from ....quant.intlora import file
from ....quant.intlora.adapter import Adapter, LayerAdapter, module_of
from ....quant.intlora.merge import change
from ..host.progress import Progress
from . import files
from .bases import PREFIX, Bases
from .rounded import apply_rounded

# attachment of a MODEL: ((layer key, file), …) of the adapters on it that no other may join
APPLIED = "nibble_intlora"


def apply_beside(
    model: ModelPatcher, name: str, strength: float, node_id: str | None = None
) -> ModelPatcher:
    """A clone of the model with an adapter beside its 4-bit weights, or on its rounded 16-bit
    ones; the model itself stays as it is.

    SHIFT-ADD adapters are their low-rank factors, as a stock LoRA. MUL, SHIFT and dense changes
    have no low rank: the change that the merged integers make, rounding included, dense in 16 bit.
    Raises FileRefused with the reason.
    """
    adapter = file.read(files.path_of(name))
    applied = refuse_clash(model, adapter, name)
    if adapter.rounded_bits is not None:
        patched = apply_rounded(model, adapter, name, strength, node_id)
        if strength:
            patched.set_attachments(APPLIED, applied)
        return patched
    bases = Bases(model)
    bases.check(adapter, name)
    patched, patches = model.clone(), {}
    progress, modules = Progress("applying", node_id), adapter.by_module()
    for done, (module, layers) in enumerate(modules.items()):
        progress(done, len(modules), module)
        patches |= _patches(module, bases, layers, strength)
    progress(len(modules), len(modules))
    patched.add_patches(patches)
    if applied:
        patched.set_attachments(APPLIED, applied)
    return patched


def refuse_clash(model: ModelPatcher, adapter: Adapter, name: str) -> tuple[tuple[str, str], ...]:
    """The attachment with this adapter's layers that no other may join: MUL's, SHIFT's, and those
    that it rounds. Raises FileRefused for a second one on the same layer.
    """
    applied = model.get_attachment(APPLIED) or ()
    alone = [key for key, layer in adapter.layers.items() if not layer.additive or layer.rounding]
    taken = {module_of(key): other for key, other in applied}
    clash = next((key for key in alone if module_of(key) in taken), None)
    if clash is not None:
        does = "rounds" if adapter.layers[clash].rounding else "multiplies the integers of"
        raise FileRefused(
            f"{name} {does} {clash}, and so does"
            f" {taken[module_of(clash)]} on this model already; keep one of them, and"
            " convert the others with Convert LoRA to IntLoRA."
        )
    return (*applied, *((key, name) for key in alone))


def _patches(module: str, bases: Bases, layers: list[LayerAdapter], strength: float) -> dict:
    """ComfyUI's patches of one layer: none at strength 0, unless the base lacks what the adapter
    adds (see `LayerAdapter.separated`).
    """
    key = f"{PREFIX}{module}.weight"
    live = [layer for layer in layers if strength != 0 or layer.separated]
    thin = [layer for layer in live if layer.thin]
    patches = {}
    for layer in thin:
        down, up = layer.factors.floats()
        place: str | tuple = key
        if layer.rows is not None:
            start, stop = layer.rows
            place = (key, (0, start, stop - start))
        patches[place] = LoRAAdapter(
            set(), (up * strength, down.T.contiguous(), None, None, None, None)
        )
    rest = [layer for layer in live if layer not in thin]
    if rest:
        patches[(key, None) if thin else key] = ("diff", (_dense(module, bases, rest, strength),))
    return patches


def _dense(module: str, bases: Bases, layers: list[LayerAdapter], strength: float) -> torch.Tensor:
    """What adapters change of a layer's weight on raw inputs, (N, K) in 16 bit, on the CPU;
    computed on ComfyUI's device.
    """
    device = comfy.model_management.get_torch_device()
    weight = bases.weights[module]
    dense = change(bases[module].to(device), [(layer.to(device), strength) for layer in layers])
    return dense.to(weight.params.branch_dtype).cpu()
