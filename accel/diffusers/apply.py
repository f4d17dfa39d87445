"""`nibble.cache`: hooks on a pipeline's transformers, by the rules of accel/caching."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from diffusers.hooks.hooks import HookRegistry, ModelHook

from ..caching import mask_search, smoothcache
from ..caching.calibration_file import Calibration
from ..caching.error_control import LOW_BIT_PRESETS, PRESETS, ErrorControl
from ..caching.extrapolate import Reuse
from ..caching.steps import Record, Window
from .all_blocks import Stack
from .families import family_of
from .fingerprint import fingerprint, is_low_bit
from .parts import Part, Root, Schedule, parts, shares
from .published import teacache
from .run import Run, Runs
from .schedules import flow_times, is_flow
from .whole_steps import WholeSteps

NAME = "nibble_cache"
RULES = ("error", "budget", "smoothcache", "teacache")
# makes a run of the scheduler and what the model reads first
Make = Callable[[Any, torch.Tensor], Run]


class Caching:
    """A pipeline that caches. record: what happened in the last picture (a `Record`: computed,
    reused, calls, computed_calls, work); None before the first.
    """

    def __init__(self, transformers: list[torch.nn.Module], runs: Runs):
        self._transformers, self._runs = transformers, runs

    @property
    def record(self) -> Record | None:
        return None if self._runs.run is None else self._runs.run.record

    def remove(self) -> None:
        """Takes the hooks off; the transformer's forward is its own again."""
        for transformer in self._transformers:
            HookRegistry.check_if_exists_or_initialize(transformer).remove_hook(NAME)

    def __enter__(self) -> Caching:
        return self

    def __exit__(self, *raised: object) -> None:
        self.remove()


def cache(  # noqa: PLR0913 (a script's keywords)
    pipe: Any,
    rule: str = "error",
    *,
    preset: str = "balanced",
    threshold: float | None = None,
    budget: int | None = None,
    alpha: float = 0.1,
    calibration: Calibration | None = None,
    coefficients: str | Sequence[float] = "auto",
    order: int | None = None,
    window: Window = Window(),  # noqa: B008 (it cannot be changed)
    scheduler: Any = None,
) -> Caching:
    """See `nibble.cache`."""
    transformers, scheduler_of = pipeline_parts(pipe, scheduler)
    if rule not in RULES:
        raise ValueError(f"rule is one of {', '.join(RULES)}, not {rule!r}.")
    own = 0 if rule == "teacache" else 1
    reuse = Reuse(own if order is None else order)
    if calibration is not None:
        calibration.check(fingerprint(transformers[0]))
    if threshold is not None and threshold < 0:
        raise ValueError(f"threshold is 0 (reuse nothing) or more, not {threshold:g}.")
    if preset not in PRESETS:
        raise ValueError(f"preset is one of {', '.join(PRESETS)}, not {preset!r}.")
    if rule == "error":
        make = _make(rule, reuse, _error(transformers[0], preset, threshold, reuse, window))
    elif rule == "budget":
        fitted = calibration if order is None else None
        make = _make(rule, reuse, _budget(budget, calibration, reuse, window), fitted)
    elif rule == "smoothcache":
        make = _make(rule, reuse, _smoothcache(transformers[0], calibration, alpha, window))
    else:
        reference = "Kontext" in type(pipe).__name__
        rule_of = teacache(transformers[0], coefficients, preset, threshold, reference)
        make = _watching(rule_of, reuse, window)
    runs = Runs(scheduler_of, make)
    for transformer in transformers:
        hooks = _hooks(transformer, rule, runs, reuse)
        HookRegistry.check_if_exists_or_initialize(transformer).remove_hook(NAME)
        for module, hook in hooks.items():
            HookRegistry.check_if_exists_or_initialize(module).register_hook(hook, NAME)
    return Caching(transformers, runs)


def _make(rule: str, reuse: Reuse, rule_of: Callable, fitted: Calibration | None = None) -> Make:
    """Runs of a rule that the times of the steps are enough for. fitted: what a mask's guesses are
    fitted on, where the transformer returns the velocities that it holds.
    """

    def make(scheduler: Any, x: torch.Tensor) -> Run:
        times = flow_times(scheduler)
        decides, guesses = rule_of(times), reuse
        if fitted is not None and is_flow(scheduler):
            name = type(scheduler).__name__
            guesses = fitted.guesses(decides.steps(times), times, name, reuse)
        return Run(scheduler, decides, guesses, Record(len(times) - 1, kind=rule))

    return make


def _watching(rule_of: Callable, reuse: Reuse, window: Window) -> Make:
    """Runs of TeaCache's rule."""

    def make(scheduler: Any, x: torch.Tensor) -> Run:
        rule, feature = rule_of(x, window)
        record = Record(len(flow_times(scheduler)) - 1, rule.threshold, "teacache")
        return Run(scheduler, rule, reuse, record, feature)

    return make


def _hooks(
    transformer: torch.nn.Module, rule: str, runs: Runs, reuse: Reuse
) -> Mapping[torch.nn.Module, ModelHook]:
    """module → what stands at it."""
    if rule == "teacache":
        return Stack(runs, family_of(transformer)).hooks(transformer)
    if rule == "smoothcache":
        hooks: dict[torch.nn.Module, ModelHook] = {
            layer: Part(runs, kind, name, reuse) for kind, name, layer in parts(transformer)
        }
        return hooks | {transformer: Root(runs, shares(transformer))}
    return {transformer: WholeSteps(runs)}


def pipeline_parts(
    pipe: Any, scheduler: Any = None
) -> tuple[list[torch.nn.Module], Callable[[], Any]]:
    """The transformers, and how to ask for the scheduler: a pipeline may be given another one."""
    if isinstance(pipe, torch.nn.Module):
        if scheduler is None:
            raise ValueError("A transformer alone has no steps: give its scheduler, too.")
        return [pipe], lambda: scheduler
    names = ("transformer", "transformer_2")
    found = [part for name in names if (part := getattr(pipe, name, None)) is not None]
    if not found:
        raise ValueError(
            f"{type(pipe).__name__} has no transformer; caching is for diffusion transformers."
        )
    return found, lambda: pipe.scheduler


def _error(
    model: torch.nn.Module, preset: str, threshold: float | None, reuse: Reuse, window: Window
) -> Callable:
    if threshold is None:
        threshold = (LOW_BIT_PRESETS if is_low_bit(model) else PRESETS)[preset]
    allowed = threshold
    return lambda times: ErrorControl(allowed, times, reuse, window)


def _budget(
    budget: int | None, calibration: Calibration | None, reuse: Reuse, window: Window
) -> Callable:
    if budget is None or budget < 2:
        raise ValueError("The rule 'budget' needs the number of steps to compute, at least 2.")
    wanted = budget

    def rule_of(times: tuple[float, ...]) -> mask_search.StepMask:
        steps = len(times) - 1
        count = min(wanted, steps)
        if steps < 2:
            mask = [True] * steps
        elif calibration is None:
            mask = mask_search.uniform(steps, count)
        else:
            mask = calibration.mask(count, times, reuse)
        return mask_search.StepMask(tuple(mask), window)

    return rule_of


def _smoothcache(
    model: torch.nn.Module, calibration: Calibration | None, alpha: float, window: Window
) -> Callable:
    if calibration is None:
        raise ValueError(
            "SmoothCache needs a calibration of this model: nibble.calibrate_cache makes one."
        )
    kinds = list(shares(model))
    calibration.need(kinds)

    def rule_of(times: tuple[float, ...]) -> Schedule:
        masks: Mapping[str, list[bool]] = {
            kind: smoothcache.greedy_mask(
                calibration.curves[kind].at(calibration.times[:-1], times[:-1]).mean, alpha
            )
            for kind in kinds
        }
        return Schedule(masks, window)

    return rule_of
