"""The VRAM plan of files in ComfyUI's folders, and its chart."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from typing import TypeVar

import comfy.model_management

from ....quant.cli import plan as planning
from ....quant.files.memory import published, weights
from ....quant.files.memory.stages import Loadout, Stage, Work
from ....quant.files.memory.switches import Plan, make
from ..host import folders

THIS = "this computer"
CARDS = (THIS, "6 GB", "8 GB", "10 GB", "12 GB", "16 GB", "24 GB", "cpu")
NONE, AS_PUBLISHED = "none", "as published"
NOT_HERE = " (published size)"
ENCODERS, VAES, LORAS = "text_encoders", "vae", "loras"
_T = TypeVar("_T")


def model_names() -> list[str]:
    """The models that a plan can be made of: files, and published ones that are not here."""
    return [*folders.names(folders.DIFFUSION_MODELS), *_not_here(published.models())]


def encoder_names() -> list[str]:
    """Text encoders likewise."""
    return [AS_PUBLISHED, NONE, *folders.names(ENCODERS), *_not_here(published.encoders())]


def vae_names() -> list[str]:
    """VAEs likewise."""
    return [AS_PUBLISHED, NONE, *folders.names(VAES), *_not_here(published.vaes())]


def _not_here(names) -> list[str]:
    return [f"{name}{NOT_HERE}" for name in names]


def card_of(card: str) -> int | None:
    """Bytes of one of CARDS; None for a CPU."""
    if card != THIS:
        return planning.card_bytes(card)
    device = comfy.model_management.get_torch_device()
    if device.type == "cpu":
        return None
    return int(comfy.model_management.get_total_memory(device))


def ram_of(gb: float) -> int:
    """Bytes of RAM; 0 GB: this computer's."""
    return int(gb * 1e9) if gb else int(comfy.model_management.total_ram * 2**20)


def loadout(model: str, encoders: tuple[str, ...], vae: str, loras: tuple[str, ...]) -> Loadout:
    """What the node's lists name. Raises FileRefused."""
    row = published.models().get(model.removesuffix(NOT_HERE), {})
    if AS_PUBLISHED in encoders:
        encoders = tuple(row.get("encoders", ()))
    if vae == AS_PUBLISHED:
        vae = row.get("vae", NONE)
    return Loadout(
        _found(model, planning.model, planning.model_of_file, folders.DIFFUSION_MODELS),
        tuple(
            _found(name, planning.encoder, weights.encoder_of, ENCODERS)
            for name in encoders
            if name != NONE
        ),
        None if vae == NONE else _found(vae, planning.vae_weights, weights.vae_of, VAES),
        tuple(weights.lora_of(folders.path_of(name, LORAS)) for name in loras),
    )


def _found(name: str, known: Callable[[str], _T], of_file: Callable, folder: str) -> _T:
    path = folders.find(name, folder)
    return known(name.removesuffix(NOT_HERE)) if path is None else of_file(path)


def chart(plan: Plan, title: str) -> dict:
    """The chart `memory` of `host/charts.py`."""
    size, work = plan.work.size, plan.work
    told = [f"{size[0]} × {size[1]}"]
    if work.pictures > 1:
        told.append(f"{work.pictures} at once")
    if work.frames > 1:
        told.append(f"{work.frames} frames")
    before = {stage.name: stage for stage in plan.before}
    return {
        "kind": "memory",
        "title": title,
        "subtitle": ", ".join(told),
        "summary": [["note", note] for note in planning.notes(plan)],
        "verdict": plan.verdict,
        "card": None if work.card is None else work.room,
        "ram": work.ram,
        "stages": [_row(stage, before[stage.name], work) for stage in plan.stages],
        "switches": [asdict(switch) for switch in plan.switches],
    }


def _row(stage: Stage, before: Stage, work: Work) -> dict:
    on_cpu = work.card is None
    return {
        "name": stage.name,
        "card": [asdict(part) for part in stage.card],
        "ram": [asdict(part) for part in stage.ram],
        "streamed": stage.streamed,
        "before": before.ram_peak if on_cpu else before.peak + before.streamed,
    }


def plan(loaded: Loadout, work: Work) -> Plan:
    """The plan with the fewest switches."""
    return make(loaded, work)
