"""Uncached pictures of a pipeline, watched: errors of reusing its attention and feed-forward layers
k steps later (SmoothCache's curves), and inner products of the velocities that its scheduler was
given, from which steps of any budget are placed (accel/caching/mask_search.py).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from diffusers.hooks.hooks import HookRegistry, ModelHook

from ..caching.calibration_file import Calibration
from ..caching.calibration_recorder import CalibrationRecorder, sparse
from ..caching.extrapolate import Reuse
from ..caching.smoothcache import FARTHEST
from ..caching.steps import Record
from .apply import NAME, pipeline_parts
from .fingerprint import fingerprint, weights_of
from .outputs import tensors_of
from .parts import parts
from .run import Run, Runs, Stream
from .schedules import flow_of, sigmas, velocity


def calibrate(
    pipe: Any, calls: Sequence[Mapping[str, Any]], name: str = "", farthest: int = FARTHEST
) -> Calibration:
    """See `nibble.calibrate_cache`."""
    transformers, scheduler_of = pipeline_parts(pipe)
    if not calls:
        raise ValueError("A calibration needs a picture: give the arguments of at least one call.")
    watch = _Watch(scheduler_of, farthest)
    with _hooked(transformers, watch), _stepping(scheduler_of(), watch):
        for call in calls:
            pipe(**call)
            watch.recorder.next_prompt()
            watch.index = 0
    scheduler, model = scheduler_of(), transformers[0]
    run = watch.runs.run
    assert run is not None
    return Calibration(
        model={
            "class": type(model).__name__,
            "name": name or type(model).__name__,
            "weights": weights_of(model),
            "fingerprint": fingerprint(model),
        },
        run={
            "sampler": type(scheduler).__name__,
            "steps": run.total,
            "sigmas": sigmas(scheduler),
            "flow": flow_of(scheduler).to_json(),
            "shift": None,
            "cfg": float(calls[0].get("guidance_scale", 1.0)),
            "latent": watch.latent,
            "prompts": len(calls),
            "seed": 0,
        },
        teacache=None,
        curves=watch.recorder.curves(),
        grams=np.stack(watch.recorder.grams),
    )


class _ComputeAll:
    """The rule of the recorded run, which is uncached."""

    def decider(self) -> _ComputeAll:
        return self

    def computed(self) -> None:
        """Nothing to start again."""


class _Watch:
    """What is recorded. index: of the scheduler's next step."""

    def __init__(self, scheduler_of: Any, farthest: int):
        self.farthest, self.index, self.latent = farthest, 0, [0]
        self.runs = Runs(scheduler_of, self._run)
        self.seen: dict[tuple[int, str], list] = {}

    def _run(self, scheduler: Any, x: torch.Tensor) -> Run:
        run = Run(scheduler, _ComputeAll(), Reuse(0), Record(len(scheduler.timesteps)))
        if run.total <= self.farthest + 1:
            raise ValueError(
                f"{run.total} steps are too few to calibrate caching with; take the number of steps"
                f" that you draw with, at least {self.farthest + 2}."
            )
        if not hasattr(self, "recorder"):
            self.recorder = CalibrationRecorder(run.total, self.farthest, ("step", "sublayer"), "")
        self.seen.clear()
        return run

    def part(self, stream: Stream, kind: str, name: str, output: Any) -> None:
        """A layer's output at this step."""
        for place, value in enumerate(tensors_of(output)):
            seen = self.seen.setdefault((id(stream), f"{name} {place}"), [])
            piece = sparse(value.detach()).clone()
            self.recorder.compare(kind, seen, stream.step, piece)


class _Root(ModelHook):
    """At the transformer."""

    _is_stateful = True

    def __init__(self, watch: _Watch):
        super().__init__()
        self.watch, self.contexts = watch, watch.runs.contexts

    def pre_forward(self, module: torch.nn.Module, *args: Any, **kwargs: Any) -> tuple:
        """Finds the step."""
        self.watch.runs.enter(module, args, kwargs)
        return args, kwargs

    def reset_state(self, module: torch.nn.Module) -> torch.nn.Module:
        return module


class _Part(ModelHook):
    """At a layer."""

    def __init__(self, watch: _Watch, kind: str, name: str):
        super().__init__()
        self.watch, self.kind, self.name = watch, kind, name

    def post_forward(self, module: torch.nn.Module, output: Any) -> Any:
        """Compares it with those of earlier steps."""
        self.watch.part(self.watch.runs.now, self.kind, self.name, output)
        return output


@contextmanager
def _hooked(transformers: Sequence[torch.nn.Module], watch: _Watch) -> Iterator[None]:
    for transformer in transformers:
        hooks: dict[torch.nn.Module, ModelHook] = {transformer: _Root(watch)}
        hooks |= {layer: _Part(watch, kind, name) for kind, name, layer in parts(transformer)}
        HookRegistry.check_if_exists_or_initialize(transformer).remove_hook(NAME)
        for module, hook in hooks.items():
            HookRegistry.check_if_exists_or_initialize(module).register_hook(hook, NAME)
    try:
        yield
    finally:
        for transformer in transformers:
            HookRegistry.check_if_exists_or_initialize(transformer).remove_hook(NAME)


@contextmanager
def _stepping(scheduler: Any, watch: _Watch) -> Iterator[None]:
    """The scheduler tells what it is given: the prediction after guidance."""
    own = scheduler.step

    def step(output: torch.Tensor, timestep: Any, sample: torch.Tensor, *args: Any, **more: Any):
        watch.latent = list(sample.shape)
        found = velocity(scheduler, output, sample, watch.index)
        watch.recorder.velocities.setdefault(watch.index, found.float().cpu())
        watch.index += 1
        return own(output, timestep, sample, *args, **more)

    scheduler.step = step
    try:
        yield
    finally:
        del scheduler.step
