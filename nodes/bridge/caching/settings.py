"""From what an artist sets in a node to how a run caches: presets, calibrations, and the words for
both.
"""

from __future__ import annotations

import dataclasses

from comfy.model_patcher import ModelPatcher

from ..host.progress import Progress
from . import apply as caching
from . import calibration_file
from . import charts as caching_charts

CUSTOM = "custom"
AUTO, NONE = "auto", "none"
# TeaCache's rule with a polynomial of one's own: the paper's slow and fast, and half of slow
PAPER = {"quality": 0.05, "balanced": 0.1, "fast": 0.2}
# how a skipped step's result is made of the computed ones
ORDERS = {"auto": None, "reuse": 0, "line": 1, "parabola": 2}


@dataclasses.dataclass(frozen=True)
class Choice:
    """How to cache, the measurements to go by, and a title for what is drawn."""

    settings: caching.TeaCacheSettings | caching.SmoothCacheSettings
    calibration: calibration_file.Calibration | None
    title: str
    subtitle: str

    def on(self, model: ModelPatcher, watch) -> ModelPatcher:
        """A clone of the model with this caching. Raises ValueError and FileRefused where it cannot
        be.
        """
        apply = (
            caching.apply_teacache
            if isinstance(self.settings, caching.TeaCacheSettings)
            else caching.apply_smoothcache
        )
        return apply(model, self.settings, self.calibration, watch)


def calibration_names(*others: str) -> list[str]:
    """What a calibration widget offers: the given words, then the files."""
    return [*others, *calibration_file.calibration_files()]


def teacache(
    model: ModelPatcher,
    preset: str,
    threshold: float,
    start: float,
    end: float,
    calibration: str,
    rule: str,
    extrapolation: str,
    first_steps: int,
    last_steps: int,
    level: str,
    store: str,
) -> Choice:
    """TeaCache as the widgets say: a preset, or the own threshold under "custom"."""
    found = _calibration(model, calibration)
    settings = caching.preset("balanced" if preset == CUSTOM else preset, model)
    changes = dict(
        start=start, end=end, first=first_steps, last=last_steps, level=level, store=store
    )
    if rule != AUTO:
        changes["rule"] = rule
    if preset == CUSTOM:
        changes["threshold"] = threshold
    elif rule == "teacache":
        changes["threshold"] = _published(model, found, preset)
    if ORDERS[extrapolation] is not None:
        changes["order"] = ORDERS[extrapolation]
    settings = dataclasses.replace(settings, **changes)
    return Choice(
        settings,
        found,
        "TeaCache" if preset == CUSTOM else f"TeaCache, {preset}",
        _teacache_words(model, settings, found),
    )


def _published(model: ModelPatcher, calibration, preset: str) -> float:
    """A preset's threshold for TeaCache's own rule: its authors' for this model, unless the
    polynomial is the user's own.
    """
    shipped = None if calibration is not None and calibration.polynomial else caching.shipped(model)
    return shipped.thresholds[list(PAPER).index(preset)] if shipped else PAPER[preset]


def _teacache_words(model: ModelPatcher, settings, calibration) -> str:
    if settings.rule == "error":
        return f"compares its guesses with what is computed; threshold {settings.threshold:g}"
    own = calibration is not None and calibration.polynomial is not None
    shipped = None if own else caching.shipped(model)
    source = (
        f"calibrated: {calibration.name}"
        if own
        else f"coefficients of {shipped.model}"
        if shipped
        else "no coefficients for this model"
    )
    return f"{source}, threshold {settings.threshold:g}"


def smoothcache(
    model: ModelPatcher,
    calibration: str,
    alpha: float,
    depth: str,
    start: float,
    end: float,
    budget: int,
    extrapolation: str,
    first_steps: int,
    last_steps: int,
    store: str,
) -> Choice:
    """SmoothCache as the widgets say. Raises ValueError where no calibration of this model is to be
    found.
    """
    found = _calibration(model, calibration)
    if found is None:
        raise ValueError(
            "SmoothCache needs a calibration of this model, and there is none yet: run Calibrate"
            " Cache on it and connect its output to 'calibration', or choose its file there."
        )
    changes = {} if ORDERS[extrapolation] is None else {"order": ORDERS[extrapolation]}
    settings = caching.SmoothCacheSettings(
        alpha=alpha,
        depth=depth,
        start=start,
        end=end,
        first=first_steps,
        last=last_steps,
        budget=budget or None,
        store=store,
        **changes,
    )
    how = f"{budget} steps computed" if budget else f"α {alpha:g}"
    return Choice(settings, found, f"SmoothCache, {how}", f"depth: {depth}")


def _calibration(model: ModelPatcher, name: str):
    if name == NONE:
        return None
    return calibration_file.find(model) if name == AUTO else calibration_file.open_calibration(name)


def apply(model: ModelPatcher, choice: Choice, node_id: str | None) -> tuple[ModelPatcher, dict]:
    """The model with caching, and a chart of what it will do. While a sampler runs, the strip is
    drawn in this node in place of that chart.
    """
    progress = Progress(choice.title, node_id)
    cached = choice.on(
        model,
        lambda record: progress.show(
            caching_charts.strip_chart(record, choice.title, choice.subtitle)
        ),
    )
    notes = [["note", note] for note in caching.notes(model, choice.settings, choice.calibration)]
    summary = [
        ["how", choice.subtitle],
        ["depth", caching_charts.LEVELS[caching.level_of(model)]],
        *notes,
    ]
    return cached, {"kind": "facts", "title": choice.title, "summary": summary}
