"""LoRAs and IntLoRAs folded into a 4-bit model's layers: in memory (Apply IntLoRA's merge mode) or
into a new file (Merge and Save).

What is folded is always the sum of everything at once: base + IntLoRAs that were merged before +
patches, so that stacks lose no more than one of their kind would. Where it goes
(`quant.intlora.fold`):

    W4A4 layers    same size: branch and 4-bit codes are fitted again at the branch's own rank, so
      that nothing costs more than before;
                   wider: the change's factors join the branch, exactly.
    4-bit weights  (modulation, one token a step) the factors lie beside the codes: rounding them to
      4 bits again would lose most of them.
    16 bit         are written with the change in them.

In memory the merged model is a model of its own, made from the base's file as ComfyUI's own copies
for other devices are: the base's weights are not touched, and a merged weight can be streamed,
unloaded and patched like any other. Layers that are not merged share the file's pages with it.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import comfy.lora
import comfy.model_management
import folder_paths
import torch
from comfy.model_patcher import ModelPatcher
from comfy.quant_ops import QuantizedTensor
from comfy.weight_adapter import WeightAdapterBase

from ....quant.files import checkpoint
from ....quant.files.checkpoint import FileRefused
from ....quant.interop.convert import open_source
from ....quant.interop.export import weight_of
from ....quant.interop.model import PublishedFile
from ....quant.intlora import file, merge
from ....quant.intlora.adapter import LayerAdapter
from ....quant.merge import refit
from ....quant.merge.integer_grid import IntBase
from ....quant.merge.write import Edit, bake, branch_specs, found
from ....quant.weights.awq_w4a16 import W4A16Weight
from ....quant.weights.svdquant_w4a4 import SVDQuantWeight
from ..host.progress import Progress
from ..quantized import layouts, loading, lora, patches
from . import files as intlora

MODES = ("branch", "merge")
BRANCHES = ("wider", "same size")
_PREFIX = "diffusion_model."
Weight = SVDQuantWeight | W4A16Weight
Use = tuple[LayerAdapter, float]


@dataclass(frozen=True)
class Row:
    """A layer that was folded. kept: share of the change; rank: of its branch after; note: what was
    done otherwise than asked for.
    """

    name: str
    action: str
    kept: float
    rank: int
    bytes_before: int
    bytes_after: int
    seconds: float = 0.0
    note: str = ""


@dataclass(frozen=True)
class Merged:
    """What a merge did. name: of the model or the file; bytes_before, bytes_after: of the whole
    file, or of the merged layers.
    """

    name: str
    how: str
    sources: str
    rows: list[Row]
    bytes_before: int
    bytes_after: int
    left_out: tuple[str, ...] = ()


# ---- folding a layer


def parts_of(
    weight: Weight, uses: list[Use], effect: patches.Effect | None
) -> tuple[Weight, torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """(weight, its rows scaled where a patch does so, down (K, r), up (N, r), delta (N, K) or None)
    of IntLoRAs and patches together.
    """
    (n, k), device, delta = weight.shape, weight.scale.device, None
    down, up = torch.zeros(k, 0, device=device), torch.zeros(n, 0, device=device)
    if uses:
        base, thin = IntBase.of(weight), [use for use in uses if use[0].thin]
        down, up = merge.branch(base, thin)
        rest = [use for use in uses if not use[0].thin]
        delta = merge.change(base, rest) if rest else None
    if effect is None:
        return weight, down, up, delta
    if effect.scale is not None:
        ratio = effect.scale.to(device)
        weight, up, delta = (
            _scaled(weight, ratio[:, 0]),
            up * ratio,
            None if delta is None else delta * ratio,
        )
    down = torch.cat([down, *(factor.to(device).T for factor in effect.downs)], 1)
    up = torch.cat([up, *(factor.to(device) for factor in effect.ups)], 1)
    if effect.delta is not None:
        delta = effect.delta.to(device) if delta is None else delta + effect.delta.to(device)
    return weight, down, up, delta


def _scaled(weight: Weight, ratio: torch.Tensor) -> Weight:
    """The weight with its rows times ratio (N,), in its scales; its real bias stays."""
    fields = {
        name: getattr(weight, name)
        for name in ("scale", "zeros", "proj_up")
        if getattr(weight, name, None) is not None
    }
    new = replace(
        weight,
        **{
            name: (
                (tensor.float() * (ratio[:, None] if name == "proj_up" else ratio)).to(tensor.dtype)
            )
            for name, tensor in fields.items()
        },
    )
    return refit.same_bias(weight, new) if isinstance(weight, SVDQuantWeight) else new


def folded(
    weight: Weight, down: torch.Tensor, up: torch.Tensor, delta: torch.Tensor | None, wider: bool
) -> tuple[Weight, float]:
    """The weight with a change in it, and the share of it that was kept."""
    if wider or not can_refit(weight):
        return refit.fold_into_branch(weight, down, up, None, delta)
    return refit.refit(weight, down, up, delta)


def can_refit(weight: Weight) -> bool:
    """Whether codes can be fitted again: of a plain layer they would lose the change, and those of
    a composite have no one grid.
    """
    return isinstance(weight, SVDQuantWeight) and not getattr(weight, "smooth_rows", ())


def _row(name: str, old: Weight, new: Weight, kept: float, began: float, wider: bool) -> Row:
    joined = (
        "beside the 4-bit weights"
        if isinstance(old, W4A16Weight)
        else "in a wider branch, since its parts have unlike smoothing"
    )
    note = "" if wider or can_refit(old) else joined
    return Row(
        name,
        "w4a4" if isinstance(old, SVDQuantWeight) else "w4a16",
        kept,
        new.rank,
        old.nbytes,
        new.nbytes,
        time.monotonic() - began,
        note,
    )


# ---- in memory


def apply(
    model: ModelPatcher,
    name: str,
    strength: float,
    mode: str = "branch",
    node_id: str | None = None,
) -> tuple[ModelPatcher, Merged | None]:
    """The model with an IntLoRA on it, the model itself staying as it is; and what a merge did to
    each layer. Raises FileRefused with the reason.
    """
    if mode not in MODES:
        raise ValueError(f"mode {mode!r} is not one of {', '.join(MODES)}")
    if mode == "branch":
        return intlora.beside(model, name, strength, node_id), None
    path = intlora.path_of(name)
    adapter = file.read(path)
    bases = intlora.Bases(model)
    file.check_bases(adapter, bases, name, intlora.MODEL, bases.digest)
    applied = intlora.room_for(model, adapter, name)
    base, uses = origin(model)
    if strength == 0 and not any(layer.separated for layer in adapter.layers.values()):
        return model.clone(), None
    # so that the order of a stack changes no bit
    uses = tuple(sorted((*uses, (str(path), float(strength)))))
    fresh, rows = _fresh(base, uses, Progress("merging", node_id), model.is_dynamic())
    patched = model.clone(model_override=(fresh.model, ({}, {}, {}, set())))
    patched.size, patched.hook_backup, patched.cached_patcher_init = (
        fresh.size,
        {},
        fresh.cached_patcher_init,
    )
    patched.set_attachments(intlora.MERGED, (base[0], frozenset(row.name for row in rows)))
    if applied:
        patched.set_attachments(intlora.APPLIED, applied)
    sizes = sum(row.bytes_before for row in rows), sum(row.bytes_after for row in rows)
    return patched, Merged(Path(base[0]).name, BRANCHES[1], _sources(uses, 0), rows, *sizes)


def origin(model: ModelPatcher) -> tuple[tuple, tuple[tuple[str, float], ...]]:
    """(the arguments of `loading.load` that this model came from, the IntLoRAs merged since: path
    and strength). Raises FileRefused for others.
    """
    init = model.cached_patcher_init
    if init is not None and init[0] is loading.load:
        return tuple(init[1]), ()
    if init is not None and init[0] is load_merged:
        return init[1]
    raise FileRefused(
        "The connected model does not come from Load SVDQuant Model, so it cannot be merged;"
        " connect that node."
    )


def load_merged(
    base: tuple, uses: tuple[tuple[str, float], ...], disable_dynamic: bool = False
) -> ModelPatcher:
    """A model as it was merged before, made anew: how ComfyUI copies it for other devices."""
    return _fresh(base, uses, Progress("merging"), not disable_dynamic)[0]


def _fresh(
    base: tuple, uses: tuple, progress: Progress, dynamic: bool
) -> tuple[ModelPatcher, list[Row]]:
    patcher = loading.load(*base, disable_dynamic=not dynamic)
    device, modules = (
        comfy.model_management.get_torch_device(),
        dict(patcher.model.diffusion_model.named_modules()),
    )
    bases = intlora.Bases(patcher)
    for path, _ in uses:  # the file may be another one than when the model was loaded
        file.check_bases(file.read(path), bases, Path(path).name, Path(base[0]).name, bases.digest)
    source, by_module, rows = open_source(base[0]), _by_module(uses), []
    for done, (name, layers) in enumerate(by_module.items()):
        progress(done, len(by_module), name)
        began, module = time.monotonic(), modules[name]
        weight = weight_of(source, name).to(device)
        here = [(layer.to(device), strength) for layer, strength in layers]
        weight, *change = parts_of(weight, here, None)
        new, kept = folded(weight, *change, wider=False)
        _put(module, new.to("cpu"))
        rows.append(_row(name, weight, new, kept, began, wider=False))
    progress(len(by_module), len(by_module))
    patcher.size = 0  # counted again, when asked for
    patcher.cached_patcher_init = (load_merged, (base, uses))
    return patcher, rows


def _by_module(uses: Iterable[tuple[str, float]]) -> dict[str, list[Use]]:
    """Module → the layers of all adapters for it, with their strengths."""
    found: dict[str, list[Use]] = {}
    for path, strength in uses:
        for name, layers in file.read(path).by_module().items():
            found.setdefault(name, []).extend(
                (layer, strength) for layer in layers if strength != 0 or layer.separated
            )
    return {name: layers for name, layers in found.items() if layers}


def _put(module: torch.nn.Module, weight: Weight) -> None:
    """Gives a fresh module a new weight of the format that it has, and its bias."""
    old, prefix = module.weight, "x"
    tensors = {
        name.removeprefix(f"{prefix}."): tensor for name, tensor in weight.tensors(prefix).items()
    }
    settings, bias = weight.facts(), tensors.pop("bias", None)
    tensors.pop("comfy_quant")
    module.weight = layouts.live(layouts.pack(tensors, settings, old._params.orig_dtype))
    if bias is not None:
        module.bias = torch.nn.Parameter(bias.to(module.bias.dtype), requires_grad=False)


# ---- into a new file


@dataclass(frozen=True)
class Job:
    """What the user asked for. branch: one of BRANCHES."""

    model: ModelPatcher
    filename: str = ""
    branch: str = BRANCHES[0]
    overwrite: bool = False
    node_id: str | None = None


def save(job: Job) -> Merged:
    """Writes the model, with all that is on it, as a new 4-bit file. Raises FileRefused with the
    reason; neither model nor base file change.
    """
    base, uses = origin(job.model)
    source, entries = open_source(base[0]), job.model.patches
    if not uses and not entries:
        raise FileRefused(
            "The connected model has no LoRA on it, so there is nothing to merge; put Apply IntLoRA"
            " or Load LoRA before this node."
        )
    target, name = _target(file_name(source.path.name, job.filename), source.path)
    facts = {
        "base": source.path.name,
        "branch": job.branch,
        "intlora": [_described(path, strength) for path, strength in uses],
        "patches": {"sha256": _hash(entries), "layers": len(entries)},
    }
    identity = hashlib.sha256(
        json.dumps(
            [facts, source.size, zlib.crc32(checkpoint.read_header(source.path).text)]
        ).encode()
    ).hexdigest()[:16]
    rows = found(target, identity)
    if rows is None:
        if target.exists() and not job.overwrite:
            raise FileRefused(
                f"{name} exists already and holds something else; switch 'overwrite' on, or give"
                " another filename."
            )
        rows = bake(
            source,
            target,
            _edits(source, uses, entries, job.branch),
            identity,
            facts,
            Progress("merging", job.node_id),
        )
        # so that the load node of this very graph finds the file
        folder_paths.filename_list_cache.pop(loading.FOLDER, None)
    known = {
        f"{_PREFIX}{unit}{suffix}" for unit in source.units for suffix in ("", ".weight", ".bias")
    }
    left_out = tuple(sorted(key.removeprefix(_PREFIX) for key in entries if key not in known))
    return Merged(
        name,
        job.branch,
        _sources(uses, len(entries)),
        [Row(**row) for row in rows],
        source.size,
        target.stat().st_size,
        left_out,
    )


def file_name(base: str, filename: str) -> str:
    """The new file's name in ComfyUI's lists: as asked for, else the base's with an ending of its
    own.
    """
    name = filename.strip() or f"{Path(base).stem}-merged"
    return name if name.endswith(".safetensors") else f"{name}.safetensors"


def _target(name: str, base: Path) -> tuple[Path, str]:
    """(path of the new file, its name in ComfyUI's lists): beside the base, else in the first
    folder that can be written to.
    """
    folders = [Path(folder).resolve() for folder in folder_paths.get_folder_paths(loading.FOLDER)]
    for folder in sorted(folders, key=lambda folder: folder not in base.resolve().parents):
        target = (folder / name).resolve()
        if folder not in target.parents:
            raise FileRefused(
                f"{name} lies outside ComfyUI's {loading.FOLDER} folder; give a plain file name."
            )
        if os.access(folder, os.W_OK):
            target.parent.mkdir(parents=True, exist_ok=True)
            return target, os.path.relpath(target, folder)
    raise FileRefused(
        f"None of ComfyUI's {loading.FOLDER} folders can be written to"
        f" ({', '.join(map(str, folders))}); change their permissions."
    )


def _sources(uses: tuple, patched: int) -> str:
    """What was merged, for people."""
    named = [f"{Path(path).name} at {strength:g}" for path, strength in uses]
    return ", ".join([*named, *([f"patches of {patched} tensors"] if patched else [])])


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
                memoryview(checkpoint.tensor_bytes(part))
                if isinstance(part, torch.Tensor)
                else repr(part).encode()
            )
    return sha.hexdigest()


def _flat(value) -> Iterator:
    """The tensors, numbers and names within a patch."""
    if isinstance(value, QuantizedTensor):
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


def _edits(source: PublishedFile, uses: tuple, entries: dict, branch: str) -> dict[str, Edit]:
    """Unit → what becomes of it, for all that change."""
    by_module, wider, edits = _by_module(uses), branch == BRANCHES[0], {}
    for unit in source.units:
        here = by_module.get(unit, [])
        if unit in source.layers:
            on_weight, on_bias = (
                entries.get(f"{_PREFIX}{unit}.{part}") for part in ("weight", "bias")
            )
            if here or on_weight or on_bias:
                layer = _Layer(source, unit, here, on_weight or [], on_bias or [], wider)
                edits[unit] = Edit(
                    (
                        branch_specs(source, unit, layer.rank())
                        if layer.rank()
                        else source.specs(unit)
                    ),
                    layer.make,
                )
        elif f"{_PREFIX}{unit}" in entries:
            edits[unit] = Edit(
                source.specs(unit), _plain(source, unit, entries[f"{_PREFIX}{unit}"])
            )
    missing = next((name for name in by_module if name not in source.layers), None)
    if missing:
        raise FileRefused(
            f"{source.path.name} has no layer {missing} in 4 bits any more; load it again."
        )
    return edits


@dataclass(frozen=True)
class _Layer:
    """A quantized layer of the file, with the IntLoRAs and patches for it."""

    source: PublishedFile
    name: str
    uses: list[Use]
    on_weight: list[tuple]
    on_bias: list[tuple]
    wider: bool

    def _weight(self) -> Weight:
        return weight_of(self.source, self.name).to(comfy.model_management.get_torch_device())

    def _parts(self) -> tuple:
        weight = self._weight()
        here = [(layer.to(weight.scale.device), strength) for layer, strength in self.uses]
        return parts_of(
            weight, here, effect_on(weight, self.name, self.on_weight) if self.on_weight else None
        )

    def rank(self) -> int:
        """Of the branch afterwards: known before the work, since the file is laid out first."""
        facts = self.source.layers[self.name]
        if facts["format"] == SVDQuantWeight.FORMAT and not (
            self.wider or facts.get("smooth_rows")
        ):
            return facts["rank"]
        _, down, _, delta = self._parts()
        grown = down.shape[1] + (0 if delta is None else refit.EXTRA)
        return refit.multiple(facts.get("rank", 0) + grown) if grown else facts.get("rank", 0)

    def make(self) -> tuple[dict[str, torch.Tensor], dict]:
        began, old = time.monotonic(), self._weight()
        weight, *change = self._parts()
        new, kept = (
            (weight, 1.0)
            if not change[0].shape[1] and change[2] is None
            else folded(weight, *change, self.wider)
        )
        if self.on_bias:
            new = _with_bias(new, self.name, self.on_bias)
        row = _row(self.name, old, new, kept, began, self.wider)
        return new.to("cpu").tensors(self.name), asdict(row)


def effect_on(weight: Weight, name: str, entries: list[tuple]) -> patches.Effect:
    """What ComfyUI's patches do to a layer: as factors where they are, or can be split
    into, some.
    """
    key = f"{_PREFIX}{name}.weight"
    effect = patches.effect_of(entries, weight.shape, weight.dequantize, name, weight.scale.device)
    if effect is not None:
        return effect
    original = weight.dequantize()
    delta = comfy.lora.calculate_weight(entries, original.clone(), key) - original
    factors = lora.factorise(delta, original.square().sum().item() * lora.ROUNDING**2)
    if factors is None:
        return patches.Effect(tuple(weight.shape), delta=delta)
    return patches.Effect(tuple(weight.shape), downs=[factors[0].T], ups=[factors[1]])


def _with_bias(weight: Weight, name: str, entries: list[tuple]) -> Weight:
    real = weight.effective_bias()
    if real is None or weight.bias is None:
        raise FileRefused(
            f"A LoRA on the model changes the bias of {name}, which has none; choose a LoRA made"
            " for this model."
        )
    changed = comfy.lora.calculate_weight(entries, real.clone(), f"{_PREFIX}{name}.bias")
    return replace(weight, bias=(weight.bias.float() + changed - real).to(weight.bias.dtype))


def _plain(source: PublishedFile, unit: str, entries: list[tuple]):
    """Makes a tensor that the file keeps in 16 bit, with its patches."""

    def make() -> tuple[dict[str, torch.Tensor], dict]:
        began, old = time.monotonic(), source.unit(unit)[unit]
        new = comfy.lora.calculate_weight(
            entries,
            old.to(comfy.model_management.get_torch_device(), torch.float32),
            _PREFIX + unit,
        )
        row = Row(
            unit.removesuffix(".weight"),
            "keep",
            1.0,
            0,
            old.nbytes,
            old.nbytes,
            time.monotonic() - began,
        )
        return {unit: new.to("cpu", old.dtype)}, asdict(row)

    return make
