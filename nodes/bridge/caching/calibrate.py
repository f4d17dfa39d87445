"""Calibrate Cache's work: one uncached run over the prompts, watched; a file; a chart. A file that
is there already is shown and not measured again.
"""

from __future__ import annotations

import dataclasses

import torch
from comfy.model_patcher import ModelPatcher

from ..host import folders
from ..host.progress import Progress
from . import calibration_file
from . import charts as caching_charts
from . import measure as cache_calibration
from .settings import AUTO, NONE


@dataclasses.dataclass(frozen=True)
class Job:
    """What to measure on, and the file's name."""

    model: ModelPatcher
    positive: list
    negative: list | None
    cfg: float
    sampler: object
    sigmas: torch.Tensor
    latent: dict
    seed: int
    filename: str = ""
    overwrite: bool = False
    k_max: int = 3
    order: int = 2
    node_id: str | None = None


def run(job: Job) -> tuple[str, dict]:
    """The file's name as the calibration lists show it, and a chart of what is in it. Raises
    ValueError and FileRefused before work starts.
    """
    name = file_name(job.filename, job.model, job.sigmas)
    if name in calibration_file.calibration_files() and not job.overwrite:
        known = calibration_file.open_calibration(name)
        known.check(job.model)
        return name, caching_charts.calibration_chart(
            known, name, "measured before; switch overwrite on to measure again"
        )
    found = cache_calibration.calibrate(
        job.model,
        job.positive,
        job.negative,
        job.cfg,
        job.sampler,
        job.sigmas,
        job.latent,
        job.seed,
        Progress("measuring", job.node_id),
        k_max=job.k_max,
        order=job.order,
    )
    target, _ = folders.place(name, calibration_file.FOLDER)
    found.save(target)
    return name, caching_charts.calibration_chart(found, name)


def file_name(wanted: str, model: ModelPatcher, sigmas: torch.Tensor) -> str:
    """What the user typed, or the model's class and the number of steps. Raises ValueError for what
    is no file's name.
    """
    default = f"{type(model.model).__name__}-{max(len(sigmas) - 1, 0)}-steps"
    return folders.plain_name(wanted, default, calibration_file.FOLDER, ".json")


def stamp(name: str) -> str:
    """Changes when what a calibration widget names does: a file, or under "auto" any of them."""
    if name == NONE:
        return ""
    known = {
        path.name: folders.stamp_of(path)
        for path in folders.newest(calibration_file.FOLDER, "*.json")
    }
    if name == AUTO:
        return repr(sorted(known.items()))
    return known.get(name if name.endswith(".json") else f"{name}.json", "missing")
