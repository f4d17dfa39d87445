"""Calibrations in ComfyUI's folders: models/nibble_cache/*.json (the folder key "nibble_cache", so
extra_model_paths.yaml can point elsewhere), listed, opened, and found by the model that they were
made for. The format: accel/caching/calibration_file.py.
"""

from __future__ import annotations

import logging
import os
from pathlib import Path

import folder_paths
from comfy.model_patcher import ModelPatcher

from ....accel.caching.calibration_file import Calibration, read
from ....quant.files.errors import FileRefused
from ..host import folders
from ..host.fingerprint import fingerprint

FOLDER = "nibble_cache"
log = logging.getLogger("nibble")

if FOLDER not in folder_paths.folder_names_and_paths:
    folder_paths.folder_names_and_paths[FOLDER] = (
        [os.path.join(folder_paths.models_dir, FOLDER)],
        {".json"},
    )


def calibration_files() -> list[str]:
    """Names of the calibrations in ComfyUI's folders, newest first."""
    return [path.name for path in folders.newest(FOLDER, "*.json")]


def open_calibration(name: str) -> Calibration:
    """Raises FileRefused for a name that is not there."""
    found = next((path for path in folders.newest(FOLDER, "*.json") if path.name == name), None)
    if found is None:
        raise folders.missing(name, FOLDER)
    return read(found)


_passed_over: set[tuple[Path, str]] = set()


def find(model: ModelPatcher) -> Calibration | None:
    """The newest calibration that was made for this model. A file that cannot be used is passed
    over, and named in the log once.
    """
    wanted = fingerprint(model)
    for path in folders.newest(FOLDER, "*.json"):
        try:
            found = read(path)
        except FileRefused as error:
            _tell(path, str(error))
            continue
        if found.model["fingerprint"] == wanted:
            return found
    return None


def _tell(path: Path, reason: str) -> None:
    if (path, reason) not in _passed_over:
        _passed_over.add((path, reason))
        log.warning("passed over: %s", reason)
