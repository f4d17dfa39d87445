"""What a file may be called: one rule for every node that writes, the same on every system.

A model folder is often shared or moved between systems, so Windows' rules hold everywhere
(https://learn.microsoft.com/windows/win32/fileio/naming-a-file): no control characters, none of
`< > : " | ? *`, no name of a device, no dot or space at the end; a backslash parts folders as a
slash does. Beside these: no hidden names, and room for the endings of unfinished files.
"""

import os
import re
import unicodedata
from pathlib import PurePath

from ....quant.files.errors import FileRefused

ENDINGS = (".safetensors", ".sft")  # of a model's file, in letters of either size
_FORBIDDEN = set('<>:"|?*')
# controls, halves of surrogate pairs, separators of lines and paragraphs
_UNWRITABLE = ("Cc", "Cs", "Zl", "Zp")
_DEVICES = re.compile(
    r"(con|prn|aux|nul|conin\$|conout\$|(com|lpt)[0-9¹²³])\s*(\..*)?", re.I | re.S
)
_LONGEST = 255  # bytes of a name, on every common file system
_ROOM = len(".acceleration.state.partial.journal.new")  # for what is written beside a file


def chosen(wanted: str, default: str, ending: str, folder: str, subfolders: bool = True) -> str:
    """What a user typed, or the default, with the ending, as ComfyUI lists it: relative to a folder
    of its kind. Raises FileRefused for what no file can be called.

    ending  of the new file, which the user may have typed, too
    folder  for people
    """
    name = (wanted.strip() or default).replace("\\", "/")
    fault = fault_of(name, ending, subfolders)
    if fault:
        raise FileRefused(
            f"{_shown(wanted.strip() or default)} cannot be a file's name in {folder} ({fault});"
            " use letters, digits, spaces, - and _."
        )
    return (without(name, ending) + ending).replace("/", os.sep)


def fault_of(name: str, ending: str = "", subfolders: bool = True) -> str | None:
    """Why a name with slashes cannot be that of a file with this ending; None where it can."""
    parts = name.split("/")
    if len(parts) > 1 and not subfolders:
        return "it has a folder in it"
    if parts[-1] == "" or without(parts[-1], ending) == "":
        return "it names no file"
    faults = (_fault_of_part(part) for part in parts)
    fault = next((fault for fault in faults if fault), None)
    if fault:
        return fault
    whole = without(parts[-1], ending) + ending
    if max(len(part.encode()) for part in [*parts, whole]) > _LONGEST - _ROOM:
        return f"it is longer than {_LONGEST - _ROOM} bytes"
    return None


def _fault_of_part(part: str) -> str | None:
    """Why one part of a name cannot be that of a file or folder; None where it can."""
    found = sorted(_FORBIDDEN & set(part))
    if found:
        return f"it has {found[0]} in it"
    if any(unicodedata.category(letter) in _UNWRITABLE for letter in part):
        return "it has a letter in it that cannot be written"
    if part in ("", ".", ".."):
        return "it leads out of the folder" if part else "it begins with a slash or has two"
    if part[0] == ".":
        return "it begins with a dot"
    if part != part.strip() or part[-1] == ".":
        return "it begins or ends with a space, or ends with a dot"
    return "it is the name of a device" if _DEVICES.fullmatch(part) else None


def has_ending(name: str, endings: str | tuple[str, ...] = ENDINGS) -> bool:
    """Whether a file's name ends so, in letters of either size, as ComfyUI lists files."""
    return name.lower().endswith(endings)


def without(name: str, ending: str) -> str:
    """A name without its ending, or as much of the ending as it has: of ".caf.safetensors" also
    ".safetensors" or ".sft".
    """
    for known in ENDINGS if has_ending(ending) else (ending,):
        if has_ending(name, known):
            name = name[: len(name) - len(known)]
            break
    rest = ending[: len(ending) - len(ENDINGS[0])] if has_ending(ending) else ""
    return name[: len(name) - len(rest)] if rest and has_ending(name, rest) else name


def stem(name: str) -> str:
    """A model's name in ComfyUI's lists without its ending."""
    return without(name, ENDINGS[0])


def beside(origin: str, ending: str) -> str:
    """A name in the folder of `origin`, a name in ComfyUI's lists: its stem with an ending."""
    return str(PurePath(origin).with_name(f"{stem(PurePath(origin).name)}{ending}"))


def within(home: str | os.PathLike, name: str) -> str | None:
    """The absolute path of a name in a folder, by its letters alone: folders that are links lead
    where they lead, as in ComfyUI. None where the name leads outside.
    """
    top = os.path.abspath(home)
    path = os.path.abspath(os.path.join(top, name))
    return path if path != top and os.path.commonpath([top, path]) == top else None


def _shown(name: str) -> str:
    return repr(name) if len(name) <= 60 else f"{name[:60]!r}…"
