"""What a file of ComfyUI's folders is that holds no diffusion model: a VAE, a LoRA, a text encoder,
an upscaler and so on, where it belongs, and what opens it. Told by the names of its tensors; the
knowledge is data, in kinds.json.
"""

import json
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import lru_cache
from pathlib import Path


@dataclass(frozen=True)
class Kind:
    """A kind of file. what: with its article, for a sentence; folder: of ComfyUI's models, or "";
    opens: the node, or what else reads it.
    """

    what: str
    folder: str
    opens: str

    @property
    def line(self) -> str:
        """The whole in one line."""
        place = f"models/{self.folder}, " if self.folder else ""
        return f"{self.what}: {place}opened by {self.opens}"


@dataclass(frozen=True)
class _Rule:
    kind: Kind
    first: bool
    any: tuple[str, ...]
    all: tuple[str, ...]
    none: tuple[str, ...]

    def fits(self, names: Collection[str]) -> bool:
        return (
            all(_has(names, pattern) for pattern in self.all)
            and (not self.any or any(_has(names, pattern) for pattern in self.any))
            and not any(_has(names, pattern) for pattern in self.none)
        )


def kind_of(names: Collection[str], first: bool | None = None) -> Kind | None:
    """The kind of a file with tensors of these names; None for one that kinds.json does not know.
    first: ask the kinds alone that share names with diffusion models (True), or the others (False).
    """
    known = names if isinstance(names, (set, frozenset, dict)) else set(names)
    rules = (rule for rule in _rules() if first is None or rule.first == first)
    return next((rule.kind for rule in rules if rule.fits(known)), None)


def own_kind(written_as: str | None) -> Kind | None:
    """The kind of a file of Nibble's own that holds no model, from its metadata's "format"."""
    entry = _data()["own"].get(written_as)
    return None if entry is None else Kind(*entry)


@lru_cache(maxsize=1)
def _data() -> dict:
    return json.loads(Path(__file__).with_suffix(".json").read_text(encoding="utf-8"))


@lru_cache(maxsize=1)
def _rules() -> tuple[_Rule, ...]:
    return tuple(_rule(entry) for entry in _data()["kinds"])


def _rule(entry: dict) -> _Rule:
    patterns = (tuple(entry.get(key, ())) for key in ("any", "all", "none"))
    kind = Kind(entry["what"], entry["folder"], entry["opens"])
    return _Rule(kind, entry.get("first", False), *patterns)


def _has(names: Iterable[str], pattern: str) -> bool:
    if "*" not in pattern:
        return pattern in names
    if pattern.count("*") == 1:  # most: much faster than fnmatch on thousands of names
        before, behind = pattern.split("*")
        return any(name.startswith(before) and name.endswith(behind) for name in names)
    return any(fnmatchcase(name, pattern) for name in names)
