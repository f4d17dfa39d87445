"""One picture that is being cached, and its streams: the calls with and without the prompt, which
pipelines tell apart by `cache_context`, or make one after another at the same time step.

A run begins where the scheduler's steps are set anew. The step of a call is how often its stream
was called before, after the steps that the pipeline leaves out at the start (image to image).
"""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers.hooks.hooks import StateManager

from ..caching.extrapolate import History, Reuse
from ..caching.steps import Record, Step
from .outputs import tensors_of
from .schedules import flow_times, sigmas


@dataclass
class Stream:
    """decider: the rule at work. kept: what was computed, a history for each tensor of the output.
    like: the last output, for its form. parts: the same for parts of the model, by name; computes:
    which kinds of them this step does. feature: TeaCache's F of the last step. shape: of the input.
    """

    decider: Any
    first: bool
    step: Step
    computes: Mapping[str, bool] = field(default_factory=dict)
    kept: list[History] = field(default_factory=list)
    like: Any = None
    parts: dict[str, tuple[list[History], Any]] = field(default_factory=dict)
    feature: torch.Tensor | None = None
    shape: tuple[int, ...] = ()

    @property
    def nodes(self) -> list[float]:
        """The times of the computed steps that a guess would be made from."""
        return self.kept[0].nodes if self.kept else []

    def forget(self) -> None:
        """Another size: nothing that was kept can be used."""
        self.kept, self.parts, self.like, self.feature = [], {}, None, None
        self.decider.computed()


class Run:
    """See the module. rule: what has .decider(); reuse: how guesses are made; feature: TeaCache's
    F.
    """

    def __init__(self, scheduler: Any, rule: Any, reuse: Reuse, record: Record, feature: str = ""):
        self.timesteps = scheduler.timesteps  # held, so that another run's cannot be the same
        self.times, self.sigmas = flow_times(scheduler), sigmas(scheduler)
        self.begin = int(getattr(scheduler, "begin_index", None) or 0)
        self.rule, self.reuse, self.record, self.feature = rule, reuse, record, feature
        self.streams: dict[tuple, Stream] = {}
        self.now: Stream | None = None
        self._calls: Counter[tuple] = Counter()

    @property
    def total(self) -> int:
        return len(self.times) - 1

    def enter(self, call: tuple, module: torch.nn.Module, x: torch.Tensor) -> Stream:
        """The stream of this call, at its next step; x: what the model reads. A second transformer,
        for low noise, goes on counting where the first one stopped.
        """
        index = min(self.begin + self._calls[call], self.total - 1)
        self._calls[call] += 1
        step, key = Step(index, self.total, self.sigmas[index], self.times[index]), (*call, module)
        if key not in self.streams:
            first = all(known[:-1] == call for known in self.streams)
            self.streams[key] = Stream(self.rule.decider(), first, step)
        stream = self.streams[key]
        stream.step = step
        if stream.shape not in ((), tuple(x.shape)):
            stream.forget()
        stream.shape = tuple(x.shape)
        self.now, self.record.done = stream, max(self.record.done, index + 1)
        return stream


class Runs:
    """The runs of one transformer, one after another. make: a new one, by the scheduler and what
    the model reads first.
    """

    def __init__(self, scheduler_of: Callable[[], Any], make: Callable[[Any, torch.Tensor], Run]):
        self.scheduler_of, self.make = scheduler_of, make
        self.contexts = StateManager(dict)
        self.run: Run | None = None
        self._asked: tuple[float, int] | None = None

    @property
    def now(self) -> Stream:
        """The stream of the call that is under way."""
        assert self.run is not None and self.run.now is not None
        return self.run.now

    def enter(self, module: torch.nn.Module, args: tuple, kwargs: dict) -> Stream:
        """The stream of this call of the transformer, in a new run where one has begun."""
        scheduler = self.scheduler_of()
        if scheduler.timesteps is None or not len(scheduler.timesteps):
            raise ValueError("The pipeline's scheduler has no steps; call its set_timesteps first.")
        given = arguments(module, args, kwargs)
        x = tensors_of(given)[0]
        if self.run is None or self.run.timesteps is not scheduler.timesteps:
            self.run, self._asked = self.make(scheduler, x), None
        return self.run.enter(self._key(given), module, x)

    def _key(self, given: dict) -> tuple:
        try:
            return (self.contexts.context.name,)
        except ValueError:  # the pipeline tells no contexts
            time = given.get("timestep", given.get("t"))
            level = float(torch.as_tensor(time).flatten()[0])
            times = self._asked[1] + 1 if self._asked and self._asked[0] == level else 0
            self._asked = (level, times)
            return ("", times)


def arguments(module: torch.nn.Module, args: tuple, kwargs: dict) -> dict[str, Any]:
    """A call's arguments by name."""
    names = list(inspect.signature(type(module).forward).parameters)[1:]
    return dict(zip(names, args, strict=False)) | kwargs


def kept_of(tensors: list[torch.Tensor], histories: list[History], reuse: Reuse) -> list[History]:
    """As many histories as tensors, new ones where their number has changed."""
    return histories if len(histories) == len(tensors) else [History(reuse) for _ in tensors]
