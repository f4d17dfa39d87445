"""Files in ComfyUI's folders: listed, found, placed, and stamped for ComfyUI's cache.

A kind of folder ("loras", "diffusion_models") may have several places, of which an
extra_model_paths.yaml can add more. A name is a path relative to one of them, as ComfyUI's lists
show it.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import folder_paths

from ....quant.files import atomic
from ....quant.files.errors import FileRefused
from . import file_names

DIFFUSION_MODELS = "diffusion_models"
# kinds of folders of ComfyUI's that hold no model files
_NO_MODELS = {"configs", "custom_nodes", "datasets", "diffusers"}


def register(folder: str) -> None:
    """Makes models/<folder> one of ComfyUI's kinds of folders."""
    folder_paths.add_model_folder_path(folder, os.path.join(folder_paths.models_dir, folder))


_lent: set[Path] = set()  # places that are read and never written to


def lend(folder: str, home: Path) -> None:
    """Lists the files of a folder of this pack among those of a kind, behind all others."""
    folder_paths.add_model_folder_path(folder, str(home))
    _lent.add(home)


def names(folder: str, endings: str | tuple[str, ...] = file_names.ENDINGS) -> list[str]:
    """Names of the files of a kind that end so, in ComfyUI's order."""
    listed = folder_paths.get_filename_list(folder)
    return [name for name in listed if file_names.has_ending(name, endings)]


def every_name(folder: str, endings: str | tuple[str, ...]) -> list[str]:
    """The same for endings that ComfyUI does not list. A folder is walked again when it, or one in
    it, has changed.
    """
    found = (name for home in _homes(folder) for name in _walked(str(home)))
    return sorted({name for name in found if file_names.has_ending(name, endings)})


# home → (its files, every folder in it with its modification time)
_walks: dict[str, tuple[list[str], dict[str, float]]] = {}


def _walked(home: str) -> list[str]:
    known = _walks.get(home)
    if (
        known is None
        or not known[1]
        or any(_changed_s(at) != when for at, when in known[1].items())
    ):
        _walks[home] = known = folder_paths.recursive_search(home, [".git"])
    return known[0]


def _changed_s(path: str) -> float:
    """Modification time in s; 0 for what has gone."""
    try:
        return os.path.getmtime(path)
    except OSError:
        return 0.0


def everywhere() -> list[str]:
    """Every model file of every kind of folder, as "kind/name", in the order of the kinds."""
    kinds = (kind for kind in sorted(folder_paths.folder_names_and_paths) if kind not in _NO_MODELS)
    return [f"{kind}/{name}" for kind in kinds for name in folder_paths.get_filename_list(kind)]


def of_everywhere(choice: str) -> tuple[Path, str]:
    """(path, kind of folder) of a choice from `everywhere`. Raises FileRefused for one that is not
    there.
    """
    kind, _, name = choice.partition("/")
    if kind not in folder_paths.folder_names_and_paths:
        raise missing(choice, kind)
    return path_of(name, kind), kind


def newest(folder: str, pattern: str) -> list[Path]:
    """Files whose plain names match a glob, the newest first; read from disk, past ComfyUI's
    cached lists.
    """
    homes = [home for home in _homes(folder) if home.is_dir()]
    paths = (path for home in homes for path in home.glob(pattern))
    # not what was deleted since, nor a link to nowhere, nor a folder
    return sorted(filter(Path.is_file, paths), key=_changed, reverse=True)


def _changed(path: Path) -> int:
    """Modification time in ns; 0 for a file that has gone."""
    try:
        return path.stat().st_mtime_ns
    except FileNotFoundError:
        return 0


def find(name: str, folder: str) -> Path | None:
    """The path of a file; None for what is not there, or, from a prompt of the API, no name at
    all.
    """
    path = folder_paths.get_full_path(folder, name) if isinstance(name, str) else None
    return None if path is None else Path(path)


def find_folder(name: str, folder: str) -> Path | None:
    """The path of a folder in one of a kind's places; None for what is not there."""
    paths = (file_names.within(home, name) for home in _homes(folder))
    return next((Path(path) for path in paths if path and os.path.isdir(path)), None)


def path_of(name: str, folder: str = DIFFUSION_MODELS) -> Path:
    """The path of a file. Raises FileRefused for a name that is not there."""
    path = find(name, folder)
    if path is None:
        raise missing(name, folder)
    return path


def missing(name: str, folder: str) -> FileRefused:
    """The refusal of a name that is not in a folder, or of what stands in an empty list: "(no
    quantized models yet)".
    """
    if str(name).startswith("(no "):
        return FileRefused(
            f"There are {name[1:-1]}: make or download one, then press R to refresh the list and"
            " choose it."
        )
    return FileRefused(
        f"{name} is not in ComfyUI's {folder} folder; put it there or choose another, and press R"
        " to refresh the list."
    )


def place(name: str, folder: str, beside: Path | None = None) -> tuple[Path, str]:
    """(path for a file, its name in ComfyUI's lists), in the first place of a kind that can be
    written to: the one that holds `beside` before the others, those that exist before those that
    would have to be made, and none that is lent. Raises FileRefused.
    """
    around = [] if beside is None else Path(os.path.abspath(beside)).parents
    homes = [Path(os.path.abspath(home)) for home in _homes(folder) if home not in _lent]
    # ComfyUI names models/unet before models/diffusion_models, and few have made it
    homes.sort(key=lambda home: (home not in around, not home.is_dir()))
    for home in homes:
        path = file_names.within(home, name)
        if path is None:
            raise FileRefused(
                f"{name} lies outside ComfyUI's {folder} folder; give a plain file name."
            )
        target = Path(path)
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
        except OSError:  # a read-only place: the next one is tried, and all are named if none works
            continue
        if os.access(target.parent, os.W_OK):
            return target, os.path.relpath(target, home)
    raise FileRefused(
        f"None of ComfyUI's {folder} folders can be written to ({', '.join(map(str, homes))});"
        " change their permissions."
    )


@dataclass(frozen=True)
class NewFile:
    """A file that a job will write. path: where; name: in ComfyUI's lists; held: its lock, which
    stands for the path wherever one is written to.
    """

    path: Path
    name: str
    held: atomic.Held
    overwrite: bool

    def check(self) -> None:
        """Refuses a file that is there already, unless it may be replaced: before the work, and
        again before writing, since other programs heed no lock.
        """
        if self.path.exists() and not self.overwrite:
            raise FileRefused(
                f"{self.name} exists already; switch 'overwrite' on, or give another filename."
            )


@contextlib.contextmanager
def new_file(
    name: str, folder: str, overwrite: bool, beside: Path | None = None
) -> Iterator[NewFile]:
    """`place`, held for one job until it ends: hold it from before the job looks at what is there.
    Raises FileRefused, at once where another run of this or another program holds it.
    """
    path, listed = place(name, folder, beside)
    with atomic.exclusive(path) as held:
        yield NewFile(path, listed, held, overwrite)


def plain_name(
    wanted: str, default: str, folder: str, ending: str, subfolders: bool = False
) -> str:
    """What a user typed, or the default, with the ending. Raises FileRefused for what is not the
    name of a file.
    """
    return file_names.chosen(wanted, default, ending, f"models/{folder}", subfolders)


def refresh(folder: str) -> None:
    """Makes ComfyUI's lists show a new file, so that the next node of this very graph finds it."""
    folder_paths.filename_list_cache.pop(folder, None)


def stamp(name: str, folder: str = DIFFUSION_MODELS) -> str:
    """Changes when the file does."""
    path = find(name, folder)
    return "missing" if path is None else stamp_of(path)


def stamp_of(path: Path) -> str:
    """Modification time and size of a file."""
    stat = path.stat()
    return f"{stat.st_mtime_ns}-{stat.st_size}"


def _homes(folder: str) -> list[Path]:
    return [Path(home) for home in folder_paths.get_folder_paths(folder)]
