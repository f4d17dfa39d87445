"""Nunchaku's models that are a folder: the first version's two files, or the parts that diffusers
saves, with JSON files beside them.
"""

import re
from pathlib import Path

from ..files.errors import FileRefused, reading

BLOCKS, OTHERS = "transformer_blocks.safetensors", "unquantized_layers.safetensors"
_LONGEST = 2**20  # bytes of such a JSON file
SAVED = "diffusion_pytorch_model"  # what diffusers calls a model's files
_SHARDS = re.compile(rf"{SAVED}(?:-(\d{{5}})-of-(\d{{5}}))?\.safetensors")


def parts_of(path: Path) -> list[Path] | None:
    """The files of the folder's model that a path names, either the folder or a file in it; None
    for a file that stands alone. Raises FileRefused where a part is missing.
    """
    folder = path if path.is_dir() else path.parent
    if _SHARDS.fullmatch(path.name) or (
        path.is_dir() and not (path / BLOCKS).is_file() and _shards(path)
    ):
        return _shards(folder)
    if not path.is_dir() and path.name not in (BLOCKS, OTHERS):
        return None
    missing = [name for name in (BLOCKS, OTHERS) if not (folder / name).is_file()]
    if missing:
        raise FileRefused(
            f"The folder {folder.name} lacks {' and '.join(missing)}; download the whole folder"
            " again."
        )
    return [folder / BLOCKS, folder / OTHERS]


def _shards(folder: Path) -> list[Path]:
    """The file or files of a model that diffusers saved in a folder. Raises FileRefused where one
    is missing.
    """
    found = {
        path: match
        for path in sorted(folder.glob("diffusion_pytorch_model*.safetensors"))
        if (match := _SHARDS.fullmatch(path.name))
    }
    wanted = max((int(match[2] or 1) for match in found.values()), default=0)
    if len(found) != wanted:
        raise FileRefused(
            f"The folder {folder.name} has {len(found)} of the {wanted} parts"
            " diffusion_pytorch_model-*.safetensors; download it again."
        )
    return list(found)


def folder_metadata(folder: Path) -> dict[str, str]:
    """What the JSON files of a folder tell that the headers do not. Raises FileRefused for one that
    is no text, or as long as a model.
    """
    files = {"config": folder / "config.json", "comfy_config": folder / "comfy_config.json"}
    found = {}
    for key, path in files.items():
        if path.is_file():
            with reading(path), open(path, "rb") as file:
                text = file.read(_LONGEST + 1)
                if len(text) > _LONGEST:
                    raise ValueError(f"it is longer than {_LONGEST:,} bytes")
                found[key] = text.decode()
    return found
