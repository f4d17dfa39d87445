"""What the plan knows of a model besides its weights: by how much ComfyUI multiplies a latent's
size (`factor`), how large the latent of a picture is, and how many positions make a token. A model
is found by its tensors' names; for one that nobody knows, ComfyUI's own default stands.

published.json has the numbers, in the order in which they are tried, and the sizes of published
models, so that one can plan before anything is downloaded.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from ..errors import FileRefused

Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class Sampler:
    """How a model samples. ratios: pixels and frames for each position of the latent; patch:
    positions of a token, along an edge; known: whether published.json has the model.
    """

    factor: float
    ratios: tuple[int, int] = (8, 1)
    patch: int = 2
    known: bool = True


# comfy/supported_models_base.py
DEFAULT = Sampler(factor=2.0, known=False)


@lru_cache(maxsize=1)
def _data() -> dict[str, Any]:
    return json.loads(Path(__file__).with_suffix(".json").read_text(encoding="utf-8"))


def models() -> dict[str, dict]:
    """Published models by the name that one types: their rows."""
    return {row["id"]: row for row in _data()["models"] if "id" in row}


def encoders() -> dict[str, dict]:
    """Published text encoders, likewise."""
    return _data()["encoders"]


def vaes() -> dict[str, dict]:
    """Published VAEs, likewise."""
    return _data()["vaes"]


def sampler_of(shapes: Shapes, file: str) -> Sampler:
    """How the model with these tensors samples. Raises FileRefused for models of sound and of
    shapes, whose latents have no width and height.
    """
    row = next((row for row in _data()["models"] if _is_of(row, shapes)), None)
    return DEFAULT if row is None else sampler(row, shapes, file)


def sampler(row: dict, shapes: Shapes, file: str) -> Sampler:
    """The same for a row of published.json. shapes: of the weight by whose width the row's factor
    is told, if it is.
    """
    if "makes" in row:
        raise FileRefused(
            f"{file} makes {row['makes']}, and the plan knows pictures and video alone; ComfyUI's"
            " log tells what such a model takes."
        )
    factor = row["factor"]
    if isinstance(factor, dict):
        width = shapes[factor["of"]][factor["dim"]]
        factor = factor["times"] * width / factor["per"]
    return Sampler(factor, tuple(row["ratios"]), row["patch"])


def _is_of(row: dict, shapes: Shapes) -> bool:
    width = row.get("width", {})
    return (
        all(name in shapes for name in (*row["has"], *width))
        and not any(name in shapes for name in row.get("lacks", ()))
        and all(shapes[name][1] == size for name, size in width.items())
    )
