"""The files that nodes have made, for ComfyUI's cache: a node whose file is gone or another one
runs again, any other does not.

ComfyUI compares a node's fingerprint before a run with that of the run before. So it must be the
same before a node has made its file and after, which a stamp of the file cannot be: here it is the
number of times that the file was found changed.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from . import folders


@dataclass
class _Made:
    """What a node made when it last ran, and how often that was found gone or changed."""

    path: Path
    stamp: str
    changes: int


_made: dict[str, _Made] = {}  # node id → its file, while this process runs


def remember(node_id: str | None, path: Path) -> None:
    """A node (None: outside a graph) has made this file or folder, or found it made already."""
    if node_id is not None:
        before = _made.get(node_id)
        _made[node_id] = _Made(path, _stamp(path), before.changes if before else 0)


def changes(node_id: str | None) -> int:
    """How often what this node made was found gone or changed; each call that finds it so counts
    one more, until the node has made it again.
    """
    made = _made.get(node_id) if node_id is not None else None
    if made is None:
        return 0
    if _stamp(made.path) != made.stamp:
        made.changes += 1
    return made.changes


def _stamp(path: Path) -> str:
    return folders.stamp_of(path) if path.exists() else "missing"
