"""Calibrations of caching as files: what one run without a cache taught about a model, a sampler
and a schedule.

models/nibble_cache/*.json (the folder key "nibble_cache", so extra_model_paths.yaml can point
elsewhere):
    {"format": "nibble-cache/1", "model": {"class", "fingerprint", "name", "weights"},
     "run": {"sampler", "steps", "sigmas", "shift", "cfg", "latent", "prompts", "seed"},
     "teacache": {"feature", "coefficients", "x_min", "x_max", "r2", "points": [[x, y], …]} | null,
     "smoothcache": {kind: {"mean": [k - 1][step], "half": …, "samples"}}, "grams":
     [prompt][step][step], "created"}
"""

from __future__ import annotations

import datetime
import json
import os
from dataclasses import dataclass, field
from pathlib import Path

import folder_paths
import numpy as np
import torch
from comfy.model_patcher import ModelPatcher

from ....accel.caching import mask_search
from ....accel.caching.extrapolate import Reuse
from ....accel.caching.smoothcache import Curve
from ....accel.caching.teacache import Polynomial
from ....quant.files import atomic
from ....quant.files.errors import FileRefused
from ..host import folders
from ..host.fingerprint import fingerprint

FOLDER, FORMAT, VERSION = "nibble_cache", "nibble-cache", 1

if FOLDER not in folder_paths.folder_names_and_paths:
    folder_paths.folder_names_and_paths[FOLDER] = (
        [os.path.join(folder_paths.models_dir, FOLDER)],
        {".json"},
    )


@dataclass
class Calibration:
    """See the module. grams: float64 (prompts, steps, steps), inner products of the velocities of
    an uncached run, over their mean square.
    """

    model: dict
    run: dict
    teacache: dict | None
    curves: dict[str, Curve]
    grams: np.ndarray
    name: str = "this calibration"
    created: str = field(
        default_factory=lambda: datetime.datetime.now(datetime.timezone.utc).isoformat(
            timespec="seconds"
        )
    )

    @property
    def sigmas(self) -> list[float]:
        """The schedule that was measured, steps + 1 values."""
        return self.run["sigmas"]

    @property
    def polynomial(self) -> Polynomial | None:
        if self.teacache is None:
            return None
        fitted = self.teacache
        return Polynomial(
            tuple(fitted["coefficients"]), fitted["x_min"], fitted["x_max"], fitted["r2"]
        )

    @property
    def feature(self) -> str:
        """TeaCache's F that the polynomial was fitted on."""
        return self.teacache["feature"] if self.teacache else ""

    def curve(self, kind: str) -> Curve:
        return self.curves[kind]

    def need(self, kinds: list[str]) -> None:
        """Raises FileRefused where a kind of layer was not measured."""
        missing = [kind for kind in kinds if kind not in self.curves]
        if missing:
            raise FileRefused(
                f"{self.name} holds no errors for {', '.join(missing)}; calibrate again with that"
                " depth."
            )

    def mask(self, budget: int, sigmas: list[float], reuse: Reuse) -> list[bool]:
        """The best `budget` steps to compute: searched on the measured schedule, spread over
        another one.
        """
        steps = len(self.sigmas) - 1
        measured_budget = min(max(round(budget * steps / (len(sigmas) - 1)), 2), steps)
        mask = _searched(self, measured_budget, reuse)
        return mask_search.transferred(mask, self.sigmas, sigmas)

    def check(self, model: ModelPatcher) -> None:
        """Raises FileRefused for another model than the one that was measured."""
        if self.model["fingerprint"] != fingerprint(model):
            raise FileRefused(
                f"{self.name} was made for {self.model['name']} ({self.model['weights']}), not for"
                " this model; calibrate this one, or choose its own file."
            )

    def fits(self, sigmas: torch.Tensor, sampler: str | None) -> list[str]:
        """Sentences about what differs from the measured run."""
        levels = [float(s) for s in sigmas]
        sentences = []
        if len(levels) != len(self.sigmas):
            sentences.append(
                f"{self.name} was measured with {len(self.sigmas) - 1} steps, this run has"
                f" {len(levels) - 1}: the schedule is interpolated."
            )
        elif not np.allclose(levels, self.sigmas, rtol=0.02, atol=0.005):
            sentences.append(
                f"{self.name} was measured with another scheduler or shift: the schedule is"
                " interpolated."
            )
        if sampler and sampler != self.run["sampler"]:
            sentences.append(
                f"{self.name} was measured with the sampler {self.run['sampler']}, this run uses"
                f" {sampler}."
            )
        r2 = self.teacache and self.teacache["r2"]
        if r2 is not None and r2 < 0.5:
            sentences.append(
                f"TeaCache's polynomial explains only {r2:.0%} of the change in {self.name}; the"
                " rule 'error' does not need it."
            )
        return sentences

    def to_json(self) -> str:
        curves = {
            kind: {"mean": curve.mean, "half": curve.half, "samples": curve.samples}
            for kind, curve in self.curves.items()
        }
        return (
            json.dumps(
                {
                    "format": f"{FORMAT}/{VERSION}",
                    "model": self.model,
                    "run": self.run,
                    "teacache": self.teacache,
                    "smoothcache": curves,
                    "grams": np.round(self.grams, 8).tolist(),
                    "created": self.created,
                }
            )
            + "\n"
        )

    def save(self, path: Path) -> None:
        """Writes the file, whole or not at all. Raises FileRefused."""
        path.parent.mkdir(parents=True, exist_ok=True)
        atomic.write(path, self.to_json().encode())


_masks: dict[tuple, list[bool]] = {}


def _searched(calibration: Calibration, budget: int, reuse: Reuse) -> list[bool]:
    """A search takes a second or so; the same file, budget and guess are searched once."""
    key = (calibration.model["fingerprint"], calibration.created, budget, reuse)
    if key not in _masks:
        _masks[key] = mask_search.search(budget, calibration.sigmas, calibration.grams, reuse)
    return _masks[key]


def load(path: str | os.PathLike) -> Calibration:
    """Raises FileRefused for what is not a calibration, or is one of a newer format."""
    path = Path(path)
    try:
        facts = json.loads(path.read_text(encoding="utf-8"))
        kind, _, version = str(facts["format"]).partition("/")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise FileRefused(
            f"{path.name} is not a calibration of caching ({type(error).__name__}); choose a file"
            " that Calibrate Cache wrote."
        ) from error
    if kind != FORMAT:
        raise FileRefused(
            f"{path.name} is of the format {kind}, not {FORMAT}; choose a file that Calibrate Cache"
            " wrote."
        )
    if version != str(VERSION):
        raise FileRefused(
            f"{path.name} was written by a newer Nibble (format {version}); update ComfyUI-Nibble,"
            " or calibrate again."
        )
    try:
        curves = {
            name: Curve(curve["mean"], curve["half"], curve["samples"])
            for name, curve in facts["smoothcache"].items()
        }
        found = Calibration(
            facts["model"],
            facts["run"],
            facts["teacache"],
            curves,
            np.asarray(facts["grams"], dtype=np.float64),
            path.name,
            facts["created"],
        )
        steps = len(found.sigmas) - 1
        whole = found.grams.shape[1:] == (steps, steps) and all(
            len(row) == steps - k for c in curves.values() for k, row in enumerate(c.mean, 1)
        )
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise FileRefused(f"{path.name} is damaged ({error}); calibrate again.") from error
    if not whole:
        raise FileRefused(
            f"{path.name} is damaged: its curves do not have an entry for each of its {steps}"
            " steps; calibrate again."
        )
    return found


def calibration_files() -> list[str]:
    """Names of the calibrations in ComfyUI's folders, newest first."""
    return [path.name for path in folders.newest(FOLDER, "*.json")]


def open_calibration(name: str) -> Calibration:
    """Raises FileRefused for a name that is not there."""
    found = next((path for path in folders.newest(FOLDER, "*.json") if path.name == name), None)
    if found is None:
        raise folders.missing(name, FOLDER)
    return load(found)


def find(model: ModelPatcher) -> Calibration | None:
    """The newest calibration that was made for this model."""
    wanted = fingerprint(model)
    for path in folders.newest(FOLDER, "*.json"):
        try:
            found = load(path)
        except FileRefused:
            continue
        if found.model["fingerprint"] == wanted:
            return found
    return None


def save_calibration(calibration: Calibration, prefix: str) -> Path:
    """Writes under the prefix and the first free number, into the first of ComfyUI's folders.
    Raises ValueError for a prefix that is no name.
    """
    prefix = folders.plain_name(prefix, "", FOLDER, ".json").removesuffix(".json")
    folder = Path(folder_paths.get_folder_paths(FOLDER)[0])
    number = next(i for i in range(1, 100000) if not (folder / f"{prefix}_{i:05}.json").exists())
    path = folder / f"{prefix}_{number:05}.json"
    calibration.save(path)
    calibration.name = path.name
    return path
