"""One sampling run that is being cached: its schedule, its streams of conditioning, its record.
Made when sampling starts, dropped when it ends.

It lives in the transformer_options of that run's guider alone; nothing stays on a model. Streams
are told apart by ComfyUI's uuid of the conditioning, the context window, what other nodes replace
in this call (the second pass of SLG, PAG), the LoRA hooks in force, and how often the model was
already asked at this noise level (tiles, samplers with two stages): each has a history and a rule's
state of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from comfy.model_patcher import ModelPatcher, create_model_options_clone
from comfy.model_sampling import CONST
from comfy.patcher_extension import WrappersMP

from ....accel.caching.extrapolate import History, Reuse
from ....accel.caching.flow_time import FlowTime
from ....accel.caching.steps import Decision, Record, Step
from ..host import keys
from ..host.samplers import sampler_name
from .controlnet import Deferred

KEY = keys.CACHING
# the kinds of wrappers by which a model caches
_WRAPPERS = (
    WrappersMP.OUTER_SAMPLE,
    WrappersMP.CALC_COND_BATCH,
    WrappersMP.APPLY_MODEL,
    WrappersMP.DIFFUSION_MODEL,
)

# Samplers that ask the model once a step: the step is known by counting, without reading a noise
# level back from the GPU.
ONE_CALL_A_STEP = {
    "euler",
    "euler_ancestral",
    "lms",
    "ddpm",
    "lcm",
    "dpmpp_2m",
    "dpmpp_2m_sde",
    "dpmpp_3m_sde",
    "ipndm",
    "deis",
    "res_multistep",
    "gradient_estimation",
}

# Samplers that add fresh noise: the velocity jumps with it from step to step, the picture that it
# points to does not. Parts of their names.
NOISY = ("ancestral", "sde", "lcm", "ddpm", "seeds", "sa_solver")


@dataclass
class Stream:
    """One stream of conditioning. decider: the rule at work on it. history: what whole steps
    computed. parts: the same for each part of the model; sizes: of what each was computed from.
    feature: TeaCache's F of the last step. shape: of the latent, without the batch of other
    streams.
    """

    decider: Any
    history: History
    first: bool = False
    feature: torch.Tensor | None = None
    shape: tuple[int, ...] = ()
    parts: dict[tuple, History] = field(default_factory=dict)
    sizes: dict[tuple, tuple[int, ...]] = field(default_factory=dict)

    def forget(self) -> None:
        """Nothing that was kept can be used any more: the resolution has changed in mid-run."""
        self.history.clear()
        self.parts.clear()
        self.sizes.clear()
        self.feature = None
        self.decider.computed()


@dataclass(eq=False)
class Run:
    """sigmas: steps + 1; flow: their time. rule: what has .decider(). store: where kept tensors
    live (None: where they are made). feature: TeaCache's F.
    """

    sigmas: list[float]
    sampler: object
    patcher: object
    rule: Any
    reuse: Reuse
    store: str | None
    record: Record
    watch: Callable[[Record], None] | None = None
    feature: str = ""
    flow: FlowTime = FlowTime()
    streams: dict[tuple, Stream] = field(default_factory=dict, init=False)
    steps_done: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        self._asked: dict[tuple, tuple[float, int]] = {}
        self._times = self.flow.times(self.sigmas)
        self.noisy = adds_noise(self.sampler)
        self.counted = sampler_name(self.sampler) in ONE_CALL_A_STEP and not _churned(self.sampler)

    @property
    def total(self) -> int:
        return len(self.sigmas) - 1

    def step(self, sigma: torch.Tensor) -> Step:
        """The step of this call. Samplers of several stages are placed by their noise level, which
        waits for the GPU.
        """
        if self.counted:
            index = min(self.steps_done, self.total - 1)
            return Step(index, self.total, self.sigmas[index], self._times[index])
        level = float(sigma.max())
        time = self.flow.time(level)
        index = min(range(self.total), key=lambda i: abs(self._times[i] - time))
        return Step(index, self.total, level, time)

    def streams_of(self, options: dict, step: Step, x: torch.Tensor) -> list[Stream]:
        """The streams that this call's batch x (latents) is made of, in order."""
        uuids = options.get("uuids") or [None]
        shape = (x.shape[0] // len(uuids), *x.shape[1:])
        call = (_window(options), _replaced(options), _hooks(self.patcher), str(x.device))
        times = self._asked_before((tuple(uuids), *call), step.sigma)
        streams = []
        for position, uuid in enumerate(uuids):
            key = (uuid, uuids[:position].count(uuid), times, *call)
            if key not in self.streams:
                self.streams[key] = Stream(
                    self.rule.decider(), History(self.reuse, self.store), first=not self.streams
                )
            stream = self.streams[key]
            if stream.shape != shape:
                if stream.shape:
                    stream.forget()
                stream.shape = shape
            streams.append(stream)
        return streams

    def _asked_before(self, call: tuple, sigma: float) -> int:
        last, times = self._asked.get(call, (None, 0))
        times = times + 1 if last == sigma else 0
        self._asked[call] = (sigma, times)
        return times

    def commit(self, step: Step, streams: list[Stream], decisions: list[Decision]) -> bool:
        """One batch is computed or reused as a whole: computed if any of its streams asks for it.
        Records, and returns whether to compute.
        """
        compute = any(decision.compute for decision in decisions)
        for stream, decision in zip(streams, decisions, strict=True):
            if compute and not decision.compute:
                stream.decider.computed()
                decision = Decision(True, "batch", decision.change)
            self.record.add(step, decision, stream.first)
        return compute

    def stepped(self) -> None:
        """The sampler has finished a step."""
        self.steps_done += 1
        self.record.done = min(self.steps_done, self.total)
        if self.watch:
            self.watch(self.record)


def adds_noise(sampler: object) -> bool:
    """Whether a SAMPLER draws fresh noise while it samples."""
    name = sampler_name(sampler)
    return _churned(sampler) or any(word in name for word in NOISY)


def _churned(sampler: object) -> bool:
    return bool(getattr(sampler, "extra_options", {}).get("s_churn"))


def flow_time(model: ModelPatcher) -> FlowTime:
    """The time of a model's noise levels, by how ComfyUI mixes its noise with data."""
    levels = model.get_model_object("model_sampling")
    return FlowTime(
        mixes=isinstance(levels, CONST),
        noise=float(getattr(levels, "noise_scale", 1.0)),
        data=float(getattr(levels, "sigma_data", 1.0)),
    )


def sampling(make: Callable[..., Run]) -> Callable:
    """An OUTER_SAMPLE wrapper that gives each sampling run a Run of its own: make(guider, sampler,
    sigmas, latent).
    """

    def wrapper(executor, *args, **kwargs):
        guider, sampler, sigmas = executor.class_obj, args[2], args[3]
        run, before = make(guider, sampler, sigmas, args[1]), guider.model_options
        args = list(args)
        if len(args) > 5:
            args[5] = _counting(args[5], run)
        else:
            kwargs["callback"] = _counting(kwargs.get("callback"), run)
        guider.model_options = create_model_options_clone(before)
        guider.model_options.setdefault("transformer_options", {})[KEY] = run
        try:
            return executor(*args, **kwargs)
        finally:
            guider.model_options = before
            run.streams.clear()

    return wrapper


def _counting(callback: Callable | None, run: Run) -> Callable:
    def counted(*args, **kwargs):
        if callback is not None:
            callback(*args, **kwargs)
        run.stepped()

    return counted


def uncached(model: ModelPatcher) -> ModelPatcher:
    """A clone without the caching that a node before this one may have put on it."""
    model = model.clone()
    for kind in _WRAPPERS:
        model.remove_wrappers_with_key(kind, KEY)
    return model


@dataclass(frozen=True)
class ModelCall:
    """One call of the model in a cached run. options: its transformer_options; streams: those that
    its batch is made of, in order.
    """

    run: Run
    step: Step
    streams: list[Stream]
    options: dict


def model_call(args: Sequence, kwargs: dict, sigma: torch.Tensor | None = None) -> ModelCall | None:
    """What a wrapper's arguments are a call of; None where they belong to no cached run.

    sigma: the noise level where the wrapper is given it; else it is that of transformer_options,
        which models pass in different places.
    """
    dicts = (
        value
        for value in (*args, *kwargs.values())
        if isinstance(value, dict) and not isinstance(value, Deferred)
    )
    options = next((value for value in dicts if isinstance(value.get(KEY), Run)), None)
    # the AR sampler counts on every call: each moves on the keys and values that the model keeps
    if options is None or "ar_state" in options:
        return None
    run: Run = options[KEY]
    step = run.step(options["sigmas"] if sigma is None else sigma)
    return ModelCall(run, step, run.streams_of(options, step, args[0]), options)


def substitute(args: Sequence, kwargs: dict, old: object, new: object) -> tuple[list, dict]:
    """A call's arguments with one object, found by identity, in another's place."""
    return [new if value is old else value for value in args], {
        name: new if value is old else value for name, value in kwargs.items()
    }


def deferred_control(args: Sequence, kwargs: dict) -> Deferred | None:
    """The ControlNet result of a call, not computed yet; None without a ControlNet."""
    return next((value for value in (*args, *kwargs.values()) if isinstance(value, Deferred)), None)


def _window(options: dict) -> tuple | None:
    window = options.get("context_window")
    return tuple(window.index_list) if hasattr(window, "index_list") else None


def _name(function: object) -> str:
    module = getattr(function, "__module__", "")
    return f"{module}.{getattr(function, '__qualname__', type(function).__qualname__)}"


def _replaced(options: dict) -> frozenset:
    """What other nodes replace in this call: names, not identities, since some make new closures
    each step.
    """
    replaced: set[tuple] = set()
    for where, entries in options.get("patches_replace", {}).items():
        replaced |= {(where, str(key), _name(function)) for key, function in entries.items()}
    for where, functions in options.get("patches", {}).items():
        replaced |= {(where, _name(function)) for function in functions}
    override = options.get("optimized_attention_override")
    if override:
        replaced.add(("attention", _name(override)))
    return frozenset(replaced)


def _hooks(patcher: object) -> tuple:
    """The LoRA hooks in force with their strengths: a keyframe that changes one begins a new
    stream.
    """
    group = getattr(patcher, "current_hooks", None)
    if group is None:
        return ()
    return tuple((id(hook.hook_ref), hook.strength) for hook in group.hooks)
