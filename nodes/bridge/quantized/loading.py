"""A quantized file → a MODEL that is ComfyUI's own in everything but its Linear layers."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import comfy.sd
import comfy.utils
import folder_paths
import torch
from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import WrappersMP

from ....quant.files import checkpoint
from ....quant.interop import opening
from ....quant.interop.model import PublishedFile
from ..host import progress
from . import layouts, lora, modulation
from .linear import NibbleOperations

FOLDER = "diffusion_models"
MODULATION = ("vram", "ram")
DTYPES = {"default": None, "bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}

# kind of file → the node that loads it
LOADERS = {"svdquant": "Load SVDQuant Model", "vq": "Load VQ Model"}

# (path, modification time, size) → the file's kind, None for what cannot be loaded
_known: dict[tuple[str, int, int], str | None] = {}


def quantized_files(kind: str | None = None) -> list[str]:
    """Names of the quantized files of a kind (a key of LOADERS; None: of any) among ComfyUI's
    diffusion models, whoever wrote them.

    Reads headers only, and each file's only once.
    """
    found = {
        name: _kind(name)
        for name in folder_paths.get_filename_list(FOLDER)
        if name.endswith(".safetensors")
    }
    return [name for name, is_kind in found.items() if is_kind and kind in (None, is_kind)]


def _kind(name: str) -> str | None:
    path = folder_paths.get_full_path(FOLDER, name)
    if path is None:
        return None
    stat = os.stat(path)
    key = (path, stat.st_mtime_ns, stat.st_size)
    if key not in _known:
        _known[key] = (
            kind_of(checkpoint.read_header(path).metadata) if opening.is_4bit(path) else None
        )
    return _known[key]


def kind_of(metadata: Mapping[str, str]) -> str:
    """The key of LOADERS for a quantized file's metadata; published files have no method of ours
    and are SVDQuant's.
    """
    return "vq" if metadata.get("method") == "vq" else "svdquant"


def opened(name: str, kind: str) -> checkpoint.QuantizedFile | PublishedFile:
    """A quantized file of a kind, from its name in ComfyUI's lists. Raises FileRefused with the
    reason, and the right node for another kind.
    """
    file = opening.open_4bit(model_path(name))
    found = kind_of(file.metadata)
    if found != kind:
        raise checkpoint.FileRefused(
            f"{name} was made by another method; load it with the node {LOADERS[found]}."
        )
    return file


def model_path(name: str, folder: str = FOLDER) -> Path:
    """The path of a file in one of ComfyUI's model folders. Raises FileRefused for a name that is
    not there.
    """
    path = folder_paths.get_full_path(folder, name)
    if path is None:
        raise checkpoint.FileRefused(
            f"{name} is not in ComfyUI's {folder} folder any more; press R to refresh the list and"
            " choose again."
        )
    return Path(path)


def new_file(name: str, folder: str, overwrite: bool) -> tuple[Path, str]:
    """(path of a new file, its name in ComfyUI's lists), in the first of a kind's folders that can
    be written to. Raises FileRefused.
    """
    folders = [Path(path).resolve() for path in folder_paths.get_folder_paths(folder)]
    for home in folders:
        target = (home / name).resolve()
        if home not in target.parents:
            raise checkpoint.FileRefused(
                f"{name} lies outside ComfyUI's {folder} folder; give a plain file name."
            )
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
        except OSError:
            continue
        if not os.access(target.parent, os.W_OK):
            continue
        if target.exists() and not overwrite:
            raise checkpoint.FileRefused(
                f"{name} exists already; switch 'overwrite' on, or give another filename."
            )
        return target, os.path.relpath(target, home)
    raise checkpoint.FileRefused(
        f"None of ComfyUI's {folder} folders can be written to ({', '.join(map(str, folders))});"
        " change their permissions."
    )


def refresh(folder: str) -> None:
    """Makes ComfyUI's lists show a new file, so that the next node of this very graph finds it."""
    folder_paths.filename_list_cache.pop(folder, None)


def stamp(name: str, folder: str = FOLDER) -> str:
    """Changes when the file does: modification time and size."""
    path = folder_paths.get_full_path(folder, name)
    if path is None:
        return "missing"
    stat = os.stat(path)
    return f"{stat.st_mtime_ns}-{stat.st_size}"


def load(
    path: str | os.PathLike,
    verify: bool = True,
    dtype: str = "default",
    modulation_in: str = "vram",
    disable_dynamic: bool = False,
) -> ModelPatcher:
    """Loads a 4-bit file, Nibble's own or a published one, as ComfyUI's model patcher.

    dtype: a key of DTYPES, what activations and 16-bit layers are computed in. modulation_in: one
        of MODULATION, where 4-bit modulation
    layers stay. Raises FileRefused with the reason.
    """
    file = opening.open_4bit(path)
    if isinstance(file, PublishedFile):
        state, metadata = _read(file), {}
    else:
        if verify:
            file.verify(progress.Progress("checking"))
        state, metadata = comfy.utils.load_torch_file(str(path), return_metadata=True)
    options = {"custom_operations": NibbleOperations} | (
        {"dtype": DTYPES[dtype]} if DTYPES[dtype] else {}
    )
    patcher = comfy.sd.load_diffusion_model_state_dict(
        packed(state, file.layers, DTYPES[dtype] or torch.bfloat16),
        model_options=options,
        metadata=metadata,
        disable_dynamic=disable_dynamic,
    )
    if patcher is None:
        raise checkpoint.FileRefused(
            f"{file.path.name} holds a model that this ComfyUI does not know; update ComfyUI."
        )
    _check_complete(patcher, file)
    if modulation_in == "ram":
        modulation.keep_in_ram(patcher)
    patcher.add_wrapper_with_key(WrappersMP.PREPARE_SAMPLING, lora.WRAPPER, lora.plan_patches)
    patcher.cached_patcher_init = (load, (os.fspath(path), False, dtype, modulation_in))
    return patcher


def _read(file: PublishedFile) -> dict[str, torch.Tensor]:
    """All of a published file's tensors, in Nibble's form."""
    state, report, units = {}, progress.Progress("reading"), list(file.units)
    for done, name in enumerate(units):
        report(done, len(units), name)
        state |= file.unit(name)
    return state


def packed(
    state: dict[str, torch.Tensor], layers: dict[str, dict], dtype: torch.dtype
) -> dict[str, torch.Tensor]:
    """A file's tensors with each quantized layer's joined into its `X.weight`, which then has the
    shape and dtype of the 16-bit model's.

    ComfyUI's model detection, parameter count and dtype choice so see the model that was quantized.
    """
    out = dict(state)
    for name, settings in layers.items():
        parts = {
            key[len(name) + 1 :]: out.pop(key)
            for key in [f"{name}.{part}" for part in _parts(settings)]
            if key in out
        }
        out.pop(f"{name}.comfy_quant", None)
        out[f"{name}.weight"] = layouts.pack(parts, settings, dtype)
    return out


def _parts(settings: dict) -> list[str]:
    kind = settings["format"]
    return [*checkpoint.FORMATS[kind][0], *checkpoint.OPTIONAL.get(kind, ())]


def _check_complete(patcher: ModelPatcher, file: checkpoint.QuantizedFile | PublishedFile) -> None:
    """Every linear of the model must have got its weight, and every quantized layer its place."""
    named = patcher.model.diffusion_model.named_modules()
    modules = {
        name: module for name, module in named if isinstance(module, NibbleOperations.Linear)
    }
    empty = next((name for name, module in modules.items() if module.weight is None), None)
    homeless = next(
        (
            name
            for name in file.layers
            if not layouts.is_ours(getattr(modules.get(name), "weight", None))
        ),
        None,
    )
    if empty or homeless:
        what = (
            f"lacks the layer {empty}"
            if empty
            else f"has a layer that the model does not know, {homeless}"
        )
        fix = (
            "download it again"
            if isinstance(file, PublishedFile)
            else "quantize the model again with this version of ComfyUI"
        )
        raise checkpoint.FileRefused(f"{file.path.name} {what}; {fix}.")


def ram_kept(patcher: ModelPatcher) -> int:
    """Bytes of modulation layers that stay in RAM."""
    return sum(layer.nbytes for layer in modulation.cpu_layers(patcher))


def vram_needed(patcher: ModelPatcher, pixels: int = 1024) -> tuple[int, int]:
    """(bytes of the weights, bytes that ComfyUI reckons for making one picture of pixels x pixels
    without CFG).
    """
    latent = patcher.model.latent_format
    side = pixels // getattr(latent, "spacial_downscale_ratio", 8)
    frames = [1] * (getattr(latent, "latent_dimensions", 2) - 2)
    return patcher.model_size(), int(
        patcher.model.memory_required([1, latent.latent_channels, *frames, side, side])
    )
