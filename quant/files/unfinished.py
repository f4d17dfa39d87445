"""What runs that were stopped or killed left beside their targets, listed and removed.

`<target>.partial` has the target's size from the start, and the same run goes on from it; whoever
does not want to may have the disk back.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from . import atomic
from .errors import FileRefused

_BESIDE = (atomic.PARTIAL, atomic.PARTIAL + atomic.JOURNAL)


@dataclass(frozen=True)
class Unfinished:
    """A target that is not finished. bytes: of what lies beside it; held_since: when the run that
    is writing it now began, in seconds since 1970; None where none is.
    """

    target: Path
    bytes: int
    held_since: float | None


def found_in(folders: Iterable[str | Path]) -> list[Unfinished]:
    """The unfinished files in folders and theirs, each once, in the order of their paths. What
    cannot be read is passed over.
    """
    targets = {
        Path(home, name.removesuffix(atomic.PARTIAL)).resolve()
        for folder in folders
        for home, _, names in os.walk(str(folder))
        for name in names
        if name.endswith(atomic.PARTIAL)
    }
    return [
        Unfinished(target, _size(target), atomic.held_since(target)) for target in sorted(targets)
    ]


def remove(target: Path) -> int:
    """Removes what is unfinished of a target; returns its bytes. Raises FileRefused for one that is
    being written, and for a folder that may not be changed.
    """
    with atomic.exclusive(target):
        size = _size(target)
        for path in _parts(target):
            try:
                path.unlink(missing_ok=True)
            except OSError as error:
                raise FileRefused(
                    f"{path.name} cannot be removed ({error.strerror}); change the permissions of"
                    f" {path.parent}."
                ) from error
    return size


def _parts(target: Path) -> list[Path]:
    return [target.with_name(target.name + ending) for ending in _BESIDE]


def _size(target: Path) -> int:
    size = 0
    for path in _parts(target):
        with contextlib.suppress(OSError):  # gone meanwhile
            size += path.stat().st_size
    return size
