"""The files that a source is in: one safetensors file, the shards that an index lists, a folder of
diffusers, or a GGUF file. `open_stored` is the door for all of them.

An index is a JSON beside the shards, {"weight_map": {name: file}} (Hugging Face's
`*.safetensors.index.json`); shards without one are known by their names, `…-00001-of-00003`.
"""

import json
import re
from pathlib import Path

from . import gguf_encoders
from .diffusers_names import in_comfyui_names
from .errors import FileRefused, reading
from .gguf_file import GgufFile
from .stored_tensors import SafetensorsFiles, StoredTensors

INDEX = ".safetensors.index.json"
SHARD = re.compile(r"(.+)-(\d{5})-of-(\d{5})(\.safetensors|\.sft)", re.I)
TRANSFORMERS = ("transformer", "unet")
"""Where a pipeline of diffusers keeps its diffusion model."""
_DIFFUSERS = "diffusion_pytorch_model"
_LONGEST_JSON = 1 << 26  # bytes of an index
_MOST_SHARDS = 1000


def open_stored(path: Path) -> StoredTensors:
    """The tensors that a path names: a file, any shard of several, an index, a folder of diffusers
    or any file in it, a pipeline's folder. Raises FileRefused with the reason.
    """
    with reading(path):
        if path.is_dir():
            return _folder(path)
        if path.suffix.lower() == ".gguf":
            return gguf_encoders.in_comfyui_names(GgufFile(path))
        if path.name.endswith(INDEX):
            return _shards(path, _listed(path))
        if SHARD.fullmatch(path.name):
            return _shards(path, shards_of(path))
        return _with_config(SafetensorsFiles(path, [path]), path.parent, path.name)


def is_later_shard(name: str) -> bool:
    """Whether a file's name says that it is not the first of a model's."""
    found = SHARD.fullmatch(name)
    return found is not None and int(found[2]) > 1


def model_stem(name: str) -> str:
    """A file's name without what tells the shards of a model apart."""
    found = SHARD.fullmatch(name)
    return found[1] if found else name


def shards_of(path: Path) -> list[Path]:
    """All shards of the model that one shard's path belongs to. Raises FileRefused where one is
    missing.
    """
    found = SHARD.fullmatch(path.name)
    assert found is not None  # asked by the callers
    stem, count, ending = found[1], int(found[3]), found[4]
    if count > _MOST_SHARDS:
        raise FileRefused(f"{path.name} says that it is one of {count} files; check its name.")
    names = [f"{stem}-{number:05d}-of-{count:05d}{ending}" for number in range(1, count + 1)]
    return _complete(path, [path.with_name(name) for name in names])


def _listed(index: Path) -> list[Path]:
    """The files that an index lists."""
    with open(index, "rb") as file:
        text = file.read(_LONGEST_JSON + 1)
    if len(text) > _LONGEST_JSON:
        raise FileRefused(f"{index.name} is too long for an index; download it again.")
    places = json.loads(text)["weight_map"]
    names = sorted(set(places.values()))
    if not names or len(names) > _MOST_SHARDS or any(Path(name).name != name for name in names):
        raise FileRefused(
            f"{index.name} does not list the files beside it that hold a model; download the"
            " whole folder again."
        )
    return _complete(index, [index.with_name(name) for name in names])


def _complete(path: Path, files: list[Path]) -> list[Path]:
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        raise FileRefused(
            f"{path.name} is one of {len(files)} files of a model, and {missing[0]} is not beside"
            " it; download all of them into one folder."
        )
    return files


def _shards(path: Path, files: list[Path]) -> StoredTensors:
    found = SHARD.fullmatch(files[0].name)
    stem = found[1] if found else path.name.removesuffix(INDEX)
    stored = SafetensorsFiles(path, files, f"{stem}.safetensors")
    return _with_config(stored, files[0].parent, stem)


def _folder(folder: Path) -> StoredTensors:
    """A folder of one model: a part of diffusers' pipelines, or the whole pipeline."""
    inside = next((folder / name for name in TRANSFORMERS if (folder / name).is_dir()), None)
    if inside is not None:
        return _folder(inside)
    indexes = sorted(folder.glob(f"*{INDEX}"))
    # of two, the one without a variant's name (".fp16")
    if indexes:
        return _shards(folder, _listed(min(indexes, key=lambda index: len(index.name))))
    files = sorted(file for file in folder.glob("*.safetensors") if file.is_file())
    plain = [file for file in files if file.name.startswith(_DIFFUSERS)] or files
    if plain and SHARD.fullmatch(plain[0].name):
        return _shards(folder, shards_of(plain[0]))
    if len(plain) == 1:
        return _with_config(SafetensorsFiles(folder, plain), folder, _DIFFUSERS)
    what = f"{len(plain)} .safetensors files that are not parts of one model" if plain else "none"
    raise FileRefused(
        f"The folder {folder.name} is not that of one diffusion model: it holds {what}; choose a"
        " file, or a folder that diffusers has saved."
    )


def _with_config(files: SafetensorsFiles, folder: Path, stem: str) -> StoredTensors:
    """The same under ComfyUI's names, and with the config that lies beside diffusers' files."""
    if stem.startswith(_DIFFUSERS):
        files.name = folder_name(folder)
        config = folder / "config.json"
        # ComfyUI builds some video models by it, and reads it so from single files
        if config.is_file() and config.stat().st_size < _LONGEST_JSON:
            content = json.loads(config.read_text(encoding="utf-8"))
            files.metadata = {"config": json.dumps({"transformer": content})} | dict(files.metadata)
    return in_comfyui_names(files)


def folder_name(folder: Path) -> str:
    """What a folder's model is called: the pipeline's name, for a part of one."""
    folder = folder.resolve()
    return folder.parent.name if folder.name in TRANSFORMERS else folder.name
