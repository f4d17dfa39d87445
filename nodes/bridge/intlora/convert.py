"""An ordinary LoRA to an IntLoRA of a MODEL's own integers (Convert LoRA to IntLoRA).

Keys of LoRA files are mapped by ComfyUI's own loader, parts of fused layers included.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import comfy.lora
import comfy.lora_convert
import comfy.model_management
import torch
from comfy.model_patcher import ModelPatcher
from comfy.quant_ops import QuantizedTensor
from comfy.weight_adapter import LoRAAdapter, WeightAdapterBase

from ....quant.files.errors import FileRefused, reading
from ....quant.intlora import file
from ....quant.intlora.adapter import Adapter, LayerAdapter, key_of, module_of
from ....quant.intlora.convert import Conversion, ModuleChange, Options, convert
from ....quant.weights.delta import WeightDelta
from ....quant.weights.lowrank import ROUNDING, factors_of_lowest_rank
from ..host import folders, tensor_files
from ..host.progress import Progress
from ..quantized import layouts
from .bases import PREFIX, Bases
from .files import FOLDER, LORAS, file_name, new_file, refresh


@dataclass(frozen=True)
class ConvertJob:
    """What the user asked for: k None chooses it for the target."""

    model: ModelPatcher
    lora_name: str
    target: float = 0.02
    k: int | None = None
    filename: str = ""
    overwrite: bool = False
    node_id: str | None = None


@dataclass(frozen=True)
class Converted:
    """A conversion that was saved. name: in ComfyUI's lists; bytes_before: of the LoRA's tensors by
    the adapter's keys; left_out: the rest of the LoRA, by ComfyUI's names; actions: 'w4a4' |
    'w4a16' by key.
    """

    name: str
    conversion: Conversion
    bytes_before: dict[str, int]
    left_out: list[str]
    actions: dict[str, str]
    nbytes: int


def convert_lora(job: ConvertJob) -> Converted:
    """Converts a LoRA and saves the adapter, unless it is there already. Raises FileRefused with
    the reason; the model stays as it is.
    """
    bases = Bases(job.model, comfy.model_management.get_torch_device())
    path = folders.path_of(job.lora_name, LORAS)
    facts = {"sha256": hashlib.sha256(path.read_bytes()).hexdigest(), "k": job.k}
    wanted = file_name(job.lora_name, job.filename)
    with new_file(wanted, job.overwrite) as new:
        exists = _made_of(wanted, facts | {"target": job.target})
        if not exists:
            new.check()
        lora_changes = _read_lora(job.model, bases, path)
        conversion = convert(
            lora_changes.changes,
            bases,
            path.name,
            Options(target=job.target, k=job.k),
            Progress("converting", job.node_id),
            facts,
        )
        _save(conversion, new, exists)
        nbytes = new.path.stat().st_size
    refresh()
    formats = {row.layer: bases.weights[module_of(row.layer)] for row in conversion.rows}
    return Converted(
        name=new.name,
        conversion=conversion,
        bytes_before=lora_changes.sizes,
        left_out=lora_changes.left_out,
        actions={
            key: layouts.format_of(weight).partition("_")[2] for key, weight in formats.items()
        },
        nbytes=nbytes,
    )


def _save(conversion: Conversion, new: folders.NewFile, exists: bool) -> None:
    """Saves the adapter, unless it is there already."""
    layers = {key: layer.to("cpu") for key, layer in conversion.adapter.layers.items()}
    if new.overwrite or not exists:
        new.check()
        file.save(Adapter(layers, conversion.adapter.facts), new.held)
    elif _digests(file.read(new.path).layers) != _digests(layers):
        raise FileRefused(
            f"{new.name} exists already, made of this LoRA for another 4-bit file; switch"
            " 'overwrite' on, or give another filename."
        )


def _digests(layers: dict[str, LayerAdapter]) -> dict[str, str]:
    """Key → digest of the base that it was made for."""
    return {key: layer.base for key, layer in layers.items()}


def _made_of(name: str, facts: dict) -> bool:
    """Whether there is an adapter of that name that says these things of itself, such as which LoRA
    it was made of.
    """
    path = folders.find(name, FOLDER)
    try:
        return path is not None and facts.items() <= file.read(path).facts.items()
    except FileRefused:
        return False


@dataclass(frozen=True)
class _LoRAChanges:
    """What a LoRA file does. changes: to the 4-bit layers; sizes: bytes of it by the adapter's
    keys; left_out: names of what it does elsewhere.
    """

    changes: list[ModuleChange]
    sizes: dict[str, int]
    left_out: list[str]


def _read_lora(model: ModelPatcher, bases: Bases, path: Path) -> _LoRAChanges:
    remedy = "it is no LoRA, or a damaged one: download it again"
    tensors, _ = tensor_files.read(path, remedy)
    with reading(path, remedy):
        return _changes(model, bases, path, tensors)


def _changes(
    model: ModelPatcher, bases: Bases, path: Path, tensors: dict[str, torch.Tensor]
) -> _LoRAChanges:
    if any(name.endswith(".lora_A_scale") for name in tensors):
        raise FileRefused(f"{path.name} is an IntLoRA already; use Apply IntLoRA.")
    keys = comfy.lora.model_lora_keys_unet(model.model, {})
    patches = comfy.lora.load_lora(
        comfy.lora_convert.convert_lora(tensors), keys, log_missing=False
    )
    if not patches:
        raise FileRefused(
            f"{path.name} has no key that this model ({type(model.model).__name__}) knows, such as"
            f" {next(iter(tensors), 'any')}: it was made for another model; choose a LoRA made for"
            " this one."
        )
    changes, sizes, left_out = [], {}, []
    for key, patch in patches.items():
        name, offset, function = _key_parts(key)
        module = name.removeprefix(PREFIX).removesuffix(".weight")
        if module not in bases or not name.endswith(".weight") or function is not None:
            left_out.append(name.removeprefix(PREFIX))
            continue
        change = _lora_change(module, bases.weights[module], patch, offset, path.name)
        changes.append(change)
        sizes[key_of(module, change.rows)] = _bytes_of(patch)
    return _LoRAChanges(changes, sizes, left_out)


def _key_parts(key: str | tuple) -> tuple:
    """(name, offset, function) of a key of ComfyUI's patches."""
    if isinstance(key, str):
        return key, None, None
    return (*key, None, None)[:3]


def _lora_change(
    module: str,
    weight: QuantizedTensor,
    patch: object,
    offset: tuple[int, int, int] | None,
    file_name: str,
) -> ModuleChange:
    """One entry of a LoRA file: its factors if it is a plain LoRA, else the difference that ComfyUI
    computes, factored where it has low rank.

    offset: (dimension, start, length) of the part of a fused weight that it is for.
    """
    n, k = weight.shape
    if isinstance(patch, LoRAAdapter) and all(extra is None for extra in patch.weights[3:]):
        up, down, alpha = patch.weights[:3]
        up, down, rows = up.flatten(1).float(), down.flatten(1).float(), None
        if offset is not None and offset[0] == 0:
            rows = (offset[1], offset[1] + offset[2])
        if offset is not None and offset[0] == 1:
            down = torch.nn.functional.pad(down, (offset[1], k - offset[1] - offset[2]))
        return ModuleChange.of_lora(module, up, down, alpha, rows)
    plain = layouts.effective_weight(weight)
    entries = [(1.0, patch, 1.0, offset, None)]
    delta = comfy.lora.calculate_weight(entries, plain.clone(), f"{PREFIX}{module}.weight") - plain
    if delta.shape != (n, k):
        raise FileRefused(
            f"{file_name} was made for another model: it makes {module}"
            f" {' x '.join(map(str, delta.shape))}, this model has {n} x {k}; choose a LoRA made"
            " for this model."
        )
    factors = factors_of_lowest_rank(delta, plain.square().sum().item() * ROUNDING**2)
    if factors is None or not factors[0].shape[1]:
        return ModuleChange(module, WeightDelta(dense=delta))
    down, up = factors
    return ModuleChange(module, WeightDelta(down=down, up=up))


def _bytes_of(patch: object) -> int:
    parts = patch.weights if isinstance(patch, WeightAdapterBase) else patch[1]
    return sum(part.nbytes for part in parts if isinstance(part, torch.Tensor))
