"""How to cache: what an artist sets in a node becomes checked settings, by presets and by what was
calibrated.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass

from comfy.model_patcher import ModelPatcher

from ....accel.caching.calibration_file import Calibration
from ....accel.caching.coefficients import Shipped
from ....accel.caching.error_control import LOW_BIT_PRESETS, PRESETS
from ....accel.caching.extrapolate import Reuse
from ....accel.caching.steps import Window
from ....accel.caching.teacache import PAPER, Polynomial
from ....quant.files.errors import FileRefused
from ..host.fingerprint import PLAIN, weights_of
from .calibration_file import calibration_files, find, open_calibration
from .features import FEATURES
from .models import DEPTHS, published_for

CUSTOM = "custom"
AUTO, NONE = "auto", "none"
RULES = ("error", "teacache")
LEVELS = (AUTO, "blocks", "step")  # what TeaCache reuses
STORES = {"gpu": None, "cpu": "cpu"}  # where reused results live; None: where they were made
_KNOWN_FEATURES = ("first_residual", *FEATURES)
PUBLISHED = (AUTO, "plain")  # which published coefficients, where a model has two
# how a skipped step's result is made of the computed ones; auto: as the rule has it
ORDERS = {AUTO: None, "reuse": 0, "line": 1, "parabola": 2}
HIGHEST_THRESHOLD = 3.0


@dataclass(frozen=True, kw_only=True)
class ReuseSettings:
    """What both methods share. start, end, first, last: the steps that may be reused, see `Window`;
    order, damping: how a skipped result is guessed, see `Reuse`, None: by the rule's own order;
    store: a key of STORES.
    """

    start: float = 0.0
    end: float = 1.0
    first: int = 1
    last: int = 1
    order: int | None = None
    damping: float = 1.0
    store: str = "gpu"

    def __post_init__(self) -> None:
        _check("store", self.store, STORES)
        # each refuses what it cannot be
        Window(self.start, self.end, self.first, self.last)
        Reuse(self._order, self.damping)

    @property
    def window(self) -> Window:
        return Window(self.start, self.end, self.first, self.last)

    @property
    def reuse(self) -> Reuse:
        return Reuse(self._order, self.damping)

    @property
    def own_order(self) -> int:
        """What is closest by the bench: the line through the last two."""
        return 1

    @property
    def _order(self) -> int:
        return self.own_order if self.order is None else self.order


@dataclass(frozen=True)
class TeaCacheSettings(ReuseSettings):
    """rule: "error" predicts the error of a guess from the last ones (any model, no calibration),
    "teacache" is the published rule with its polynomial, which reuses the last result as it is.
    level: what is reused, the residual of all blocks or the whole step; auto picks by rule.
    coefficients and feature: instead of published ones. preset: where published coefficients are
    used, the threshold that their authors give for it goes before `threshold`. plain: see
    `coefficients.lookup`.
    """

    threshold: float
    rule: str = "error"
    level: str = AUTO
    coefficients: Polynomial | None = None
    feature: str = AUTO
    preset: str | None = None
    plain: bool = False

    @property
    def own_order(self) -> int:
        return 0 if self.rule == "teacache" else super().own_order

    def __post_init__(self) -> None:
        if not 0 <= self.threshold <= HIGHEST_THRESHOLD:
            raise ValueError(
                f"The threshold is 0 (reuse nothing) to {HIGHEST_THRESHOLD:g}, not"
                f" {self.threshold:g}."
            )
        _check("rule", self.rule, RULES)
        _check("level", self.level, LEVELS)
        _check("feature", self.feature, (AUTO, *_KNOWN_FEATURES))
        if self.preset is not None:
            _check("preset", self.preset, PAPER)
        super().__post_init__()


@dataclass(frozen=True)
class SmoothCacheSettings(ReuseSettings):
    """alpha: the error that reusing may make. depth: one of DEPTHS. budget: instead of alpha, how
    many steps are computed (depth "step" only), placed where calibration found the end least
    disturbed.
    """

    alpha: float = 0.1
    depth: str = "step"
    budget: int | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.alpha <= HIGHEST_THRESHOLD:
            raise ValueError(
                f"alpha is 0 (reuse nothing) to {HIGHEST_THRESHOLD:g}, not {self.alpha:g}."
            )
        _check("depth", self.depth, DEPTHS)
        if self.budget is not None and (self.depth != "step" or self.budget < 2):
            raise ValueError(
                "A budget is a number of computed steps, at least 2, and works with the depth"
                " 'step' only."
            )
        super().__post_init__()


def _check(name: str, value: str, allowed: Iterable[str]) -> None:
    if value not in allowed:
        raise ValueError(f"{name} is one of {', '.join(allowed)}, not {value!r}.")


def preset(name: str, model: ModelPatcher) -> TeaCacheSettings:
    """What won in the bench: error control with linear extrapolation of whole steps, its threshold
    by how the model's weights are held.
    """
    _check("preset", name, PRESETS)
    thresholds = PRESETS if weights_of(model) == PLAIN else LOW_BIT_PRESETS
    return TeaCacheSettings(thresholds[name])


# ---- from widgets


@dataclass(frozen=True)
class CachingChoice:
    """How to cache, the measurements to go by, and a title for what is drawn."""

    settings: TeaCacheSettings | SmoothCacheSettings
    calibration: Calibration | None
    title: str
    subtitle: str


def calibration_names(*others: str) -> list[str]:
    """What a calibration widget offers: the given words, then the files."""
    return [*others, *calibration_files()]


def teacache(  # noqa: PLR0913 (the node's widgets, by their names)
    model: ModelPatcher,
    *,
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
    coefficients: str = AUTO,
) -> CachingChoice:
    """TeaCache as the widgets say: a preset, or the own threshold under "custom"."""
    _check("coefficients", coefficients, PUBLISHED)
    measured = _calibration(model, calibration)
    settings = _preset_settings(preset, model)
    changes: dict[str, object] = {
        "start": start,
        "end": end,
        "first": first_steps,
        "last": last_steps,
        "level": level,
        "store": store,
        "plain": coefficients == "plain",
    }
    if rule != AUTO:
        changes["rule"] = rule
    if preset == CUSTOM:
        changes["threshold"] = threshold
    elif rule == "teacache":
        changes |= {"threshold": PAPER[preset], "preset": preset}
    if ORDERS[extrapolation] is not None:
        changes["order"] = ORDERS[extrapolation]
    settings = dataclasses.replace(settings, **changes)
    title = "TeaCache" if preset == CUSTOM else f"TeaCache, {preset}"
    return CachingChoice(settings, measured, title, _teacache_words(model, settings, measured))


def _preset_settings(name: str, model: ModelPatcher) -> TeaCacheSettings:
    return preset("balanced" if name == CUSTOM else name, model)


def _teacache_words(
    model: ModelPatcher, settings: TeaCacheSettings, calibration: Calibration | None
) -> str:
    threshold = f"threshold {settings.threshold:g}"
    if settings.rule == "error":
        return f"rule error: compares its guesses with what is computed; {threshold}"
    if calibration is not None and calibration.polynomial is not None:
        return f"rule teacache, calibrated: {calibration.name}, {threshold}"
    entries = published_for(model, settings.plain)
    if not entries:
        return f"rule teacache, no coefficients for this model, {threshold}"
    names = " or ".join(entry.model for entry in entries)
    if settings.preset is not None:
        each = dict.fromkeys(f"{threshold_of(entry, settings):g}" for entry in entries)
        threshold = f"threshold {' or '.join(each)}"
    return f"rule teacache, coefficients of {names}, {threshold}"


def threshold_of(entry: Shipped, settings: TeaCacheSettings) -> float:
    """A preset's threshold is the one of the entry's authors."""
    if settings.preset is None:
        return settings.threshold
    return entry.thresholds[list(PAPER).index(settings.preset)]


def smoothcache(  # noqa: PLR0913 (the node's widgets, by their names)
    model: ModelPatcher,
    *,
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
) -> CachingChoice:
    """SmoothCache as the widgets say. Raises ValueError where no calibration of this model is to be
    found.
    """
    measured = _calibration(model, calibration)
    if measured is None:
        raise ValueError(
            "SmoothCache needs a calibration of this model, and there is none yet: run Calibrate"
            " Cache on it and connect its output to 'calibration', or choose its file there."
        )
    settings = SmoothCacheSettings(
        alpha=alpha,
        depth=depth,
        start=start,
        end=end,
        first=first_steps,
        last=last_steps,
        budget=budget or None,
        store=store,
    )
    if ORDERS[extrapolation] is not None:
        settings = dataclasses.replace(settings, order=ORDERS[extrapolation])
    how = f"{budget} steps computed" if budget else f"α {alpha:g}"
    return CachingChoice(settings, measured, f"SmoothCache, {how}", f"depth: {depth}")


def _calibration(model: ModelPatcher, name: str) -> Calibration | None:
    if name == NONE:
        return None
    found = find(model) if name == AUTO else open_calibration(name)
    if found is not None and found.feature and found.feature not in _KNOWN_FEATURES:
        raise FileRefused(
            f"{found.name} was measured on the feature {found.feature[:50]!r}, which this Nibble"
            " does not know; update ComfyUI-Nibble, or calibrate again."
        )
    return found
