"""Calibrations of caching as files: what one run without a cache taught about a model, a sampler
and a schedule.

    {"format": "nibble-cache/1", "model": {"class", "fingerprint", "name", "weights"},
     "run": {"sampler", "steps", "sigmas", "flow", "shift", "cfg", "latent", "prompts", "seed"},
     "teacache": {"feature", "coefficients", "x_min", "x_max", "r2", "points": [[x, y], …]} | null,
     "smoothcache": {kind: {"mean": [k - 1][step], "half": …, "samples"}},
     "grams": [prompt][step][step], "checksum": as quant/files/small.py}

"flow" is the unit in which velocities were measured (`flow_time.py`). Files of before have neither
"flow" nor "checksum": they are read, but where sigma was not a flow's, their velocities were
measured in the sampler's unit, and what was learnt from those is refused.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ...quant.files import atomic, small
from ...quant.files.errors import FileRefused
from . import fitted, mask_search
from .calibration_facts import Malformed, parsed, validate
from .extrapolate import Reuse
from .flow_time import FlowTime
from .smoothcache import Curve
from .teacache import Polynomial

FORMAT, VERSION = "nibble-cache", 1
LARGEST = 64 * 2**20  # bytes; the longest run of many prompts is a tenth of that
STEP = "step"  # the kind of layer that is the whole model


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

    @property
    def sigmas(self) -> list[float]:
        """The schedule that was measured, steps + 1 values."""
        return self.run["sigmas"]

    @property
    def flow(self) -> FlowTime:
        """The unit of its noise levels; a file of before says by its largest sigma whether it was
        measured on a flow.
        """
        if "flow" in self.run:
            return FlowTime(**self.run["flow"])
        return FlowTime(mixes=max(self.sigmas) <= 1)

    @property
    def times(self) -> tuple[float, ...]:
        """The schedule's times, steps + 1 values."""
        return self.flow.times(self.sigmas)

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

    def need(self, kinds: Sequence[str]) -> None:
        """Raises FileRefused where a kind of layer was not measured."""
        missing = [kind for kind in kinds if kind not in self.curves]
        if missing:
            raise FileRefused(
                f"{self.name} holds no errors for {', '.join(missing)}; calibrate again with that"
                " depth."
            )
        if STEP in kinds:
            self.need_velocities()

    def need_velocities(self) -> None:
        """Raises FileRefused where velocities were measured in the sampler's unit."""
        if "flow" not in self.run and not self.flow.mixes:
            raise FileRefused(
                f"{self.name} is of an older Nibble, which measured whole steps of such a model"
                " wrongly; calibrate again, or choose another depth."
            )

    def mask(self, budget: int, times: Sequence[float], reuse: Reuse) -> list[bool]:
        """The best `budget` steps to compute: searched on the measured schedule, spread over
        another one. Raises FileRefused of `need_velocities`.
        """
        self.need_velocities()
        steps = len(self.sigmas) - 1
        measured_budget = min(max(round(budget * steps / (len(times) - 1)), 2), steps)
        mask = _searched(self, measured_budget, reuse)
        return mask_search.transferred(mask, self.times, times)

    def guesses(
        self, mask: Sequence[bool], times: Sequence[float], sampler: str, asked: Reuse
    ) -> Reuse:
        """How the whole steps that a mask skips are guessed: by fitted weights if this very
        schedule and sampler were measured, else as asked.
        """
        same = len(times) == len(self.sigmas) and np.allclose(times, self.times, rtol=1e-3)
        if not same or sampler != self.run["sampler"]:
            return asked
        return fitted.fit(mask, times, self._grams, asked)

    def check(self, fingerprint: str) -> None:
        """Raises FileRefused for another model than the one that was measured."""
        if self.model["fingerprint"] != fingerprint:
            raise FileRefused(
                f"{self.name} was made for {self.model['name']} ({self.model['weights']}), not for"
                " this model; calibrate this one, or choose its own file."
            )

    def fits(self, times: Sequence[float], sampler: str | None) -> list[str]:
        """Sentences about what differs from the measured run; times: of the run's steps, and its
        end.
        """
        sentences = []
        if len(times) != len(self.sigmas):
            sentences.append(
                f"{self.name} was measured with {len(self.sigmas) - 1} steps, this run has"
                f" {len(times) - 1}: the schedule is interpolated."
            )
        elif not np.allclose(times, self.times, rtol=0.02, atol=0.005):
            sentences.append(
                f"{self.name} was measured with another scheduler or shift: the schedule is"
                " interpolated."
            )
        if sampler and sampler != self.run["sampler"]:
            sentences.append(
                f"{self.name} was measured with the sampler {self.run['sampler']}, this run uses"
                f" {sampler}."
            )
        r2 = self.teacache["r2"] if self.teacache else None
        if r2 is not None and r2 < 0.5:
            sentences.append(
                f"TeaCache's polynomial explains only {r2:.0%} of the change in {self.name}; the"
                " rule 'error' does not need it."
            )
        return sentences

    def facts(self) -> dict:
        """What is in its file, but for the checksum."""
        curves = {
            kind: {"mean": curve.mean, "half": curve.half, "samples": curve.samples}
            for kind, curve in self.curves.items()
        }
        return {
            "format": f"{FORMAT}/{VERSION}",
            "model": self.model,
            "run": self.run,
            "teacache": self.teacache,
            "smoothcache": curves,
            "grams": self._grams.tolist(),
        }

    @property
    def _grams(self) -> np.ndarray:
        """As they are written."""
        return np.round(self.grams, 8)

    def digest(self) -> str:
        """The sum of its content."""
        return small.json_sum(self.facts())

    def save(self, path: Path) -> None:
        """Writes the file, whole or not at all; equal content gives equal bytes. Raises
        FileRefused, also for what `read` would refuse.
        """
        facts = self.facts()
        _validated(facts, path.name, "was not written: the run")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise atomic.refusal(path, error) from error
        atomic.write(path, small.json_bytes(facts) + b"\n")


def read(path: Path) -> Calibration:
    """Raises FileRefused for what is not a calibration, is damaged, or is of a newer format."""
    facts = _opened(path)
    kind, _, version = str(facts.get("format")).partition("/")
    if kind != FORMAT:
        raise FileRefused(
            f"{path.name} is not a calibration of caching: its format is not {FORMAT}; choose a"
            " file that Calibrate Cache wrote."
        )
    if version != str(VERSION):
        raise FileRefused(
            f"{path.name} was written by a newer Nibble (format {version[:20]}); update"
            " ComfyUI-Nibble, or calibrate again."
        )
    written = facts.pop(small.JSON_SUM, None)
    if written is not None and written != small.json_sum(facts):
        raise FileRefused(
            f"{path.name} is damaged: its content is not what was written; calibrate again."
        )
    _validated(facts, path.name, "is damaged: it")
    curves = {
        kind: Curve(curve["mean"], curve["half"], curve["samples"])
        for kind, curve in facts["smoothcache"].items()
    }
    return Calibration(
        model=facts["model"],
        run=facts["run"],
        teacache=facts["teacache"],
        curves=curves,
        grams=np.asarray(facts["grams"], dtype=np.float64),
        name=path.name,
    )


def facts(path: Path) -> dict | None:
    """What a calibration is, for `python -m nibble inspect`; None for another file. Raises
    FileRefused for a damaged one.
    """
    if path.suffix != ".json":
        return None
    found = read(path)
    return {
        "file": path.name,
        "kind": "calibration of caching",
        "model": found.model["name"],
        "weights": found.model["weights"],
        "steps": len(found.sigmas) - 1,
        "kinds": sorted(found.curves),
    }


def _opened(path: Path) -> dict:
    """The JSON object of a file."""
    try:
        with open(path, "rb") as file:
            content = file.read(LARGEST + 1)
        if len(content) > LARGEST:
            raise Malformed("is too large")
        return parsed(content)
    except OSError as error:
        raise FileRefused(
            f"{path.name} could not be read ({error.strerror}); choose another file."
        ) from error
    except Malformed as error:
        raise FileRefused(
            f"{path.name} is not a calibration of caching: it {error}; choose a file that Calibrate"
            " Cache wrote."
        ) from error


def _validated(facts: dict, name: str, what: str) -> None:
    try:
        validate(facts)
    except Malformed as error:
        raise FileRefused(f"{name} {what} {error}; calibrate again.") from error


_masks: dict[tuple, list[bool]] = {}


def _searched(calibration: Calibration, budget: int, reuse: Reuse) -> list[bool]:
    """A search takes a second or so; the same content, budget and guess are searched once."""
    key = (calibration.digest(), budget, reuse)
    if key not in _masks:
        _masks[key] = mask_search.search(budget, calibration.times, calibration.grams, reuse)
    return _masks[key]
