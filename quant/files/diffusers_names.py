"""Diffusers' names of a transformer's tensors → ComfyUI's; the tables are data, in
diffusers_names.json, and here are the rules.

Diffusers splits the rows of what others keep as one matrix (q, k, v), and orders the halves of some
modulations the other way round (scale, shift). So each of ComfyUI's tensors is a sequence of runs
of rows of stored ones, and nothing is computed.
"""

import json
import math
import re
from collections.abc import Iterable, Mapping
from functools import lru_cache, partial
from pathlib import Path
from typing import NamedTuple

from . import dit_names, pointwise, unet_names
from .errors import FileRefused
from .renamed import Renamed, Rows
from .stored_tensors import StoredTensors

_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")


class _Family(NamedTuple):
    name: str
    all: tuple[str, ...]
    theirs: dict[str, tuple[str, int, int]]  # module or tensor → (ours, place, of how many)
    swapped: tuple[str, ...]
    swapped_last: tuple[str, ...]
    flat: tuple[str, ...]


@lru_cache(maxsize=1)
def _families() -> tuple[_Family, ...]:
    data = json.loads(Path(__file__).with_suffix(".json").read_text(encoding="utf-8"))
    return tuple(
        _Family(
            entry["name"],
            tuple(entry["all"]),
            {
                part: (ours, place, len(parts))
                for ours, parts in _spelled(entry)
                for place, part in enumerate(parts)
            },
            *(tuple(entry.get(key, ())) for key in ("swapped", "swapped_last", "flat")),
        )
        for entry in data["families"]
    )


def _spelled(entry: Mapping) -> Iterable[tuple[str, list[str]]]:
    """(ours, its parts in order), with every kind of block spelled out."""
    for ours, theirs in entry["names"].items():
        for kind, their_kind in entry.get("kinds", {"": ""}).items() if "@" in ours else [("", "")]:
            yield ours.replace("@", kind), theirs.replace("@", their_kind).split(" + ")


def in_comfyui_names(stored: StoredTensors) -> StoredTensors:
    """The same tensors under ComfyUI's names, if they are a model of diffusers that is known; those
    of a model that ComfyUI does not have under diffusers'; else as they are. Raises FileRefused for
    a part that is missing.
    """
    for family in _families():
        if all(name in stored.tensors for name in family.all):
            return Renamed(stored, _places(stored, family), partial(_flattened, family.flat))
    if dit_names.is_authors(stored.tensors):
        return dit_names.in_diffusers_names(stored)
    if dit_names.is_diffusers(stored.tensors):
        return dit_names.without_copies(stored)
    if unet_names.is_sdxl(stored.tensors):
        names = unet_names.to_comfyui(stored.tensors)
        return Renamed(stored, {ours: [Rows(theirs)] for theirs, ours in names.items()})
    if pointwise.has_some(stored.tensors):
        return Renamed(stored, {name: [Rows(name)] for name in stored.tensors}, pointwise.matrix)
    return stored


def _flattened(flat: Iterable[str], name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of a tensor, in one row where the family has it so."""
    return (math.prod(shape),) if _numbered(name) in flat else shape


def _places(stored: StoredTensors, family: _Family) -> dict[str, list[Rows]]:
    """ComfyUI's tensor → where its rows come from."""
    found: dict[str, dict[int, str]] = {}
    wanted: dict[str, int] = {}
    for name in stored.tensors:
        ours, place, count = _ours(name, family)
        found.setdefault(ours, {})[place] = name
        wanted[ours] = count
    for ours, parts in found.items():
        if len(parts) != wanted[ours]:
            raise FileRefused(
                f"{stored.name} lacks a part of {ours}: it has {', '.join(sorted(parts.values()))}"
                " alone; download it again."
            )
    last = _last_blocks(found)
    return {
        ours: _in_order(
            [parts[place] for place in sorted(parts)],
            stored,
            _is_in(ours, family.swapped) or (ours in last and _is_in(ours, family.swapped_last)),
        )
        for ours, parts in found.items()
    }


def _ours(name: str, family: _Family) -> tuple[str, int, int]:
    """(ComfyUI's name, the part's place in it, the number of parts); as it is where unknown."""
    module, _, suffix = name.rpartition(".")
    number = _NUMBER.search(name)
    for whole, ending in ((name, ""), (module, f".{suffix}")):
        known = family.theirs.get(whole)
        if known is None and number is not None:
            known = family.theirs.get(_numbered(whole))
        if known is not None:
            ours, place, count = known
            return ours.replace("#", number[0] if number else "#") + ending, place, count
    return name, 0, 1


def _numbered(name: str) -> str:
    """'blocks.3.attn.0' → 'blocks.#.attn.0'."""
    return _NUMBER.sub("#", f"{name}.", count=1)[:-1]


def _is_in(name: str, patterns: Iterable[str]) -> bool:
    module = name.rpartition(".")[0]
    return any(pattern in (module, _numbered(module)) for pattern in patterns)


def _last_blocks(names: Iterable[str]) -> set[str]:
    """The tensors with the highest number among those that are alike."""
    last: dict[str, tuple[int, str]] = {}
    for name in names:
        number = _NUMBER.search(name)
        if number is not None:
            last[_numbered(name)] = max(last.get(_numbered(name), (-1, "")), (int(number[0]), name))
    return {name for _, name in last.values()}


def _in_order(parts: list[str], stored: StoredTensors, swapped: bool) -> list[Rows]:
    if not swapped:
        return [Rows(part) for part in parts]
    (part,) = parts
    half = stored.tensors[part].shape[0] // 2
    return [Rows(part, half), Rows(part, 0, half)]
