"""Several LoRAs put on a MODEL, and on its CLIP, by ComfyUI's own loading; what each reached."""

from __future__ import annotations

from dataclasses import dataclass

import comfy.sd
from comfy.model_patcher import ModelPatcher
from comfy.sd import CLIP

from ..host import folders, tensor_files
from . import lora_report

FOLDER = "loras"
NONE = "None"


@dataclass(frozen=True)
class Row:
    """One LoRA of a stack. name: in ComfyUI's list; NONE: an empty row."""

    name: str
    strength: float
    on: bool

    @property
    def counts(self) -> bool:
        return self.on and self.name != NONE and self.strength != 0


def names() -> list[str]:
    """What a row offers."""
    return [NONE, *folders.names(FOLDER)]


def stamp(name: str) -> str:
    """Changes when the file of a row does."""
    return folders.stamp(name, FOLDER)


def apply(
    model: ModelPatcher, clip: CLIP | None, rows: list[Row]
) -> tuple[ModelPatcher, CLIP | None, dict]:
    """The model and the encoder with every LoRA that is on, in order, and the chart `lora` of both.
    Raises FileRefused for a file that is not there or cannot be read.
    """
    told = []
    for row in rows:
        if not row.counts:
            continue
        path = folders.path_of(row.name, FOLDER)
        tensors, metadata = tensor_files.read(path)
        before = _patches(model), _patches(clip)
        model, clip = comfy.sd.load_lora_for_models(
            model, clip, tensors, row.strength, row.strength, lora_metadata=metadata
        )
        reached = _grown(before[0], _patches(model)), _grown(before[1], _patches(clip))
        told.append([f"{row.name}, {row.strength:g}", _told(*reached, clip is not None)])
    chart = lora_report.lora_chart(model)
    if not told:
        return model, clip, chart | {"summary": [["LoRAs", "none is on"]]}
    return model, clip, chart | {"summary": [*told, *chart["summary"]]}


def _patches(patched: ModelPatcher | CLIP | None) -> dict[str, int]:
    """Weight → how many patches it has."""
    if patched is None:
        return {}
    patcher = patched.patcher if isinstance(patched, CLIP) else patched
    return {key: len(entries) for key, entries in patcher.patches.items()}


def _grown(before: dict[str, int], after: dict[str, int]) -> int:
    return sum(count > before.get(key, 0) for key, count in after.items())


def _told(model: int, clip: int, has_clip: bool) -> str:
    if not model + clip:
        return "reaches nothing: it was made for another model"
    encoder = f", {clip} of the text encoder" if has_clip else ""
    return f"reaches {model} weights of the model{encoder}"
