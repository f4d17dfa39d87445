"""What runs that were stopped or killed left beside their targets, listed and removed.

`<target>.partial` has the target's size from the start, and the same run goes on from it; whoever
does not want to may have the disk back. So it is with finished part files, which a run that joins
them takes over.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from . import atomic, part_files
from .errors import FileRefused

_BESIDE = (atomic.PARTIAL, atomic.PARTIAL + atomic.JOURNAL)
_LOCK = atomic.PARTIAL + ".lock"


@dataclass(frozen=True)
class Unfinished:
    """A target that is not finished, or a part that waits to be joined. bytes: of what lies beside
    the target, or of the part; held_since: when the run that is writing it now began, in seconds
    since 1970, for a part also the one that is writing its target or another of its parts; None
    where none is.
    """

    target: Path
    bytes: int
    held_since: float | None

    @property
    def part_of(self) -> Path | None:
        """The target of a part, which is finished where it exists itself; None for others."""
        name = part_files.read_name(self.target)
        return None if name is None else name.target


def found_in(folders: Iterable[str | Path]) -> list[Unfinished]:
    """The unfinished files and the parts in folders and theirs, each once, in the order of their
    paths. What cannot be read is passed over.
    """
    targets = {
        Path(home, name.removesuffix(atomic.PARTIAL)).resolve()
        for folder in folders
        for home, _, names in os.walk(str(folder))
        for name in names
        if name.endswith(atomic.PARTIAL) or part_files.read_name(Path(name)) is not None
    }
    return [Unfinished(target, _size(target), _held_since(target)) for target in sorted(targets)]


def remove(target: Path) -> int:
    """Removes what is unfinished of a target, or a part; returns its bytes. Raises FileRefused for
    one that is being written, for a part of such a target, and for a folder that may not be
    changed.
    """
    with atomic.exclusive(target):
        if part_files.read_name(target) is not None and _held_since(target, besides=target):
            raise FileRefused(
                f"{target.name} belongs to a run that is at work on another part or on the whole;"
                " wait for it."
            )
        size = _size(target)
        unlink(target)
    return size


def unlink(target: Path) -> None:
    """Removes the same without asking; call under the lock. Raises FileRefused for a folder that
    may not be changed.
    """
    for path in _files(target):
        try:
            path.unlink(missing_ok=True)
        except OSError as error:
            raise FileRefused(
                f"{path.name} cannot be removed ({error.strerror}); change the permissions of"
                f" {path.parent}."
            ) from error


def _held_since(target: Path, besides: Path | None = None) -> float | None:
    """When the first of the runs began that hold a target, or a part, its target and its fellows;
    besides: one that is not asked.
    """
    held = [target]
    part = part_files.read_name(target)
    if part is not None:
        locked = {
            target.with_name(name.removesuffix(_LOCK))
            for name in os.listdir(target.parent)
            if name.endswith(_LOCK)
        }
        fellows = [path for path in locked if _is_of(path, part)]
        held = [target, *fellows]
    times = [atomic.held_since(path) for path in held if path != besides]
    return min((since for since in times if since is not None), default=None)


def _is_of(path: Path, part: part_files.PartName) -> bool:
    """Whether a path is a part's target, or another part of it."""
    other = part_files.read_name(path)
    return path == part.target or (
        other is not None and (other.target, other.of) == (part.target, part.of)
    )


def _files(target: Path) -> list[Path]:
    beside = [target.with_name(target.name + ending) for ending in _BESIDE]
    return beside if part_files.read_name(target) is None else [*beside, target]


def _size(target: Path) -> int:
    size = 0
    for path in _files(target):
        with contextlib.suppress(OSError):  # gone meanwhile
            size += path.stat().st_size
    return size
