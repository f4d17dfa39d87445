"""Which text encoder a file holds, and what becomes of each of its linears. The knowledge is data,
in text_encoders.json; here are the rules.

    attention and MLP of the blocks        4-bit weights; their inputs stay in 16 bit, unless a
                                           recipe asks for W4A8
    embeddings, heads, vision towers       8-bit rows, ComfyUI's own format `int8_tensorwise`:
                                           w = code * scale[row], 40 dB and more
    norms, position tables, projectors     kept

A table of embeddings is only looked up in, so its error is added once and does not grow; in a Gemma
or a UMT5 it is a quarter to a half of the model. A vision tower's errors reach the picture that is
edited, and it is small beside the language model.

Names stay as they are in the file, prefix included: ComfyUI tells encoders apart by them
(comfy/sd.py, detect_te_model), which is also where the families come from.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import lru_cache
from pathlib import Path

from .errors import FileRefused

Shapes = Mapping[str, tuple[int, ...]]
# of diffusion transformers that are built of a language model
_READS_TIME = "t_embedder"


@dataclass(frozen=True)
class TextEncoder:
    """A family of encoders: `all` its keys, `sizes` some tensors' first dimension; patterns on
    module names. loaded_as: the type of ComfyUI's CLIPLoader that uses it most.
    """

    name: str
    all: tuple[str, ...]
    sizes: tuple[tuple[str, int], ...]
    loaded_as: str
    blocks: tuple[str, ...]
    rows8: tuple[str, ...]
    keep: tuple[tuple[str, str], ...]

    def is_of(self, shapes: Shapes) -> bool:
        """Whether an encoder of these tensors is of this family."""
        return all(key in shapes for key in self.all) and all(
            key in shapes and shapes[key][0] == size for key, size in self.sizes
        )


@lru_cache(maxsize=1)
def _data() -> dict:
    return json.loads(Path(__file__).with_suffix(".json").read_text(encoding="utf-8"))


@lru_cache(maxsize=1)
def families() -> tuple[TextEncoder, ...]:
    """Every family, in the order in which they are tried."""

    def build(entry: dict) -> TextEncoder:
        build_of = _data()["builds"][entry["build"]]
        return TextEncoder(
            name=entry["name"],
            all=tuple(entry["all"]),
            sizes=tuple(entry.get("sizes", {}).items()),
            loaded_as=entry["loaded_as"],
            blocks=tuple(
                f"{stack}{layer}" for stack in build_of["stacks"] for layer in build_of["layers"]
            ),
            rows8=tuple(build_of["rows8"]),
            keep=tuple(build_of.get("keep", {}).items()),
        )

    return tuple(build(entry) for entry in _data()["families"])


def family_of(shapes: Shapes) -> TextEncoder | None:
    """The family of an encoder, from its tensors' names and shapes; None for any other model."""
    if any(_READS_TIME in key for key in shapes):
        return None
    return next((family for family in families() if family.is_of(shapes)), None)


def refuse(shapes: Iterable[str], file: str) -> None:
    """Raises FileRefused for an encoder that stays as it is, saying why."""
    names = list(shapes)
    for entry in _data()["refused"]:
        if any(fnmatchcase(name, pattern) for pattern in entry["any"] for name in names):
            raise FileRefused(f"{file} {entry['why']}.")
