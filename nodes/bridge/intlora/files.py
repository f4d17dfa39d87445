"""IntLoRA files and LoRAs in ComfyUI's folders.

IntLoRA files have a folder of their own, models/intlora: ComfyUI's Load LoRA knows no key of them,
would say so only in the log, and change nothing, so it should not list them. Files of that ending
in models/loras are read all the same.
"""

from __future__ import annotations

import os
from contextlib import AbstractContextManager
from pathlib import Path

from ..host import file_names, folders

FOLDER, LORAS, ENDING = "intlora", "loras", ".intlora.safetensors"

folders.register(FOLDER)


def ordinary_files() -> list[str]:
    """Names of the LoRAs in ComfyUI's folders that are not IntLoRAs."""
    return [name for name in folders.names(LORAS, "") if not file_names.has_ending(name, ENDING)]


def adapter_files() -> list[str]:
    """Names of the IntLoRA files: all in their own folder, and those among the LoRAs that end as
    they do.
    """
    own = folders.names(FOLDER)
    return own + [name for name in folders.names(LORAS, ENDING) if name not in own]


def _folder_of(name: str) -> str:
    """The folder in which a name is looked for: the IntLoRA folder, and the LoRA folder for what is
    only there.
    """
    only_there = folders.find(name, FOLDER) is None and folders.find(name, LORAS) is not None
    return LORAS if only_there else FOLDER


def path_of(name: str) -> Path:
    """The path of an IntLoRA file. Raises FileRefused for a name that is not there."""
    return folders.path_of(name, _folder_of(name))


def stamp(name: str) -> str:
    """Changes when the file, an IntLoRA or a LoRA, does."""
    return folders.stamp(name, _folder_of(name))


def file_name(lora_name: str, filename: str) -> str:
    """The adapter's name in ComfyUI's lists: as asked for, else its LoRA's; always with the
    ending.
    """
    default = os.path.splitext(lora_name)[0]
    return folders.plain_name(filename, default, FOLDER, ENDING, subfolders=True)


def new_file(name: str, overwrite: bool) -> AbstractContextManager[folders.NewFile]:
    """A new adapter, held while it is made; see `folders.new_file`."""
    return folders.new_file(name, FOLDER, overwrite)


def refresh() -> None:
    """Makes ComfyUI's lists show a new file, so that the apply node of this very graph finds it."""
    folders.refresh(FOLDER)
