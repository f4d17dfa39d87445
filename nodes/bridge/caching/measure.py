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
from dataclasses import dataclass

import comfy.sample
import comfy.samplers
import numpy as np
import torch
from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import WrappersMP

from ....accel.caching.calibration_file import Calibration
from ....accel.caching.calibration_recorder import CalibrationRecorder, sparse
from ....accel.caching.extrapolate import Reuse
from ....accel.caching.smoothcache import FARTHEST
from ....accel.caching.steps import Record
from ....accel.caching.teacache import distance
from ..host.fingerprint import fingerprint, weights_of
from ..host.progress import Progress
from ..host.samplers import sampler_name
from .features import FEATURES
from .hooks import BlockSite, hooked_blocks, shadow_sublayers
from .models import DEPTHS, ModelFamily, family_of, published
from .run import KEY, ModelCall, Run, flow_time, model_call, sampling, substitute, uncached


@dataclass(frozen=True)
class Measurement:
    """What is run and watched: each entry of the CONDITIONING `positive` once, from its own noise
    (seed + its number).

    k_max: SmoothCache's longest run of reused steps; depths: of DEPTHS, what errors are measured
        of; order: of TeaCache's polynomial; model_name: None for the model's class
    """

    model: ModelPatcher
    positive: list
    negative: list | None
    cfg: float
    sampler: comfy.samplers.Sampler
    sigmas: torch.Tensor
    latent: dict
    seed: int
    k_max: int = FARTHEST
    depths: tuple[str, ...] = DEPTHS
    order: int = 2
    model_name: str | None = None

    @property
    def steps(self) -> int:
        return len(self.sigmas) - 1


def measure(setup: Measurement, progress: Progress) -> Calibration:
    """Runs it. Raises ValueError for a schedule too short to learn from."""
    if setup.steps <= setup.k_max + 1:
        raise ValueError(
            f"{setup.steps} steps are too few to calibrate caching with; take the number of steps"
            f" that you draw with, at least {setup.k_max + 2}."
        )
    family = family_of(setup.model.model.diffusion_model)
    shipped = published(setup.model)
    feature = family.feature if family else ""
    if shipped is not None:
        feature = shipped.feature
    recorder = CalibrationRecorder(setup.steps, setup.k_max, setup.depths, feature)
    samples = comfy.sample.fix_empty_latent_channels(setup.model, setup.latent["samples"][:1])
    recorded = _recorded(setup.model, recorder, family)
    for number in range(len(setup.positive)):
        _sample(setup, recorded, number, samples, progress)
        recorder.next_prompt()
    return Calibration(
        model=_about_model(setup),
        run=_about_run(setup, samples),
        teacache=recorder.polynomial(setup.order),
        curves=recorder.curves(),
        grams=np.stack(recorder.grams),
    )


def _sample(
    setup: Measurement, model: ModelPatcher, number: int, samples: torch.Tensor, progress: Progress
) -> None:
    """Samples the prompt of that number."""
    prompt, prompts, steps = setup.positive[number], len(setup.positive), setup.steps
    guider = comfy.samplers.CFGGuider(model)
    guider.set_conds([prompt], setup.negative or [[torch.zeros_like(prompt[0]), prompt[1]]])
    guider.set_cfg(setup.cfg)

    def stepped(step, x0, x, total):
        done = number * steps + step + 1
        progress(done, prompts * steps, f"prompt {number + 1} of {prompts}")

    seed = setup.seed + number
    guider.sample(
        comfy.sample.prepare_noise(samples, seed),
        samples,
        setup.sampler,
        setup.sigmas,
        callback=stepped,
        disable_pbar=True,
        seed=seed,
    )


def _about_model(setup: Measurement) -> dict:
    return {
        "class": type(setup.model.model.diffusion_model).__name__,
        "fingerprint": fingerprint(setup.model),
        "name": setup.model_name or type(setup.model.model).__name__,
        "weights": weights_of(setup.model),
    }


def _about_run(setup: Measurement, samples: torch.Tensor) -> dict:
    shift = getattr(setup.model.get_model_object("model_sampling"), "shift", None)
    return {
        "sampler": sampler_name(setup.sampler),
        "steps": setup.steps,
        "sigmas": [float(s) for s in setup.sigmas],
        "flow": flow_time(setup.model).to_json(),
        "shift": float(shift) if isinstance(shift, (int, float)) else None,
        "cfg": setup.cfg,
        "latent": list(samples.shape),
        "prompts": len(setup.positive),
        "seed": setup.seed,
    }


class _ComputeAll:
    """The rule of the recorded run, which is uncached."""

    def decider(self) -> _ComputeAll:
        return self

    def computed(self) -> None:
        """Nothing to start again."""


def _recorded(
    model: ModelPatcher, recorder: CalibrationRecorder, family: ModelFamily | None
) -> ModelPatcher:
    """A clone whose runs are recorded; other caching on the model is left out."""

    def make(guider, sampler, sigmas, latent) -> Run:
        return Run(
            sigmas=[float(s) for s in sigmas],
            sampler=sampler,
            patcher=guider.model_patcher,
            rule=_ComputeAll(),
            reuse=Reuse(0),
            store=None,
            record=Record(recorder.steps),
            flow=flow_time(guider.model_patcher),
        )

    def predicted(executor, *args, **kwargs):
        """PREDICT_NOISE: the velocity that is integrated, after guidance."""
        run, x, sigma = args[2]["transformer_options"][KEY], args[0], args[1]
        denoised = executor(*args, **kwargs)
        level = sigma.reshape(-1, *[1] * (x.ndim - 1))
        velocity = run.flow.velocity(x, denoised, level).float().cpu()
        recorder.velocities.setdefault(run.step(sigma).index, velocity)
        return denoised

    patched = uncached(model)
    patched.add_wrapper_with_key(WrappersMP.OUTER_SAMPLE, KEY, sampling(make))
    patched.add_wrapper_with_key(WrappersMP.PREDICT_NOISE, KEY, predicted)
    if family is not None and set(recorder.depths) & {"block", "sublayer"}:
        patched.add_wrapper_with_key(family.hook, KEY, _around_recorded(recorder, family))
    return patched


def _around_recorded(recorder: CalibrationRecorder, family: ModelFamily) -> Callable:
    def wrapper(executor, *args, **kwargs):
        call = model_call(args, kwargs)
        if call is None:
            return executor(*args, **kwargs)
        network = family.network(executor.class_obj)
        recording = RecordingPass(recorder, call, family)
        with ExitStack() as stack:
            options = stack.enter_context(hooked_blocks(network, family, call.options, recording))
            if "sublayer" in recorder.depths:
                shadow_sublayers(stack, network, family, recording)
            args, kwargs = substitute(args, kwargs, call.options, options)
            out = executor(*args, **kwargs)
        recording.keep_points()
        return out

    return wrapper


class RecordingPass:
    """One call of the model that is only looked at."""

    def __init__(self, recorder: CalibrationRecorder, call: ModelCall, family: ModelFamily):
        self.recorder = recorder
        self.streams, self.step = call.streams, call.step
        self.family = family
        self.attention: dict[str, torch.Tensor] = {}
        self.feature: torch.Tensor | None = None
        self.entered: torch.Tensor | None = None
        self.left: torch.Tensor | None = None

    def block(
        self,
        site: BlockSite,
        image: torch.Tensor,
        text: torch.Tensor | None,
        arguments: dict,
        compute: Callable,
    ):
        image_before = sparse(image).clone()
        text_before = None if text is None else sparse(text).clone()
        if site.first:
            self.entered = image.clone()
            self.feature = self._feature(site, image, arguments)
        out = compute()
        if site.first and self.recorder.feature == "first_residual":
            self.feature = out[0] - self.entered
        if site.last:
            self.left = out[0]
        depths = self.recorder.depths
        if "block" in depths or ("sublayer" in depths and not site.blocks.parts):
            kind, batch = site.blocks.kind, self.family.batch
            self._note(kind, (*site.key, "img"), sparse(out[0]) - image_before, batch)
            if text is not None and out[1] is not None and out[1].shape == text.shape:
                self._note(kind, (*site.key, "txt"), sparse(out[1]) - text_before, batch)
        return out

    def _feature(
        self, site: BlockSite, image: torch.Tensor, arguments: dict
    ) -> torch.Tensor | None:
        if self.recorder.feature not in FEATURES:
            return None
        vector = arguments.get(site.blocks.vector)
        feature = FEATURES[self.recorder.feature](site.module, image, vector, arguments)
        return (image if feature is None else feature).detach().clone()

    def sublayer(self, kind: str, index: int, compute: Callable, like: torch.Tensor):
        out = compute()
        self.computed(kind, index, out, like)
        return out

    def computed(self, kind: str, index: object, out: object, like: torch.Tensor) -> None:
        """Compares what a sub-layer gave."""
        for i, value in enumerate(out if isinstance(out, tuple) else (out,)):
            self._note(kind, (kind, index, i), sparse(value), 0)

    def _note(self, kind: str, key: tuple, value: torch.Tensor, batch: int) -> None:
        pieces = value.detach().clone().chunk(len(self.streams), batch)
        for stream, piece in zip(self.streams, pieces, strict=True):
            self.recorder.compare(kind, stream.parts.setdefault(key, []), self.step, piece)

    def keep_points(self) -> None:
        """TeaCache's points of this step: F and the residual of all blocks against the step
        before.
        """
        if self.feature is None or self.left is None:
            return
        left, length = self.left, self.entered.shape[1]
        if left.shape != self.entered.shape:
            left = left[:, -length:] if self.family.image_last else left[:, :length]
        count, batch = len(self.streams), self.family.batch
        same = self.feature.ndim > batch and self.feature.shape[batch] == self.entered.shape[batch]
        features = self.feature.chunk(count, batch if same else 0)
        residuals = (left - self.entered).chunk(count, batch)
        for stream, feature, residual in zip(self.streams, features, residuals, strict=True):
            index, *last = stream.parts.get("points", (None,))
            if index == self.step.index:
                continue
            kept = [value.shape for value in last] == [feature.shape, residual.shape]
            if index is not None and kept:
                change = float(distance(feature, last[0]))
                self.recorder.points.append((change, float(distance(residual, last[1]))))
            stream.parts["points"] = (self.step.index, feature, residual)
