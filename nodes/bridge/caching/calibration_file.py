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
import hashlib
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
from ....quant.files.errors import FileRefused

FOLDER, FORMAT, VERSION = "nibble_cache", "nibble-cache", 1
PIECES = 24  # tensors of a model whose values the fingerprint reads
SAMPLE = 256  # values of each tensor of a patch that tell LoRAs apart
PLAIN = "16 bit or more"

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
        facts = self.teacache
        return Polynomial(tuple(facts["coefficients"]), facts["x_min"], facts["x_max"], facts["r2"])

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
        here = min(max(round(budget * steps / (len(sigmas) - 1)), 2), steps)
        return mask_search.spread(_searched(self, here, reuse), self.sigmas, sigmas)

    def check(self, model: ModelPatcher) -> None:
        """Raises FileRefused for another model than the one that was measured."""
        if self.model["fingerprint"] != fingerprint(model):
            raise FileRefused(
                f"{self.name} was made for {self.model['name']} ({self.model['weights']}), not for"
                " this model; calibrate this one, or choose its own file."
            )

    def fits(self, sigmas: torch.Tensor, sampler: str | None) -> list[str]:
        """Sentences about what differs from the measured run."""
        found, levels = [], [float(s) for s in sigmas]
        if len(levels) != len(self.sigmas):
            found.append(
                f"{self.name} was measured with {len(self.sigmas) - 1} steps, this run has"
                f" {len(levels) - 1}: the schedule is interpolated."
            )
        elif not np.allclose(levels, self.sigmas, rtol=0.02, atol=0.005):
            found.append(
                f"{self.name} was measured with another scheduler or shift: the schedule is"
                " interpolated."
            )
        if sampler and sampler != self.run["sampler"]:
            found.append(
                f"{self.name} was measured with the sampler {self.run['sampler']}, this run uses"
                f" {sampler}."
            )
        r2 = self.teacache and self.teacache["r2"]
        if r2 is not None and r2 < 0.5:
            found.append(
                f"TeaCache's polynomial explains only {r2:.0%} of the change in {self.name}; the"
                " rule 'error' does not need it."
            )
        return found

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
        """Written beside and renamed, so that a file is whole or not there."""
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".part")
        partial.write_text(self.to_json(), encoding="utf-8")
        os.replace(partial, path)


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
    return [path.name for path in _paths()]


def _paths() -> list[Path]:
    folders = [Path(folder) for folder in folder_paths.get_folder_paths(FOLDER)]
    return sorted(
        (path for folder in folders if folder.is_dir() for path in folder.glob("*.json")),
        key=lambda path: -path.stat().st_mtime_ns,
    )


def open_calibration(name: str) -> Calibration:
    """Raises FileRefused for a name that is not there."""
    found = next((path for path in _paths() if path.name == name), None)
    if found is None:
        raise FileRefused(
            f"{name} is not in ComfyUI's {FOLDER} folder any more; press R to refresh the list and"
            " choose again."
        )
    return load(found)


def find(model: ModelPatcher) -> Calibration | None:
    """The newest calibration that was made for this model."""
    wanted = fingerprint(model)
    for path in _paths():
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
    if not prefix or Path(prefix).name != prefix:
        raise ValueError(
            f"{prefix!r} cannot be the name of a file; use letters, digits and dashes."
        )
    folder = Path(folder_paths.get_folder_paths(FOLDER)[0])
    number = next(i for i in range(1, 100000) if not (folder / f"{prefix}_{i:05}.json").exists())
    path = folder / f"{prefix}_{number:05}.json"
    calibration.save(path)
    calibration.name = path.name
    return path


def fingerprint(model: ModelPatcher) -> str:
    """Tells models apart by class, names, shapes and kinds of weights, and by the values of some
    tensors that LoRAs leave alone: norms, biases, and the scales of quantized layers. A model and
    its 4-bit form differ.
    """
    network = model.model.diffusion_model
    digest = hashlib.sha256(type(network).__name__.encode())
    vectors = []
    for name, tensor in network.named_parameters():
        digest.update(f"{name} {tuple(tensor.shape)} {kind_of(tensor)}".encode())
        if tensor.ndim == 1 and kind_of(tensor) == PLAIN:
            vectors.append(tensor)
    for tensor in vectors[:: max(len(vectors) // PIECES, 1)][:PIECES]:
        digest.update(tensor.detach()[:64].to("cpu", torch.float32).numpy().tobytes())
    return digest.hexdigest()[:32]


def patches_fingerprint(model: ModelPatcher) -> str | None:
    """16 hex digits of the patches of a model's weights (LoRAs): names, strengths and some values;
    None where there are none.
    """
    sha = hashlib.sha256()
    for key in sorted(model.patches, key=str):
        _feed(sha, [str(key), model.patches[key]])
    return sha.hexdigest()[:16] if model.patches else None


def _feed(sha, value: object) -> None:
    """Strengths, names and some values of a patch."""
    if isinstance(value, torch.Tensor):
        sha.update(
            repr(tuple(value.shape)).encode()
            + value.detach().flatten()[:SAMPLE].to("cpu", torch.float32).numpy().tobytes()
        )
    elif isinstance(value, (list, tuple)):
        for part in value:
            _feed(sha, part)
    elif value is None or isinstance(value, (bool, int, float, str)):
        sha.update(repr(value).encode())
    else:  # a weight adapter, or a function
        sha.update(type(value).__name__.encode())
        _feed(sha, getattr(value, "weights", None))


def kind_of(tensor: torch.Tensor) -> str:
    """How a weight is held: the layout of a quantized one, PLAIN for any plain float."""
    layout = getattr(tensor, "_layout_cls", None)
    if layout is not None:
        return str(layout)
    return str(tensor.dtype) if tensor.element_size() == 1 else PLAIN


def weights_of(model: ModelPatcher) -> str:
    """In words: the kinds of weights of a model."""
    kinds = {kind_of(tensor) for tensor in model.model.diffusion_model.parameters()}
    return ", ".join(sorted(kinds - {PLAIN})) or PLAIN
