"""IntLoRA on a MODEL socket: an ordinary LoRA to an adapter of the model's own integers, and an
adapter onto the model.

Keys of LoRA files are mapped by ComfyUI's own loader, parts of fused layers included. What an
adapter changes is handed back to ComfyUI as patches of its own: low-rank factors as a LoRA, which
joins the layer's 16-bit branch, anything else as a difference of weights. So the 4-bit codes are
never written, and taking the patches off gives the base back bit for bit. (Merging into the layers:
`merging`.)

IntLoRA files have a folder of their own, models/intlora: ComfyUI's Load LoRA knows no key of them,
would say so only in the log, and change nothing; so it had better not list them. Files of that
ending in models/loras are read all the same.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import comfy.lora
import comfy.lora_convert
import comfy.model_management
import comfy.utils
import torch
from comfy.model_patcher import ModelPatcher
from comfy.quant_ops import QuantizedTensor
from comfy.weight_adapter import LoRAAdapter, WeightAdapterBase
from torch.utils.weak import WeakIdKeyDictionary

from ....quant.files.errors import FileRefused
from ....quant.interop.opening import open_4bit
from ....quant.intlora import file, merge
from ....quant.intlora.adapter import Adapter, LayerAdapter, key_of
from ....quant.intlora.convert import Change, Conversion, convert
from ....quant.merge.integer_grid import IntBase, refuse_format
from ....quant.weights.formats import weight_of
from ..host import folders
from ..host.progress import Progress
from ..quantized import layouts, lora

FOLDER, LORAS, ENDING = "intlora", "loras", ".intlora.safetensors"
_PREFIX, MODEL = "diffusion_model.", "the connected model"
# attachment of a MODEL: ((layer key, file), …) of the adapters on it that no other may join
APPLIED = "nibble_intlora"
# attachment of a MODEL: (path of the base file, names of the layers in which IntLoRAs were merged)
MERGED = "nibble_merged"
# weight → rows of it → digest: a layer is hashed once for as long as its tensor lives
_digests: dict = WeakIdKeyDictionary()

folders.register(FOLDER)


# ---- files


def ordinary_files() -> list[str]:
    """Names of the LoRAs in ComfyUI's folders that are no IntLoRA."""
    return [name for name in folders.names(LORAS, "") if not name.endswith(ENDING)]


def adapter_files() -> list[str]:
    """Names of the IntLoRA files: all in their own folder, and those among the LoRAs that end as
    they do.
    """
    own = folders.names(FOLDER)
    return own + [name for name in folders.names(LORAS, ENDING) if name not in own]


def _home(name: str) -> str:
    """The folder in which a name is looked for: the IntLoRA folder, and the LoRA folder for what is
    only there.
    """
    only_there = folders.find(name, FOLDER) is None and folders.find(name, LORAS) is not None
    return LORAS if only_there else FOLDER


def path_of(name: str) -> Path:
    """The path of an IntLoRA file. Raises FileRefused for a name that is not there."""
    return folders.path_of(name, _home(name))


def stamp(name: str) -> str:
    """Changes when the file, an IntLoRA or a LoRA, does."""
    return folders.stamp(name, _home(name))


def file_name(lora_name: str, filename: str) -> str:
    """The adapter's name in ComfyUI's lists: as asked for, else its LoRA's; always with the
    ending.
    """
    name = filename.strip() or str(Path(lora_name).with_suffix(""))
    return name.removesuffix(".safetensors").removesuffix(".intlora") + ENDING


# ---- the model's integers


class Bases(Mapping):
    """Module name → integers of a 4-bit MODEL's base, made when asked for: also while patches are
    on the model, and where IntLoRAs were merged into it before (read from the file then). weights:
    the model's own, without patches.
    """

    def __init__(self, model: ModelPatcher, device: torch.device | None = None):
        named = [
            (name, getattr(module, "weight", None))
            for name, module in model.model.diffusion_model.named_modules()
        ]
        backups = {
            name: model.backup.get(f"{_PREFIX}{name}.weight")
            for name, weight in named
            if layouts.is_ours(weight)
        }
        self.weights = {
            name: backups[name].weight if backups[name] else weight
            for name, weight in named
            if name in backups
        }
        path, self._merged = model.get_attachment(MERGED) or (None, ())
        self._file = None if path is None else open_4bit(path)
        self._device = device
        if not self.weights:
            _refuse_model(named)

    def __getitem__(self, name: str) -> IntBase:
        stored = (
            weight_of(self._file, name)
            if name in self._merged
            else layouts.unpack(self.weights[name])
        )
        base = IntBase.of(stored, name, MODEL)
        return base if self._device is None else base.to(self._device)

    def digest(self, name: str, rows: tuple[int, int]) -> str:
        """`IntBase.digest` of rows of a layer."""
        known = _digests.setdefault(self.weights[name], {})
        if rows not in known:
            known[rows] = self[name].rows(*rows).digest()
        return known[rows]

    def __iter__(self) -> Iterator[str]:
        return iter(self.weights)

    def __len__(self) -> int:
        return len(self.weights)

    def __contains__(self, name: object) -> bool:
        return name in self.weights


def _refuse_model(named: list[tuple[str, torch.Tensor | None]]) -> None:
    """Raises FileRefused for a model without any layer of ours, naming the format that it has."""
    for name, weight in named:
        if isinstance(weight, QuantizedTensor):
            refuse_format(str(weight._layout_cls), name, MODEL.capitalize())
        if weight is not None and weight.element_size() == 1:
            refuse_format(str(weight.dtype).removeprefix("torch."), name, MODEL.capitalize())
    raise FileRefused(
        f"{MODEL.capitalize()} is in 16 bits and has no integers for an IntLoRA; connect Load"
        " SVDQuant Model, or apply the LoRA with Load LoRA."
    )


# ---- an ordinary LoRA → an adapter


@dataclass(frozen=True)
class Job:
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


def run(job: Job) -> Converted:
    """Converts a LoRA and saves the adapter, unless it is there already. Raises FileRefused with
    the reason; the model stays as it is.
    """
    bases = Bases(job.model, comfy.model_management.get_torch_device())
    path = folders.path_of(job.lora_name, LORAS)
    facts = {"sha256": hashlib.sha256(path.read_bytes()).hexdigest(), "k": job.k}
    wanted = file_name(job.lora_name, job.filename)
    done = _made_of(wanted, facts | {"target": job.target})
    target, name = folders.new_file(wanted, FOLDER, job.overwrite or done)
    changes, sizes, left_out = _changes(job.model, bases, path)
    found = convert(
        changes,
        bases,
        path.name,
        target=job.target,
        k=job.k,
        progress=Progress("converting", job.node_id),
        facts=facts,
    )
    on_cpu = Adapter(
        {key: layer.to("cpu") for key, layer in found.adapter.layers.items()}, found.adapter.facts
    )
    if (
        done
        and not job.overwrite
        and {key: layer.base for key, layer in file.read(target).layers.items()}
        != {k: v.base for k, v in on_cpu.layers.items()}
    ):
        raise FileRefused(
            f"{name} exists already, made of this LoRA for another 4-bit file; switch 'overwrite'"
            " on, or give another filename."
        )
    if job.overwrite or not done:
        file.save(on_cpu, target)
    folders.refresh(FOLDER)
    actions = {
        row.layer: (
            layouts.unpack(bases.weights[row.layer.partition("@")[0]]).FORMAT.partition("_")[2]
        )
        for row in found.rows
    }
    return Converted(name, found, sizes, left_out, actions, target.stat().st_size)


def _made_of(name: str, facts: dict) -> bool:
    """Whether there is an adapter of that name that says these things of itself, such as which LoRA
    it was made of.
    """
    path = folders.find(name, FOLDER)
    try:
        return path is not None and facts.items() <= file.read(path).facts.items()
    except FileRefused:
        return False


def _changes(
    model: ModelPatcher, bases: Bases, path: Path
) -> tuple[list[Change], dict[str, int], list[str]]:
    """(what a LoRA file does to the 4-bit layers, bytes of it by the adapter's keys, names of what
    it does elsewhere).
    """
    try:
        tensors = comfy.utils.load_torch_file(str(path), safe_load=True)
    except Exception as error:  # whatever the reader of that kind of file raises
        raise FileRefused(
            f"{path.name} cannot be read as a LoRA ({error}); download it again."
        ) from error
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
        name, offset, function = (
            (key, None, None) if isinstance(key, str) else (*key, None, None)[:3]
        )
        module = name.removeprefix(_PREFIX).removesuffix(".weight")
        if module not in bases or not name.endswith(".weight") or function is not None:
            left_out.append(name.removeprefix(_PREFIX))
            continue
        change = _change(module, bases, name, patch, offset, path.name)
        changes.append(change)
        sizes[key_of(module, change.rows)] = _bytes_of(patch)
    return changes, sizes, left_out


def _change(
    module: str,
    bases: Bases,
    key: str,
    patch: object,
    offset: tuple[int, int, int] | None,
    name: str,
) -> Change:
    """One entry of a LoRA file: its factors if it is a plain LoRA, else the difference that ComfyUI
    computes, factored where it has low rank.

    offset: (dimension, start, length) of the part of a fused weight that it is for.
    """
    n, k = bases.weights[module].shape
    if isinstance(patch, LoRAAdapter) and all(extra is None for extra in patch.weights[3:]):
        up, down, alpha = patch.weights[:3]
        up, down = up.flatten(1).float(), down.flatten(1).float()
        rows = (offset[1], offset[1] + offset[2]) if offset is not None and offset[0] == 0 else None
        if offset is not None and offset[0] == 1:
            down = torch.nn.functional.pad(down, (offset[1], k - offset[1] - offset[2]))
        return Change(module, up, down, alpha, rows=rows)
    weight = layouts.effective_weight(
        layouts.unpack(bases.weights[module]), bases.weights[module]._params
    )
    delta = (
        comfy.lora.calculate_weight([(1.0, patch, 1.0, offset, None)], weight.clone(), key) - weight
    )
    if delta.shape != (n, k):
        raise FileRefused(
            f"{name} was made for another model: it makes {module}"
            f" {' x '.join(map(str, delta.shape))}, this model has {n} x {k}; choose a LoRA made"
            " for this model."
        )
    factors = lora.factorise(delta, weight.square().sum().item() * lora.ROUNDING**2)
    if factors is None or not factors[0].shape[1]:
        return Change(module, dense=delta)
    return Change(module, factors[1], factors[0].T)


def _bytes_of(patch: object) -> int:
    parts = patch.weights if isinstance(patch, WeightAdapterBase) else patch[1]
    return sum(part.nbytes for part in parts if isinstance(part, torch.Tensor))


# ---- an adapter → a MODEL


def beside(
    model: ModelPatcher, name: str, strength: float, node_id: str | None = None
) -> ModelPatcher:
    """A clone of the model with an adapter beside its 4-bit weights; the model itself stays as it
    is.

    SHIFT-ADD adapters are their low-rank factors, as a stock LoRA. MUL, SHIFT and dense changes
    have no low rank: the change that the merged integers make, rounding included, dense in 16 bit.
    Raises FileRefused with the reason.
    """
    bases = Bases(model)
    adapter = file.read(path_of(name))
    file.check_bases(adapter, bases, name, MODEL, bases.digest)
    applied = room_for(model, adapter, name)
    patched, patches = model.clone(), {}
    report, modules = Progress("applying", node_id), adapter.by_module()
    for done, (module, layers) in enumerate(modules.items()):
        report(done, len(modules), module)
        patches |= _patches(module, bases, layers, strength)
    report(len(modules), len(modules))
    patched.add_patches(patches)
    if applied:
        patched.set_attachments(APPLIED, applied)
    return patched


def room_for(model: ModelPatcher, adapter: Adapter, name: str) -> tuple[tuple[str, str], ...]:
    """The attachment with this adapter's MUL and SHIFT layers; refuses a second one on the same
    layer.
    """
    applied = model.get_attachment(APPLIED) or ()
    alone = [key for key, layer in adapter.layers.items() if not layer.additive]
    taken = {key.partition("@")[0]: other for key, other in applied}
    clash = next((key for key in alone if key.partition("@")[0] in taken), None)
    if clash is not None:
        raise FileRefused(
            f"{name} multiplies the integers of {clash}, and so does"
            f" {taken[clash.partition('@')[0]]} on this model already; keep one of them, and"
            " convert the others with Convert LoRA to IntLoRA."
        )
    return (*applied, *((key, name) for key in alone))


def _patches(module: str, bases: Bases, layers: list[LayerAdapter], strength: float) -> dict:
    """ComfyUI's patches of one layer: none at strength 0, unless the base lacks what the adapter
    adds (see `LayerAdapter.separated`).
    """
    key = f"{_PREFIX}{module}.weight"
    live = [layer for layer in layers if strength != 0 or layer.separated]
    thin = [layer for layer in live if layer.thin]
    patches = {}
    for layer in thin:
        down, up = layer.factors.floats()
        place = (
            key if layer.rows is None else (key, (0, layer.rows[0], layer.rows[1] - layer.rows[0]))
        )
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
    device, weight = comfy.model_management.get_torch_device(), bases.weights[module]
    change = merge.change(
        bases[module].to(device), [(layer.to(device), strength) for layer in layers]
    )
    return change.to(weight._params.scale.dtype).cpu()
