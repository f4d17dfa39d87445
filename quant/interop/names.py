"""What published files call the layers of each model; the tables are data, in names.json, and here
are the rules.
"""

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cached_property, lru_cache
from pathlib import Path
from typing import NamedTuple

from ..files.errors import FileRefused
from ..files.source import PREFIXES

# The oldest files' names of a quantized linear's tensors, in today's.
SUFFIXES = {
    "lora_down": "proj_down",
    "lora_up": "proj_up",
    "smooth": "smooth_factor",
    "smooth_orig": "smooth_factor_orig",
}
_REFUSED = [
    (
        "double_stream_modulation_img.",
        (
            "is a FLUX.2 model, which Nibble cannot read from this format yet; quantize the 16-bit"
            " file with SVDQuant Quantize Checkpoint"
        ),
    ),
    (
        "encoder.block.",
        (
            "is a text encoder and not a diffusion model; use the fp8 text encoder with the stock"
            " loader"
        ),
    ),
    (
        "transformer_blocks.0.attn1.",
        "is a SANA or PixArt model, which Nibble cannot read; use the 16-bit file",
    ),
]


class Part(NamedTuple):
    """A piece of a published module: the i-th of n equal runs of rows (0 of 1: all of it)."""

    module: str
    piece: int = 0
    pieces: int = 1


class Recipe(NamedTuple):
    """How one of ComfyUI's modules is put together: parts one above another (axis 0) or side by
    side (axis 1).
    """

    parts: tuple[Part, ...]
    axis: int = 0


@dataclass(frozen=True)
class Family:
    """One model family's names; see names.json."""

    name: str
    model_class: str
    has: str
    modules: Mapping[str, list[str]]
    first_version: Mapping[str, str]
    first_suffixes: bool
    block: str
    kinds: Mapping[str, str]
    fused: Mapping[str, list[str]]
    unsigned: tuple[str, ...]
    adanorm: Mapping[str, int]
    swapped: tuple[str, ...]
    scale: tuple[str, ...]
    four_bit: tuple[str, ...]
    refiners: tuple[str, ...]
    rest: bool

    @cached_property
    def rows(self) -> dict[str, list[Recipe]]:
        """ComfyUI's module → ways to put it together, with '#' for a block's number and every kind
        of block spelled out.
        """
        spelled = {}
        for target, ways in self.modules.items():
            for ours, theirs in self.kinds.items() if "@" in target else (("", ""),):
                spelled[target.replace("@", ours)] = [
                    _recipe(way.replace("@", theirs)) for way in ways
                ]
        return spelled

    @cached_property
    def targets_of(self) -> dict[str, list[str]]:
        """Published module → the modules of ComfyUI that it is a part of, both with '#'."""
        found: dict[str, list[str]] = {}
        for target, ways in self.rows.items():
            for part in (part for way in ways for part in way.parts):
                found.setdefault(part.module, []).append(target)
        return found

    def resolve(self, modules: Iterable[str]) -> dict[str, Recipe]:
        """ComfyUI's module → its parts, for all that can be made of the modules of a file."""
        modules, recipes = set(modules), {}
        for module in sorted(modules):
            pattern, number = self.numbered(module)
            for target in self.targets_of.get(pattern, ()):
                name = target.replace("#", number)
                for way in self.rows[target]:
                    parts = tuple(
                        part._replace(module=part.module.replace("#", number)) for part in way.parts
                    )
                    if name not in recipes and all(part.module in modules for part in parts):
                        recipes[name] = way._replace(parts=parts)
        return recipes

    def numbered(self, module: str) -> tuple[str, str]:
        """('blocks.3.attn.0', …) → ('blocks.#.attn.0', '3'): the first number (behind `block`, if
        the family has one) is a block's.
        """
        found = re.search(rf"(?<={re.escape(self.block)}\.)\d+(?=\.)", module)
        return (
            (module[: found.start()] + "#" + module[found.end() :], found[0])
            if found
            else (module, "")
        )

    def first_name(self, module: str) -> str:
        """The inverse of `modern` for a module's name."""
        pattern, number = self.numbered(module)
        return next(
            (old for old, new in self.first_version.items() if new == pattern), pattern
        ).replace("#", number)

    def is_unsigned(self, module: str) -> bool:
        """Whether a published module's input is kept without a sign."""
        return any(fnmatchcase(module, pattern) for pattern in self.unsigned)

    def splits(self, module: str) -> int:
        """How many vectors a published module interleaves; 0 for one that is no modulation."""
        return next(
            (count for pattern, count in self.adanorm.items() if fnmatchcase(module, pattern)), 0
        )


def _recipe(way: str) -> Recipe:
    axis = 1 if " | " in way else 0
    return Recipe(tuple(_part(text) for text in way.split(" | " if axis else " + ")), axis)


def _part(text: str) -> Part:
    found = re.fullmatch(r"(.*)\[(\d+)/(\d+)\]", text)
    return Part(found[1], int(found[2]) - 1, int(found[3])) if found else Part(text)


@lru_cache(maxsize=1)
def families() -> tuple[Family, ...]:
    """Every family, in the order in which they are tried."""
    data = json.loads(Path(__file__).with_suffix(".json").read_text(encoding="utf-8"))
    return tuple(
        Family(
            name=entry["name"],
            model_class=entry["model_class"],
            has=entry["has"],
            modules=entry["modules"],
            first_version=entry.get("first_version", {}),
            first_suffixes=entry.get("first_suffixes", False),
            block=entry.get("block", ""),
            kinds=entry.get("kinds", {}),
            fused=entry.get("fused", {}),
            unsigned=tuple(entry.get("unsigned", ())),
            adanorm=entry.get("adanorm", {}),
            swapped=tuple(entry.get("swapped", ())),
            scale=tuple(entry.get("scale", ())),
            four_bit=tuple(entry.get("four_bit", ())),
            refiners=tuple(entry.get("refiners", ())),
            rest=entry["rest"],
        )
        for entry in data["families"]
    )


def family_of(names: Iterable[str], file: str) -> Family:
    """The family of a published file from its tensors' names. Raises FileRefused for any other,
    saying what it is.
    """
    names = list(names)
    for start, why in _REFUSED:
        if any(name.startswith(start) for name in names):
            raise FileRefused(f"{file} {why}.")
    for family in families():
        if any(name.startswith(family.has) for name in names):
            return family
    known = ", ".join(family.name for family in families())
    raise FileRefused(
        f"{file} is a 4-bit file of a model that Nibble cannot read from this format (its first"
        f" tensors are {', '.join(sorted(names)[:3])}); choose one of: {known}."
    )


def modern(name: str, family: Family) -> str:
    """A tensor's name in the first files → its name in today's; other names stay."""
    module, _, suffix = name.rpartition(".")
    pattern, number = family.numbered(module)
    if not module:
        return name
    renamed = family.first_version.get(pattern, pattern).replace("#", number)
    return f"{renamed}.{SUFFIXES.get(suffix, suffix)}"


def checkpoint_prefix(names: Iterable[str]) -> str:
    """What a checkpoint puts before most of its diffusion model's tensors; "" for nothing."""
    names = list(names)
    for prefix in ("transformer.", *PREFIXES):
        if sum(name.startswith(prefix) for name in names) > len(names) // 2:
            return prefix
    return ""
