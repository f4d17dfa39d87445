"""LoRAs and IntLoRAs folded into a new 4-bit file (Merge and Save)."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import comfy.lora
import comfy.model_management
import torch
from comfy.model_patcher import ModelPatcher
from comfy.quant_ops import QuantizedTensor
from comfy.weight_adapter import WeightAdapterBase

from ....quant.files.checkpoint import QuantizedFile
from ....quant.files.errors import FileRefused
from ....quant.files.safetensors import tensor_bytes
from ....quant.files.writer import TensorSpec
from ....quant.interop.edits import Edit, branch_specs, existing_rows, write_edits
from ....quant.interop.opening import open_4bit
from ....quant.merge import refit
from ....quant.weights.delta import WeightDelta, round_rank
from ....quant.weights.formats import weight_of
from ....quant.weights.svdquant_w4a4 import SVDQuantWeight
from ..host import file_names, folders
from ..host.progress import Progress
from ..quantized import layouts, loading
from .bases import PREFIX
from .fold import (
    BRANCHES,
    MergedLayer,
    MergeReport,
    Use,
    Weight,
    change_of_patches,
    combined,
    fold,
    layers_by_module,
    merged_layer,
    read_adapters,
)
from .merge import Uses, in_words, origin


@dataclass(frozen=True)
class SaveJob:
    """What the user asked for. branch: one of BRANCHES."""

    model: ModelPatcher
    filename: str = ""
    branch: str = BRANCHES[0]
    overwrite: bool = False
    node_id: str | None = None


def save_merged(job: SaveJob) -> MergeReport:
    """Writes the model, with all that is on it, as a new 4-bit file. Raises FileRefused with the
    reason; neither model nor base file change.
    """
    base, uses = origin(job.model)
    source, entries = open_4bit(base[0]), job.model.patches
    if not uses and not entries:
        raise FileRefused(
            "The connected model has no LoRA on it, so there is nothing to merge; put Apply IntLoRA"
            " or Load LoRA before this node."
        )
    provenance = {
        "base": source.path.name,
        "branch": job.branch,
        "intlora": [_described(path, strength) for path, strength in uses],
        "patches": {"sha256": _hash(entries), "layers": len(entries)},
    }
    wanted = file_name(source.path.name, job.filename)
    with folders.new_file(wanted, loading.FOLDER, job.overwrite, beside=source.path) as new:
        identity = _identity(source, provenance)
        rows = existing_rows(new.path, identity)
        if rows is None:
            new.check()
            edits = _edits(source, uses, job)
            progress = Progress("merging", job.node_id)
            rows = write_edits(source, new.held, edits, identity, provenance, progress)
            # so that the load node of this very graph finds the file
            folders.refresh(loading.FOLDER)
        nbytes = new.path.stat().st_size
    return MergeReport(
        name=new.name,
        branch=job.branch,
        sources=in_words(uses, len(entries)),
        layers=[MergedLayer.from_json(row) for row in rows],
        bytes_before=source.size,
        bytes_after=nbytes,
        left_out=_left_out(source, entries),
    )


def _identity(source: QuantizedFile, provenance: dict) -> str:
    """The same for the same base file, changes and options, and for no others."""
    facts = [provenance, source.size, source.header_checksum]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]


def _left_out(source: QuantizedFile, entries: dict) -> tuple[str, ...]:
    """The patches for tensors that the file does not have by that name."""
    known = {
        f"{PREFIX}{unit}{suffix}" for unit in source.units for suffix in ("", ".weight", ".bias")
    }
    return tuple(sorted(key.removeprefix(PREFIX) for key in entries if key not in known))


def file_name(base: str, filename: str) -> str:
    """The new file's name in ComfyUI's lists: as asked for, else the base's with an ending of its
    own.
    """
    default = file_names.beside(base, "-merged")
    return folders.plain_name(filename, default, loading.FOLDER, ".safetensors", subfolders=True)


def _described(path: str, strength: float) -> dict:
    return {
        "name": Path(path).name,
        "sha256": hashlib.sha256(Path(path).read_bytes()).hexdigest(),
        "strength": strength,
    }


def _hash(entries: dict) -> str:
    """A digest of ComfyUI's patches: the same for the same tensors, strengths and places."""
    sha = hashlib.sha256()
    for key in sorted(entries):
        sha.update(key.encode())
        for part in _flat(entries[key]):
            sha.update(
                memoryview(tensor_bytes(part))
                if isinstance(part, torch.Tensor)
                else repr(part).encode()
            )
    return sha.hexdigest()


def _flat(value) -> Iterator:
    """The tensors, numbers and names within a patch."""
    if layouts.is_ours(value):
        yield from _flat(layouts.stored_tensors(value, "x"))
    elif isinstance(value, QuantizedTensor):
        yield from _flat(value.state_dict("x"))
    elif isinstance(value, WeightAdapterBase):
        yield type(value).__name__
        yield from _flat(value.weights)
    elif isinstance(value, dict):
        yield from (part for pair in sorted(value.items()) for part in _flat(pair))
    elif isinstance(value, (tuple, list)):
        yield from (part for item in value for part in _flat(item))
    else:
        # of a function its name: it has no address there
        yield getattr(value, "__qualname__", value)


def _edits(source: QuantizedFile, uses: Uses, job: SaveJob) -> dict[str, Edit]:
    """Unit → what becomes of it, for all that change."""
    by_module, edits = layers_by_module(uses, read_adapters(uses)), {}
    entries, modules = job.model.patches, dict(job.model.model.diffusion_model.named_modules())
    for unit in source.units:
        if unit in source.layers:
            layer = _EditedLayer(
                source,
                unit,
                by_module.get(unit, []),
                entries.get(f"{PREFIX}{unit}.weight", []),
                entries.get(f"{PREFIX}{unit}.bias", []),
                wider=job.branch == BRANCHES[0],
                inputs=getattr(modules.get(unit), "in_features", None),
            )
            if layer.is_changed:
                edits[unit] = Edit(layer.specs(), layer.make)
        elif f"{PREFIX}{unit}" in entries:
            make = _make_plain(source, unit, entries[f"{PREFIX}{unit}"])
            edits[unit] = Edit(source.specs(unit), make)
    missing = next((name for name in by_module if name not in source.layers), None)
    if missing:
        raise FileRefused(
            f"{source.path.name} has no layer {missing} in 4 bits any more; load it again."
        )
    return edits


@dataclass(frozen=True)
class _EditedLayer:
    """A quantized layer of the file, with the IntLoRAs and patches for it."""

    source: QuantizedFile
    name: str
    uses: list[Use]
    on_weight: list[tuple]
    on_bias: list[tuple]
    wider: bool
    inputs: int | None = None

    @property
    def is_changed(self) -> bool:
        """Whether anything is for it."""
        return bool(self.uses or self.on_weight or self.on_bias)

    def _weight(self) -> Weight:
        return weight_of(self.source, self.name).to(comfy.model_management.get_torch_device())

    def _combined(self) -> tuple[Weight, WeightDelta]:
        weight, change = self._weight(), None
        if self.on_weight:
            change = change_of_patches(weight, self.name, self.on_weight, self.inputs)
        return combined(weight, self.uses, change)

    def specs(self) -> list[TensorSpec]:
        """The tensors afterwards: known before the work, since the file is laid out first."""
        facts = self.source.layers[self.name]
        if facts["format"] == SVDQuantWeight.FORMAT and not (
            self.wider or facts.get("smooth_rows")
        ):
            return branch_specs(self.source, self.name, facts["rank"])
        weight, delta = self._combined()
        grown = delta.rank + (0 if delta.dense is None else refit.EXTRA)
        rank = facts.get("rank", 0)
        if grown:
            rank = round_rank(rank + grown)
        specs = self.source.specs(self.name)
        if rank:
            specs = branch_specs(self.source, self.name, rank)
        scale = f"{self.name}.weight_scale"
        if weight.scale is not None and scale not in {spec.name for spec in specs}:
            specs.append(TensorSpec(scale, weight.scale.dtype, tuple(weight.scale.shape)))
        return specs

    def make(self) -> tuple[dict[str, torch.Tensor], dict]:
        """The new tensors, and the report's line."""
        began, old = time.monotonic(), self._weight()
        weight, delta = self._combined()
        new, retention = weight, 1.0
        if delta.rank or delta.dense is not None:
            new, retention = fold(weight, delta, self.wider)
        if self.on_bias:
            new = _with_bias(new, self.name, self.on_bias)
        layer = merged_layer(self.name, old, new, retention, began, self.wider)
        return new.to("cpu").tensors(self.name), layer.to_json()


def _with_bias(weight: Weight, name: str, entries: list[tuple]) -> Weight:
    real = weight.effective_bias()
    if real is None or weight.bias is None:
        raise FileRefused(
            f"A LoRA on the model changes the bias of {name}, which has none; choose a LoRA made"
            " for this model."
        )
    changed = comfy.lora.calculate_weight(entries, real.clone(), f"{PREFIX}{name}.bias")
    return replace(weight, bias=(weight.bias.float() + changed - real).to(weight.bias.dtype))


def _make_plain(source: QuantizedFile, unit: str, entries: list[tuple]):
    """Makes a tensor that the file keeps in 16 bit, with its patches."""

    def make() -> tuple[dict[str, torch.Tensor], dict]:
        began, old = time.monotonic(), source.unit(unit)[unit]
        new = comfy.lora.calculate_weight(
            entries, old.to(comfy.model_management.get_torch_device(), torch.float32), PREFIX + unit
        )
        layer = MergedLayer(
            name=unit.removesuffix(".weight"),
            action="keep",
            retention=1.0,
            rank=0,
            bytes_before=old.nbytes,
            bytes_after=old.nbytes,
            seconds=time.monotonic() - began,
        )
        return {unit: new.to("cpu", old.dtype)}, layer.to_json()

    return make
