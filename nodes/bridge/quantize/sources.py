"""The models that a quantize node can read: under which names they are listed, and where they lie.

A name is that of a diffusion model in ComfyUI's lists; `checkpoints/…` is a file of
models/checkpoints, of which the diffusion model alone is taken, `diffusers/…` a folder of
models/diffusers. Of a model in several files the first stands for all.
"""

from __future__ import annotations

from pathlib import Path, PurePath

import comfy.sd
from comfy.model_patcher import ModelPatcher

from ....quant.files.errors import FileRefused
from ....quant.files.source import Source
from ....quant.files.source_files import TRANSFORMERS, is_later_shard, model_stem
from ..host import file_names, folders
from ..host.folders import DIFFUSION_MODELS as FOLDER
from ..quantized.loading import quantized_files

CHECKPOINTS, DIFFUSERS = "checkpoints", "diffusers"
_GGUF, _PIPELINE = ".gguf", "model_index.json"


def listed() -> list[str]:
    """What can be quantized, as far as names tell: models that are not quantized by Nibble yet."""
    quantized = set(quantized_files())
    models = [name for name in folders.names(FOLDER) if name not in quantized]
    models += folders.every_name(FOLDER, _GGUF)
    checkpoints = folders.names(CHECKPOINTS) + folders.every_name(CHECKPOINTS, _GGUF)
    pipelines = [
        PurePath(name).parent.as_posix()
        for name in folders.every_name(DIFFUSERS, _PIPELINE)
        if PurePath(name).parent.parts
    ]
    names = [
        *models,
        *(f"{CHECKPOINTS}/{name}" for name in checkpoints),
        *(f"{DIFFUSERS}/{name}" for name in pipelines),
    ]
    return [name for name in names if not is_later_shard(name)]


def find(name: str) -> Path | None:
    """The path of a listed model; None for what is not there, or no name at all."""
    path = folders.find(name, FOLDER)
    if path is not None or not isinstance(name, str):
        return path
    kind, _, rest = name.partition("/")
    if kind == CHECKPOINTS:
        return folders.find(rest, CHECKPOINTS)
    return folders.find_folder(rest, DIFFUSERS) if kind == DIFFUSERS else None


def path_of(name: str) -> Path:
    """The path of a listed model. Raises FileRefused for a name that is not there."""
    path = find(name)
    if path is None:
        raise folders.missing(name, FOLDER)
    return path


def stamp(name: str) -> str:
    """Changes when the model's first file does."""
    path = find(name)
    return "missing" if path is None else folders.stamp_of(path)


def origin(name: str) -> str:
    """What a file made of a model is named after, as a name in ComfyUI's lists."""
    kind, _, rest = name.partition("/")
    if kind in (CHECKPOINTS, DIFFUSERS) and folders.find(name, FOLDER) is None:
        name = rest
    path = PurePath(name.replace("\\", "/"))
    if path.parent.name in TRANSFORMERS:  # of a pipeline
        return str(path.parent.parent) if path.parent.parent.name else path.parent.name
    stem = model_stem(file_names.without(path.name, _GGUF))
    return str(path.with_name(stem))


def load(source: Source) -> ModelPatcher:
    """The model to measure: from its file where ComfyUI reads it itself, else from what was read
    and decoded. Raises FileRefused for what this ComfyUI does not know.
    """
    if source.is_one_file:
        return comfy.sd.load_diffusion_model(str(source.path))
    weights = {name: source.read(name) for name in source.shapes}
    patcher = comfy.sd.load_diffusion_model_state_dict(weights, metadata=dict(source.metadata))
    if patcher is None:
        raise FileRefused(
            f"{source.name} holds a model that this ComfyUI does not know; update ComfyUI. (DiT and"
            " SANA are for scripts with diffusers: python ComfyUI-Nibble quantize.)"
        )
    return patcher
