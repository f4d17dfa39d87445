"""Caching for a MODEL: settings in, a clone with our wrappers out. Works with every sampler and
guider, and composes with other patches.

Which steps are computed is decided in accel/; what is kept and where it is put back, in
caching_step (whole steps), caching_blocks (TeaCache) and caching_parts (SmoothCache). One of the
three is on a model at a time: applying again replaces.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import WrappersMP

from ....accel.caching import coefficients, mask_search
from ....accel.caching.error_control import ErrorControl
from ....accel.caching.extrapolate import Reuse
from ....accel.caching.smoothcache import schedule as by_alpha
from ....accel.caching.steps import Record, Window
from ....accel.caching.teacache import IDENTITY, Polynomial, TeaCache
from ..host.fingerprint import PLAIN, weights_of
from . import models as caching_models
from . import wrap_sublayers as caching_parts
from .calibration_file import Calibration
from .controlnet import deferring
from .run import KEY, Run, sampling
from .wrap_blocks import around_blocks
from .wrap_steps import around_model
from .wrap_sublayers import PartSchedule, around_parts

log = logging.getLogger("nibble")

RULES, LEVELS, STORES = (
    ("error", "teacache"),
    ("auto", "blocks", "step"),
    {"gpu": None, "cpu": "cpu"},
)
FEW_STEPS = 8  # with so few steps nothing is to be gained: distilled models
LARGE_LATENT = 7000  # latent pixels above which a video counts as 720p
HIGHEST_THRESHOLD = 3.0


@dataclass(frozen=True)
class TeaCacheSettings:
    """rule: "error" foretells the error of a guess from the last ones (any model, no calibration),
    "teacache" is the published rule with its polynomial. level: what is reused, the residual of all
    blocks or the whole step; auto picks by rule. coefficients and feature: instead of shipped ones.
    """

    threshold: float
    rule: str = "error"
    start: float = 0.0
    end: float = 1.0
    first: int = 1
    last: int = 1
    order: int = 1
    damping: float = 1.0
    level: str = "auto"
    store: str = "gpu"
    coefficients: Polynomial | None = None
    feature: str = "auto"
    window: Window = field(init=False, repr=False)
    reuse: Reuse = field(init=False, repr=False)

    def __post_init__(self):
        if not 0 <= self.threshold <= HIGHEST_THRESHOLD:
            raise ValueError(
                f"The threshold is 0 (reuse nothing) to {HIGHEST_THRESHOLD:g}, not"
                f" {self.threshold:g}."
            )
        _check("rule", self.rule, RULES)
        _check("level", self.level, LEVELS)
        _check("store", self.store, STORES)
        _check("feature", self.feature, ("auto", "first_residual", *caching_models.FEATURES))
        object.__setattr__(self, "window", Window(self.start, self.end, self.first, self.last))
        object.__setattr__(self, "reuse", Reuse(self.order, self.damping))


@dataclass(frozen=True)
class SmoothCacheSettings:
    """alpha: the error that reusing may make. depth: whole steps, kinds of blocks, or sub-layers.
    budget: instead of alpha, how many steps are computed (depth "step" only), placed where
    calibration found the end least disturbed.
    """

    alpha: float = 0.1
    depth: str = "step"
    start: float = 0.0
    end: float = 1.0
    first: int = 1
    last: int = 1
    order: int = 1
    damping: float = 1.0
    store: str = "gpu"
    budget: int | None = None
    window: Window = field(init=False, repr=False)
    reuse: Reuse = field(init=False, repr=False)

    def __post_init__(self):
        if not 0 <= self.alpha <= HIGHEST_THRESHOLD:
            raise ValueError(
                f"alpha is 0 (reuse nothing) to {HIGHEST_THRESHOLD:g}, not {self.alpha:g}."
            )
        _check("depth", self.depth, caching_parts.DEPTHS)
        _check("store", self.store, STORES)
        if self.budget is not None and (self.depth != "step" or self.budget < 2):
            raise ValueError(
                "A budget is a number of computed steps, at least 2, and works with the depth"
                " 'step' only."
            )
        object.__setattr__(self, "window", Window(self.start, self.end, self.first, self.last))
        object.__setattr__(self, "reuse", Reuse(self.order, self.damping))


def _check(name: str, value: str, known) -> None:
    if value not in known:
        raise ValueError(f"{name} is one of {', '.join(known)}, not {value!r}.")


# Thresholds of error control; what they cost and give: tests/bench/results/cache-*.json. Rounding
# makes a low-bit model's velocity rough from step to
# step, and a threshold below that roughness skips nothing.
PRESETS = {"quality": 0.01, "balanced": 0.03, "fast": 0.1}
LOW_BIT_PRESETS = {"quality": 0.02, "balanced": 0.05, "fast": 0.1}


def preset(name: str, model: ModelPatcher) -> TeaCacheSettings:
    """What won in the bench: error control with linear extrapolation of whole steps, its threshold
    by how the model's weights are held.
    """
    _check("preset", name, PRESETS)
    return TeaCacheSettings((PRESETS if weights_of(model) == PLAIN else LOW_BIT_PRESETS)[name])


def level_of(model: ModelPatcher) -> str:
    """The deepest level that a model's hooks allow: "sublayer", "blocks" or "step"."""
    adapter = caching_models.adapter_of(model.model.diffusion_model)
    return adapter.level if adapter else "step"


def shipped(
    model: ModelPatcher, reference: bool = False, large: bool = False
) -> coefficients.Shipped | None:
    """Published coefficients for a loaded model. reference: it edits a reference picture (Kontext);
    large: 720p video.
    """
    network = model.model.diffusion_model
    facts = caching_models.facts_of(network) | {"reference": reference, "large": large}
    return coefficients.lookup(caching_models.classes_of(network), facts)


def apply_teacache(
    model: ModelPatcher,
    settings: TeaCacheSettings,
    calibration: Calibration | None = None,
    watch: Callable[[Record], None] | None = None,
) -> ModelPatcher:
    """A clone of the model that caches. watch hears the record after every step. Raises FileRefused
    for another model's calibration.
    """
    if calibration is not None:
        calibration.check(model)
    plan = _plan(model, settings)

    def make(guider, sampler, sigmas, latent) -> Run:
        levels = [float(s) for s in sigmas]
        rule, feature = _rule(guider, settings, calibration, levels, latent, plan)
        record = Record(len(levels) - 1, settings.threshold, settings.rule, level=plan)
        return Run(
            levels,
            sampler,
            guider.model_patcher,
            rule,
            settings.reuse,
            STORES[settings.store],
            record,
            watch,
            feature,
        )

    adapter = caching_models.adapter_of(model.model.diffusion_model)
    if plan == "step":
        return _wrapped(model, make, WrappersMP.APPLY_MODEL, around_model)
    return _wrapped(model, make, _hook(adapter), around_blocks(adapter))


def _plan(model: ModelPatcher, settings: TeaCacheSettings) -> str:
    """ "step" or "blocks": where the rule works on this model."""
    wanted = (
        settings.level
        if settings.level != "auto"
        else ("step" if settings.rule == "error" else "blocks")
    )
    return "step" if level_of(model) == "step" or wanted == "step" else "blocks"


def _rule(
    guider,
    settings: TeaCacheSettings,
    calibration: Calibration | None,
    sigmas: list[float],
    latent: torch.Tensor,
    plan: str,
):
    """The rule of one run, and TeaCache's feature: the polynomial is chosen when it is known what
    is drawn.
    """
    if settings.rule == "error" or plan == "step":
        threshold = (
            settings.threshold
            if settings.rule == "error"
            else min(settings.threshold, PRESETS["balanced"])
        )
        return ErrorControl(threshold, tuple(sigmas), settings.reuse, settings.window), ""
    adapter = caching_models.adapter_of(guider.model_patcher.model.diffusion_model)
    if settings.coefficients or (calibration and calibration.polynomial):
        feature = calibration.feature if calibration and calibration.polynomial else adapter.feature
        feature = feature if settings.feature == "auto" else settings.feature
        return (
            TeaCache(
                settings.coefficients or calibration.polynomial, settings.threshold, settings.window
            ),
            feature,
        )
    reference = any(
        "reference_latents" in cond for group in guider.conds.values() for cond in group
    )
    found = shipped(
        guider.model_patcher, reference, latent.shape[-1] * latent.shape[-2] > LARGE_LATENT
    )
    if found is None:
        return TeaCache(IDENTITY, settings.threshold, settings.window), adapter.feature
    window = Window(
        settings.start,
        settings.end,
        max(settings.first, found.first) if settings.first else 0,
        settings.last,
    )
    return TeaCache(found.polynomial, settings.threshold, window), found.feature


def apply_smoothcache(
    model: ModelPatcher,
    settings: SmoothCacheSettings,
    calibration: Calibration | None = None,
    watch: Callable[[Record], None] | None = None,
) -> ModelPatcher:
    """A clone of the model with a static schedule. Without a calibration only a budget works,
    evenly spread. Raises ValueError and FileRefused.
    """
    if calibration is not None:
        calibration.check(model)
    elif settings.budget is None:
        raise ValueError(
            "SmoothCache needs a calibration of this model: run the node Calibrate Cache once, or"
            " give a number of steps to compute."
        )
    adapter = caching_models.adapter_of(model.model.diffusion_model)
    depth = settings.depth if adapter else "step"
    kinds = ["step"] if depth == "step" else caching_parts.kinds(adapter, depth)
    if calibration is not None and settings.budget is None:
        calibration.need(kinds)

    def make(guider, sampler, sigmas, latent) -> Run:
        levels = [float(s) for s in sigmas]
        masks = masks_for(settings, calibration, levels, kinds)
        rule = (
            mask_search.Fixed(tuple(masks["step"]), settings.window)
            if depth == "step"
            else PartSchedule(masks, settings.window)
        )
        return Run(
            levels,
            sampler,
            guider.model_patcher,
            rule,
            settings.reuse,
            STORES[settings.store],
            Record(len(levels) - 1, None, "schedule", level=depth),
            watch,
        )

    if depth == "step":
        return _wrapped(model, make, WrappersMP.APPLY_MODEL, around_model)
    return _wrapped(model, make, _hook(adapter), around_parts(adapter, depth))


def masks_for(
    settings: SmoothCacheSettings,
    calibration: Calibration | None,
    sigmas: list[float],
    kinds: list[str],
) -> dict[str, list[bool]]:
    """kind → which steps compute it, for this run's sigmas (steps + 1 values)."""
    steps = len(sigmas) - 1
    if settings.budget is not None:
        budget = min(max(settings.budget, 2), steps)
        if calibration is None or steps < 2:
            return {"step": mask_search.uniform(steps, budget) if steps >= 2 else [True] * steps}
        return {"step": calibration.mask(budget, sigmas, settings.reuse)}
    if steps < 2:
        return {kind: [True] * steps for kind in kinds}
    return {
        kind: by_alpha(
            calibration.curve(kind).at(calibration.sigmas[:-1], sigmas[:-1]).mean, settings.alpha
        )
        for kind in kinds
    }


def _hook(adapter: caching_models.Adapter) -> str:
    return WrappersMP.DIFFUSION_MODEL if adapter.wrapper else WrappersMP.APPLY_MODEL


def _wrapped(
    model: ModelPatcher, make: Callable[..., Run], hook: str, wrapper: Callable
) -> ModelPatcher:
    """The clone with our wrappers, and none of an earlier application."""
    patched = model.clone()
    for kind in (
        WrappersMP.OUTER_SAMPLE,
        WrappersMP.CALC_COND_BATCH,
        WrappersMP.APPLY_MODEL,
        WrappersMP.DIFFUSION_MODEL,
    ):
        patched.remove_wrappers_with_key(kind, KEY)
    patched.add_wrapper_with_key(WrappersMP.OUTER_SAMPLE, KEY, sampling(make))
    patched.add_wrapper_with_key(WrappersMP.CALC_COND_BATCH, KEY, deferring(KEY))
    patched.add_wrapper_with_key(hook, KEY, wrapper)
    return patched


def notes(
    model: ModelPatcher,
    settings: TeaCacheSettings | SmoothCacheSettings,
    calibration: Calibration | None = None,
    sigmas: torch.Tensor | None = None,
    sampler_name: str | None = None,
) -> list[str]:
    """What an artist should know, a sentence each; nothing here stops a run."""
    name, found = type(model.model.diffusion_model).__name__, []
    if sigmas is not None and len(sigmas) - 1 <= FEW_STEPS:
        found.append(
            f"{len(sigmas) - 1} steps are too few for caching to gain anything; leave it out, or"
            " take fewer steps."
        )
    if isinstance(settings, TeaCacheSettings) and settings.rule == "teacache":
        if _plan(model, settings) == "step":
            found.append(
                f"{name} offers no hooks to its blocks: whole steps are reused, with the rule"
                f" 'error' and a threshold of at most {PRESETS['balanced']:g}."
            )
        elif not (
            settings.coefficients or (calibration and calibration.polynomial) or shipped(model)
        ):
            found.append(
                f"Nobody has published coefficients for {name}: the change of the input is taken as"
                " it is. Calibrate Cache can fit them."
            )
    if (
        isinstance(settings, SmoothCacheSettings)
        and settings.depth != "step"
        and level_of(model) == "step"
    ):
        found.append(f"{name} offers no hooks to its blocks, so whole steps are reused.")
    if calibration is not None and sigmas is not None:
        found += calibration.fits(sigmas, sampler_name)
    return found
