"""Calibrate Cache's work: one uncached run over the prompts, watched; a file; a chart. A file that
is there already is shown and not measured again.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from comfy.model_patcher import ModelPatcher

from ..host import folders
from ..host.fingerprint import fingerprint
from ..host.progress import Progress
from .calibration_file import FOLDER, calibration_files, open_calibration
from .charts import calibration_chart
from .measure import Measurement, measure
from .settings import AUTO, NONE


@dataclass(frozen=True)
class CalibrationJob:
    """What to measure, and the file's name."""

    setup: Measurement
    filename: str = ""
    overwrite: bool = False
    node_id: str | None = None


def calibrate(job: CalibrationJob) -> tuple[str, dict]:
    """The file's name as the calibration lists show it, and a chart of what is in it. Raises
    ValueError and FileRefused before work starts.
    """
    name = file_name(job.filename, job.setup.model, job.setup.sigmas)
    if name in calibration_files() and not job.overwrite:
        return name, _measured_before(name, job)
    with folders.new_file(name, FOLDER, job.overwrite) as new:
        # another ComfyUI may have measured it while this one came here
        if name in calibration_files() and not job.overwrite:
            return name, _measured_before(name, job)
        calibration = measure(job.setup, Progress("measuring", job.node_id))
        calibration.save(new.path)
    return name, calibration_chart(calibration, name)


def _measured_before(name: str, job: CalibrationJob) -> dict:
    """The chart of a file. Raises FileRefused for another model's."""
    known = open_calibration(name)
    known.check(fingerprint(job.setup.model))
    again = "measured before; switch overwrite on to measure again"
    return calibration_chart(known, name, again)


def file_name(wanted: str, model: ModelPatcher, sigmas: torch.Tensor) -> str:
    """What the user typed, or the model's class and the number of steps. Raises ValueError for what
    is no file's name.
    """
    default = f"{type(model.model).__name__}-{max(len(sigmas) - 1, 0)}-steps"
    return folders.plain_name(wanted, default, FOLDER, ".json")


def stamp(name: str) -> str:
    """Changes when what a calibration widget names does: a file, or under "auto" any of them."""
    if name == NONE:
        return ""
    known = {path.name: folders.stamp_of(path) for path in folders.newest(FOLDER, "*.json")}
    if name == AUTO:
        return repr(sorted(known.items()))
    return known.get(name if name.endswith(".json") else f"{name}.json", "missing")
