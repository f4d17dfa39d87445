"""Caching for a MODEL: settings in, a clone with our wrappers out. Works with every sampler and
guider, and composes with other patches.

Which steps are computed is decided in accel/caching; what is kept and where it is put back, in
wrap_steps (whole steps), wrap_blocks (TeaCache) and wrap_sublayers (SmoothCache). One of the three
is on a model at a time: applying again replaces.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import torch
from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import WrappersMP

from ....accel.caching import mask_search, smoothcache
from ....accel.caching.calibration_file import Calibration
from ....accel.caching.coefficients import LARGE_LATENT
from ....accel.caching.error_control import ErrorControl
from ....accel.caching.steps import Record
from ....accel.caching.teacache import IDENTITY, TeaCache
from ..host.fingerprint import fingerprint
from ..host.progress import Progress
from ..host.samplers import sampler_name
from .charts import LEVELS, strip_chart
from .controlnet import deferring
from .models import ModelFamily, family_of, level_of, published, published_for
from .run import KEY, Run, adds_noise, flow_time, sampling, uncached
from .settings import (
    AUTO,
    PRESETS,
    STORES,
    CachingChoice,
    SmoothCacheSettings,
    TeaCacheSettings,
    threshold_of,
)
from .wrap_blocks import around_blocks
from .wrap_steps import around_model
from .wrap_sublayers import SublayerSchedule, around_sublayers, kinds

FEW_STEPS = 8  # with so few steps nothing is to be gained: distilled models
Watch = Callable[[Record], None]


def apply(model: ModelPatcher, choice: CachingChoice, watch: Watch) -> ModelPatcher:
    """A clone of the model with this caching. Raises ValueError and FileRefused where it cannot
    be.
    """
    if isinstance(choice.settings, TeaCacheSettings):
        return apply_teacache(model, choice.settings, choice.calibration, watch)
    return apply_smoothcache(model, choice.settings, choice.calibration, watch)


def apply_and_show(
    model: ModelPatcher, choice: CachingChoice, node_id: str | None
) -> tuple[ModelPatcher, dict]:
    """The model with caching, and a chart of what it will do. While a sampler runs, the strip is
    drawn in this node in place of that chart.
    """
    progress = Progress(choice.title, node_id)

    def show(record: Record) -> None:
        progress.show(strip_chart(record, choice.title, choice.subtitle))

    cached = apply(model, choice, show)
    summary = [
        ["how", choice.subtitle],
        ["depth", LEVELS[level_of(model)]],
        *(["note", note] for note in notes(model, choice.settings, choice.calibration)),
    ]
    return cached, {"kind": "facts", "title": choice.title, "summary": summary}


def apply_teacache(
    model: ModelPatcher,
    settings: TeaCacheSettings,
    calibration: Calibration | None = None,
    watch: Watch | None = None,
) -> ModelPatcher:
    """A clone of the model that caches. watch hears the record after every step. Raises FileRefused
    for another model's calibration.
    """
    if calibration is not None:
        calibration.check(fingerprint(model))
    level = _level(model, settings)
    if level == "step":
        settings = _by_error(settings)

    def make(guider, sampler, sigmas, latent) -> Run:
        schedule, flow = [float(s) for s in sigmas], flow_time(guider.model_patcher)
        if settings.rule == "error":
            rule, feature = _error_control(settings, flow.times(schedule)), ""
        else:
            rule, feature = _teacache(guider, settings, calibration, latent)
        return Run(
            sigmas=schedule,
            sampler=sampler,
            patcher=guider.model_patcher,
            rule=rule,
            reuse=settings.reuse,
            store=STORES[settings.store],
            record=Record(len(schedule) - 1, rule.threshold, settings.rule, level=level),
            watch=watch,
            feature=feature,
            flow=flow,
        )

    if level == "step":
        return _wrapped(model, make, WrappersMP.APPLY_MODEL, around_model)
    family = family_of(model.model.diffusion_model)
    return _wrapped(model, make, family.hook, around_blocks(family))


def _level(model: ModelPatcher, settings: TeaCacheSettings) -> str:
    """ "step" or "blocks": where the rule works on this model."""
    wanted = settings.level
    if wanted == AUTO:
        wanted = "step" if settings.rule == "error" else "blocks"
    return "step" if "step" in (wanted, level_of(model)) else "blocks"


def _by_error(settings: TeaCacheSettings) -> TeaCacheSettings:
    """The rule of whole steps, where a model offers no blocks to watch. Thresholds of TeaCache's
    own rule are of another kind, so they are held down to a preset's.
    """
    if settings.rule == "error":
        return settings
    threshold = min(settings.threshold, PRESETS["balanced"])
    return dataclasses.replace(settings, rule="error", threshold=threshold, preset=None)


def _error_control(settings: TeaCacheSettings, times: tuple[float, ...]) -> ErrorControl:
    return ErrorControl(settings.threshold, times, settings.reuse, settings.window)


def _teacache(
    guider, settings: TeaCacheSettings, calibration: Calibration | None, latent: torch.Tensor
) -> tuple[TeaCache, str]:
    """The rule of one run, and TeaCache's F: the polynomial is chosen when it is known what is
    sampled.
    """
    own = family_of(guider.model_patcher.model.diffusion_model).feature
    fitted = calibration is not None and calibration.polynomial
    if settings.coefficients or fitted:
        feature = calibration.feature if fitted else own
        if settings.feature != AUTO:
            feature = settings.feature
        polynomial = settings.coefficients or calibration.polynomial
        return TeaCache(polynomial, settings.threshold, settings.window), feature
    reference = any(
        "reference_latents" in cond for group in guider.conds.values() for cond in group
    )
    large = latent.shape[-1] * latent.shape[-2] > LARGE_LATENT
    shipped = published(guider.model_patcher, reference, large, settings.plain)
    if shipped is None:
        return TeaCache(IDENTITY, settings.threshold, settings.window), own
    threshold, window = threshold_of(shipped, settings), shipped.window(settings.window)
    return TeaCache(shipped.polynomial, threshold, window), shipped.feature


def apply_smoothcache(
    model: ModelPatcher,
    settings: SmoothCacheSettings,
    calibration: Calibration | None = None,
    watch: Watch | None = None,
) -> ModelPatcher:
    """A clone of the model with a static schedule. Without a calibration only a budget works,
    evenly spread. Raises ValueError and FileRefused.
    """
    if calibration is not None:
        calibration.check(fingerprint(model))
    elif settings.budget is None:
        raise ValueError(
            "SmoothCache needs a calibration of this model: run the node Calibrate Cache once, or"
            " give a number of steps to compute."
        )
    family = family_of(model.model.diffusion_model)
    depth = settings.depth if family else "step"
    scheduled = ["step"] if depth == "step" else kinds(family, depth)
    always = later(family, calibration) if depth == "sublayer" else []
    scheduled = [kind for kind in scheduled if kind not in always]
    if calibration is not None:
        _need(calibration, settings, scheduled)

    def make(guider, sampler, sigmas, latent) -> Run:
        schedule, flow = [float(s) for s in sigmas], flow_time(guider.model_patcher)
        times, reuse = flow.times(schedule), settings.reuse
        masks = masks_for(settings, calibration, times, scheduled)
        masks |= {kind: [True] * (len(schedule) - 1) for kind in always}
        if depth == "step":
            rule = mask_search.StepMask(tuple(masks["step"]), settings.window)
            if calibration is not None and settings.order is None and not adds_noise(sampler):
                mask = rule.steps(times)
                reuse = calibration.guesses(mask, times, sampler_name(sampler), reuse)
        else:
            rule = SublayerSchedule(masks, settings.window)
        return Run(
            sigmas=schedule,
            sampler=sampler,
            patcher=guider.model_patcher,
            rule=rule,
            reuse=reuse,
            store=STORES[settings.store],
            record=Record(len(schedule) - 1, None, "schedule", level=depth),
            watch=watch,
            flow=flow,
        )

    if depth == "step":
        return _wrapped(model, make, WrappersMP.APPLY_MODEL, around_model)
    return _wrapped(model, make, family.hook, around_sublayers(family, depth))


def later(family: ModelFamily, calibration: Calibration | None) -> list[str]:
    """Kinds of parts that a calibration is too old to know."""
    return [
        kind
        for blocks in family.blocks
        for kind in (f"{blocks.kind}.{part}" for part in blocks.later)
        if calibration is not None and kind not in calibration.curves
    ]


def _need(calibration: Calibration, settings: SmoothCacheSettings, scheduled: list[str]) -> None:
    """Raises FileRefused where the schedule cannot be made of what was measured."""
    if settings.budget is None:
        calibration.need(scheduled)
    else:
        calibration.need_velocities()


def masks_for(
    settings: SmoothCacheSettings,
    calibration: Calibration | None,
    times: Sequence[float],
    scheduled: list[str],
) -> dict[str, list[bool]]:
    """kind → which steps compute it, for this run's times (steps + 1 values)."""
    steps = len(times) - 1
    if settings.budget is not None:
        budget = min(max(settings.budget, 2), steps)
        if steps < 2:
            mask = [True] * steps
        elif calibration is None:
            mask = mask_search.uniform(steps, budget)
        else:
            mask = calibration.mask(budget, times, settings.reuse)
        return {"step": mask}
    if steps < 2:
        return {kind: [True] * steps for kind in scheduled}
    masks = {}
    for kind in scheduled:
        curve = calibration.curves[kind].at(calibration.times[:-1], times[:-1])
        masks[kind] = smoothcache.greedy_mask(curve.mean, settings.alpha)
    return masks


def _wrapped(
    model: ModelPatcher, make: Callable[..., Run], hook: str, wrapper: Callable
) -> ModelPatcher:
    """The clone with our wrappers, and none of an earlier application."""
    patched = uncached(model)
    patched.add_wrapper_with_key(WrappersMP.OUTER_SAMPLE, KEY, sampling(make))
    patched.add_wrapper_with_key(WrappersMP.CALC_COND_BATCH, KEY, deferring(KEY))
    patched.add_wrapper_with_key(hook, KEY, wrapper)
    return patched


def notes(
    model: ModelPatcher,
    settings: TeaCacheSettings | SmoothCacheSettings,
    calibration: Calibration | None = None,
    sigmas: torch.Tensor | None = None,
    sampler: str | None = None,
) -> list[str]:
    """What an artist should know, a sentence each; nothing here stops a run. sampler: its name."""
    sentences = []
    if sigmas is not None and len(sigmas) - 1 <= FEW_STEPS:
        sentences.append(
            f"{len(sigmas) - 1} steps are too few for caching to gain anything; leave it out, or"
            " take fewer steps."
        )
    if isinstance(settings, TeaCacheSettings):
        sentences += _teacache_notes(model, settings, calibration)
    elif settings.depth != "step" and level_of(model) == "step":
        sentences.append(
            f"{_name(model)} offers no hooks to its blocks, so whole steps are reused."
        )
    elif settings.depth == "sublayer" and (
        old := later(family_of(model.model.diffusion_model), calibration)
    ):
        sentences.append(
            f"{calibration.name} is of an older Nibble, which did not measure {', '.join(old)}:"
            " always computed. Calibrate again to reuse it, too."
        )
    if hasattr(model.model.diffusion_model, "init_kv_caches"):
        sentences.append(
            "With Sampler AR Video every step is computed: each call moves on what the model"
            " remembers of the frames before."
        )
    if calibration is not None and sigmas is not None:
        times = flow_time(model).times(sigmas)
        sentences += calibration.fits(times, sampler)
    return sentences


def _teacache_notes(
    model: ModelPatcher, settings: TeaCacheSettings, calibration: Calibration | None
) -> list[str]:
    if settings.rule != "teacache":
        return []
    if _level(model, settings) == "step":
        return [
            f"{_name(model)} offers no hooks to its blocks: whole steps are reused, with the rule"
            f" 'error' and a threshold of at most {PRESETS['balanced']:g}."
        ]
    if settings.coefficients or (calibration is not None and calibration.polynomial):
        return []
    entries = published_for(model, settings.plain)
    if not entries:
        return [
            f"There are no published TeaCache coefficients for {_name(model)} of this size: the"
            " change of its input is taken as it is. Run Calibrate Cache on it once to fit them, or"
            " choose the rule 'error', which needs none."
        ]
    return [
        f"The coefficients are those of {entry.model}. For {entry.unfitted}, of the same shape,"
        " there are none: run Calibrate Cache once on that, or choose the rule 'error'."
        for entry in entries
        if entry.unfitted
    ]


def _name(model: ModelPatcher) -> str:
    return type(model.model.diffusion_model).__name__
