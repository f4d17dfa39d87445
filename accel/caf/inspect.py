"""What CAF's files are, for people: `python -m nibble inspect`."""

from __future__ import annotations

from pathlib import Path

from ...quant.files.small import SmallFile
from . import couplings, heads_file
from .couplings_files import CAPTIONS_AGAIN, FORMAT, INDEX, check_shard


def facts(path: Path, kind: str | None) -> dict | None:
    """Of a file of heads, of pairs or of prompts, read whole; None for another. kind: its format.
    Raises FileRefused for a damaged one.
    """
    if kind == heads_file.FORMAT:
        adapter = heads_file.read_file(path)
        return {
            "file": path.name,
            "kind": "CAF heads",
            "layers": len(adapter.velocity.names),
            "rank": adapter.rank,
            "h": adapter.h,
        }
    if kind == FORMAT and path.name.startswith("captions-"):
        prompts = SmallFile(path, CAPTIONS_AGAIN).tensors()
        return {"file": path.name, "kind": "prompts of CAF couplings", "tensors": len(prompts)}
    if kind == FORMAT:
        return {"file": path.name, "kind": "pairs of CAF couplings", "pairs": check_shard(path)}
    return None


def couplings_facts(path: Path, verify: bool) -> dict | None:
    """Of a folder of couplings, or its index; None for another. verify: read every pair and prompt.
    Raises FileRefused for damaged ones.
    """
    folder = path if path.is_dir() else path.parent
    if not (folder / INDEX).is_file() or path not in (folder, folder / INDEX):
        return None
    found = couplings.read(folder)
    if verify:
        for i in range(len(found)):
            found.pair(i)
        list(found.captions)
    return {
        "file": folder.name,
        "kind": "CAF couplings",
        "pairs": len(found),
        "prompts": len(found.captions),
    }
