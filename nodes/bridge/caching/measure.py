"""One uncached run over the user's prompts, with the user's sampler and schedule, that teaches
everything the caching rules can use:

- the errors of reusing each kind of block and sub-layer k steps later (SmoothCache's curves), on a
  fixed subset of tokens;
- the change of the model's modulated input against the change of what its blocks add (TeaCache's
  polynomial);
- the inner products of the velocities that were integrated, from which masks of any budget are
  found without the model (accel/caching/mask_search.py).
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field

import comfy.sample
import comfy.samplers
import numpy as np
import torch
from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import WrappersMP

from ....accel.caching.extrapolate import Reuse
from ....accel.caching.smoothcache import FARTHEST, Recorder
from ....accel.caching.steps import Record, Step
from ....accel.caching.teacache import distance, fit
from ..host.fingerprint import fingerprint, weights_of
from ..host.progress import Progress
from ..host.samplers import sampler_name
from . import models as caching_models
from .apply import shipped
from .calibration_file import Calibration
from .hooks import Place, places, shadow, visiting
from .models import FEATURES
from .run import KEY, Run, Stream, options_of, sampling, substitute
from .wrap_sublayers import ShadowedPart

TOKENS = 256  # of each part's output are compared; the mean error over more of them is the same
DEPTHS = ("step", "block", "sublayer")


@dataclass
class Notebook:
    """What the run writes down. recorders: kind → errors; points: TeaCache's (change of F, change
    of the residual); velocities: of one prompt.
    """

    steps: int
    farthest: int
    depths: tuple[str, ...]
    feature: str
    recorders: dict[str, Recorder] = field(default_factory=dict)
    points: list[tuple[float, float]] = field(default_factory=list)
    velocities: dict[int, torch.Tensor] = field(default_factory=dict)
    grams: list[np.ndarray] = field(default_factory=list)

    def compare(
        self, kind: str, seen: list[tuple[int, torch.Tensor]], step: Step, value: torch.Tensor
    ) -> None:
        """Adds the errors of giving this step the values of earlier ones, and keeps this one; a
        sampler's second look at a step is passed over.
        """
        if seen and seen[-1][0] == step.index:
            return
        recorder = self.recorders.setdefault(kind, Recorder(self.steps, self.farthest))
        norm = value.abs().float().mean()
        for before, old in seen:
            recorder.add(before, step.index, float((value - old).abs().float().mean() / norm))
        seen.append((step.index, value))
        del seen[: -self.farthest]

    def next_prompt(self) -> None:
        """Turns the velocities of a finished picture into inner products, and into errors of whole
        steps.
        """
        if sorted(self.velocities) != list(range(self.steps)):
            raise ValueError(
                f"The sampler visited {len(self.velocities)} of {self.steps} steps; calibrate with"
                " a sampler that visits each, such as euler."
            )
        flat = torch.stack([self.velocities[i].flatten() for i in range(self.steps)]).double()
        gram = flat @ flat.T
        self.grams.append((gram / gram.diagonal().mean()).numpy())
        seen: list = []
        for i in range(self.steps):
            self.compare("step", seen, Step(i, self.steps, 0.0), flat[i])
        self.velocities = {}


class _Rule:
    """Decides nothing: the recording run is uncached."""

    def stream(self):
        return self

    def computed(self) -> None:
        """Nothing to start again."""


def calibrate(
    model: ModelPatcher,
    prompts: list,
    negative: list | None,
    cfg: float,
    sampler: object,
    sigmas: torch.Tensor,
    latent: dict,
    seed: int,
    progress: Progress,
    k_max: int = FARTHEST,
    depths: tuple[str, ...] = DEPTHS,
    order: int = 2,
    model_name: str = "",
) -> Calibration:
    """Draws each entry of a CONDITIONING once, from its own noise. ValueError for a schedule too
    short to learn from.
    """
    steps = len(sigmas) - 1
    if steps <= k_max + 1:
        raise ValueError(
            f"{steps} steps are too few to calibrate caching with; use the number of steps that"
            f" you sample with, at least {k_max + 2}."
        )
    adapter = caching_models.adapter_of(model.model.diffusion_model)
    published = shipped(model)
    feature = published.feature if published else (adapter.feature if adapter else "")
    book = Notebook(steps, k_max, depths, feature)
    recording, samples = (
        _recording(model, book, adapter),
        comfy.sample.fix_empty_latent_channels(model, latent["samples"][:1]),
    )
    for number, prompt in enumerate(prompts):
        guider = comfy.samplers.CFGGuider(recording)
        guider.set_conds([prompt], negative or [[torch.zeros_like(prompt[0]), prompt[1]]])
        guider.set_cfg(cfg)

        def stepped(step, x0, x, total, number=number):
            progress(
                number * steps + step + 1,
                len(prompts) * steps,
                f"prompt {number + 1} of {len(prompts)}",
            )

        noise = comfy.sample.prepare_noise(samples, seed + number)
        guider.sample(
            noise, samples, sampler, sigmas, callback=stepped, disable_pbar=True, seed=seed + number
        )
        book.next_prompt()
    facts = {
        "class": type(model.model.diffusion_model).__name__,
        "fingerprint": fingerprint(model),
        "name": model_name or type(model.model).__name__,
        "weights": weights_of(model),
    }
    run = {
        "sampler": sampler_name(sampler),
        "steps": steps,
        "sigmas": [float(s) for s in sigmas],
        "shift": _shift(model),
        "cfg": cfg,
        "latent": list(samples.shape),
        "prompts": len(prompts),
        "seed": seed,
    }
    curves = {kind: recorder.curve() for kind, recorder in book.recorders.items()}
    return Calibration(facts, run, _polynomial(book, order), curves, np.stack(book.grams))


def _shift(model: ModelPatcher) -> float | None:
    found = getattr(model.get_model_object("model_sampling"), "shift", None)
    return float(found) if isinstance(found, (int, float)) else None


def _polynomial(book: Notebook, order: int) -> dict | None:
    if len(book.points) <= order + 1:
        return None
    found = fit([x for x, _ in book.points], [y for _, y in book.points], order)
    return {
        "feature": book.feature,
        "coefficients": list(found.coefficients),
        "x_min": found.x_min,
        "x_max": found.x_max,
        "r2": found.r2,
        "points": [[round(x, 6), round(y, 6)] for x, y in book.points],
    }


def _recording(
    model: ModelPatcher, book: Notebook, adapter: caching_models.Adapter | None
) -> ModelPatcher:
    """A clone whose runs write into the notebook; other caching on the model is left out."""

    def make(guider, run_sampler, run_sigmas, run_latent) -> Run:
        levels = [float(s) for s in run_sigmas]
        return Run(
            levels, run_sampler, guider.model_patcher, _Rule(), Reuse(0), None, Record(book.steps)
        )

    def predicted(executor, *args, **kwargs):
        """PREDICT_NOISE: the velocity that the sampler integrates, after guidance."""
        run, x, sigma = args[2]["transformer_options"][KEY], args[0], args[1]
        denoised = executor(*args, **kwargs)
        level = sigma.reshape(-1, *[1] * (x.ndim - 1))
        book.velocities.setdefault(run.step(sigma).index, ((x - denoised) / level).float().cpu())
        return denoised

    patched = model.clone()
    for kind in (
        WrappersMP.OUTER_SAMPLE,
        WrappersMP.CALC_COND_BATCH,
        WrappersMP.APPLY_MODEL,
        WrappersMP.DIFFUSION_MODEL,
    ):
        patched.remove_wrappers_with_key(kind, KEY)
    patched.add_wrapper_with_key(WrappersMP.OUTER_SAMPLE, KEY, sampling(make))
    patched.add_wrapper_with_key(WrappersMP.PREDICT_NOISE, KEY, predicted)
    if adapter is not None and set(book.depths) & {"block", "sublayer"}:
        hook = WrappersMP.DIFFUSION_MODEL if adapter.wrapper else WrappersMP.APPLY_MODEL
        patched.add_wrapper_with_key(hook, KEY, _around_recorded(book, adapter))
    return patched


def _around_recorded(book: Notebook, adapter: caching_models.Adapter) -> Callable:
    def wrapper(executor, *args, **kwargs):
        options = options_of(args, kwargs)
        if options is None:
            return executor(*args, **kwargs)
        run: Run = options[KEY]
        step = run.step(options["sigmas"])
        owner = executor.class_obj
        network = owner if adapter.wrapper else owner.diffusion_model
        visit = RecordingVisit(book, run.streams_of(options, step, args[0]), step, adapter)
        with ExitStack() as stack:
            hooked = stack.enter_context(visiting(network, adapter, options, visit))
            if "sublayer" in book.depths:
                visit.shadow_parts(stack, network)
            args, kwargs = substitute(args, kwargs, options, hooked)
            out = executor(*args, **kwargs)
        visit.keep_points()
        return out

    return wrapper


class RecordingVisit:
    """One call of the model that is only looked at. Also what a ShadowedPart reports to."""

    def __init__(
        self, book: Notebook, streams: list[Stream], step: Step, adapter: caching_models.Adapter
    ):
        self.book, self.streams, self.step, self.adapter = book, streams, step, adapter
        self.feature: torch.Tensor | None = None
        self.entered: torch.Tensor | None = None
        self.left: torch.Tensor | None = None

    def block(
        self,
        place: Place,
        image: torch.Tensor,
        text: torch.Tensor | None,
        arguments: dict,
        compute: Callable,
    ):
        before = _sparse(image).clone(), None if text is None else _sparse(text).clone()
        if place.first:
            self.entered = image.clone()
            if self.book.feature in FEATURES:
                found = FEATURES[self.book.feature](
                    place.module, image, arguments.get(place.blocks.vector), arguments
                )
                self.feature = (image if found is None else found).detach().clone()
        out = compute()
        if place.first and self.book.feature == "first_residual":
            self.feature = out[0] - self.entered
        if place.last:
            self.left = out[0]
        if "block" in self.book.depths or "sublayer" in self.book.depths and not place.blocks.parts:
            self._note(place.blocks.kind, (*place.key, "img"), _sparse(out[0]) - before[0])
            if text is not None and out[1] is not None and out[1].shape == text.shape:
                self._note(place.blocks.kind, (*place.key, "txt"), _sparse(out[1]) - before[1])
        return out

    def shadow_parts(self, stack: ExitStack, network: torch.nn.Module) -> None:
        """The gates of caching_parts, reporting here."""
        for place in places(network, self.adapter):
            for name in place.blocks.parts:
                module = getattr(place.module, name, None)
                if module is not None:
                    shadow(
                        stack,
                        place.module,
                        name,
                        ShadowedPart(self, f"{place.blocks.kind}.{name}", place.index, module),
                    )

    def part(self, kind: str, index: int, compute: Callable, like: torch.Tensor):
        out = compute()
        for i, value in enumerate(out if isinstance(out, tuple) else (out,)):
            self._note(kind, (kind, index, i), _sparse(value), batch=0)
        return out

    def _note(self, kind: str, key: tuple, value: torch.Tensor, batch: int | None = None) -> None:
        pieces = (
            value.detach()
            .clone()
            .chunk(len(self.streams), self.adapter.batch if batch is None else batch)
        )
        for stream, piece in zip(self.streams, pieces, strict=True):
            self.book.compare(kind, stream.parts.setdefault(key, []), self.step, piece)

    def keep_points(self) -> None:
        """TeaCache's points of this step: F and the residual of all blocks against the step
        before.
        """
        if self.feature is None or self.left is None:
            return
        length = self.entered.shape[1]
        left = (
            self.left
            if self.left.shape == self.entered.shape
            else (self.left[:, -length:] if self.adapter.image_last else self.left[:, :length])
        )
        count, batch = len(self.streams), self.adapter.batch
        dim = (
            batch
            if self.feature.ndim > batch and self.feature.shape[batch] == self.entered.shape[batch]
            else 0
        )
        for stream, now, added in zip(
            self.streams,
            self.feature.chunk(count, dim),
            (left - self.entered).chunk(count, batch),
            strict=True,
        ):
            old = stream.parts.get("points")
            if old is not None and old[0] != self.step.index:
                self.book.points.append(
                    (float(distance(now, old[1])), float(distance(added, old[2])))
                )
            if old is None or old[0] != self.step.index:
                stream.parts["points"] = (self.step.index, now, added)


def _sparse(value: torch.Tensor) -> torch.Tensor:
    """At most about TOKENS of a tensor's tokens (dimension 1), evenly spread."""
    return value[:, :: max(1, value.shape[1] // TOKENS)] if value.ndim > 2 else value
