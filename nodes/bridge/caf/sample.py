"""Sampling and inversion with a MODEL that has CAF heads (`caf_model`), inside ComfyUI's own
samplers, guiders and masks.

In ComfyUI's sigmas the time of a path is t = time_of(1 - sigma) (`accel/caf/flow.py`), so any
scheduler's sigmas will do; those of `sigmas` are evenly spaced in t, as in algorithm 2 of
arXiv:2411.00322. Masks need nothing more: what they protect is put on the straight line from noise
to picture at the sigma that is asked for, which is where a path of constant acceleration is at that
time.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import comfy.sample
import comfy.samplers
import comfy.utils
import latent_preview
import torch
from comfy.model_patcher import ModelPatcher
from torch import Tensor
from tqdm.auto import tqdm

from ....accel.caf import flow, heads
from . import load as caf_model
from . import training_free as caf

AHEAD = flow.AHEAD


@dataclass(frozen=True)
class Velocity:
    """The initial velocity of a picture's path. start: (batch, …) float32 on the CPU in the model's
    units; name: the CAF file by which it was found.
    """

    start: Tensor
    name: str

    def of(self, x: Tensor, name: str) -> Tensor:
        """The velocity for a latent x that is drawn with a CAF file. Raises ValueError where either
        does not fit.
        """
        if self.start.shape != x.shape:
            raise ValueError(
                f"The velocity from CAF Invert is of a latent {_shape(self.start)}, and this one is"
                f" {_shape(x)}; sample as many pictures of the size that was inverted, or"
                " disconnect the velocity from CAF Sampler."
            )
        if self.name != name:
            raise ValueError(
                f"The velocity from CAF Invert was found with {self.name}, and the connected model"
                f" has {name}; use one file for both."
            )
        return self.start.to(x)


class InvertedNoise:
    """A NOISE of SamplerCustomAdvanced: what CAF Invert found (batch, …), in place of random
    numbers.
    """

    seed = 0

    def __init__(self, noise: Tensor):
        self.noise = noise

    def generate_noise(self, input_latent: dict) -> Tensor:
        """The noise for a LATENT. Raises ValueError for one of another shape."""
        samples = input_latent["samples"]
        if samples.shape != self.noise.shape:
            raise ValueError(
                f"The noise from CAF Invert is of a latent {_shape(self.noise)}, and this one is"
                f" {_shape(samples)}; connect the latent that was inverted, or an empty one of that"
                " size and number."
            )
        return self.noise.clone()


def _shape(tensor: Tensor) -> str:
    return " x ".join(map(str, tensor.shape))


# ---- sampling


def sigmas(model: ModelPatcher, steps: int, denoise: float = 1.0) -> Tensor:
    """SIGMAS (steps + 1,) float32, evenly spaced in the time of the model's paths, of which only
    the last share `denoise` is walked.
    """
    h = caf_model.heads_of(model).adapter.h
    found = 1 - flow.retimed(torch.linspace(1 - denoise, 1, steps + 1, dtype=torch.float64), h)
    found[-1] = 0
    return found.float()


def sampler(velocity: Velocity | None = None, ahead: float = AHEAD) -> comfy.samplers.KSAMPLER:
    """A SAMPLER; velocity: the initial velocity, where it is known; ahead: as in `flow.sample`."""
    return comfy.samplers.KSAMPLER(
        constant_acceleration_flow, {"velocity": velocity, "ahead": ahead}
    )


@torch.no_grad()
def constant_acceleration_flow(
    model,
    x: Tensor,
    sigmas: Tensor,
    extra_args: dict | None = None,
    callback=None,
    disable: bool | None = None,
    velocity: Velocity | None = None,
    ahead: float = AHEAD,
) -> Tensor:
    """A sampler function as KSAMPLER calls it; one call of the model a step and one more, which
    finds the velocity where it is not given.

    Raises ValueError for a model without CAF heads, for sigmas that do not fall between 1 and 0,
    and for a velocity that does not fit.
    """
    worn = caf_model.heads_of(model.inner_model.model_patcher)
    start = None if velocity is None else velocity.of(x, worn.name)
    times = _times(sigmas, worn.adapter.h)
    if len(times) < 2:
        return x
    steps = len(times) - 1

    def seen(step: int, x: Tensor, denoised: Tensor) -> None:
        if callback is not None:
            callback(
                {
                    "x": x,
                    "i": step,
                    "sigma": sigmas[step],
                    "sigma_hat": sigmas[step],
                    "denoised": denoised,
                }
            )

    with tqdm(total=steps + (start is None), disable=disable) as bar:
        ask, accelerate = _nets(model, extra_args or {}, worn, seen, bar)
        return flow.sample(ask, accelerate, x, times, start, ahead=ahead, h=worn.adapter.h)


def _times(sigmas: Tensor, h: float) -> list[float]:
    """The time of each sigma on the model's paths. Raises ValueError for sigmas that do not fall
    between 1 and 0.
    """
    levels = sigmas.double().cpu()
    if (levels.diff() > 0).any():
        raise ValueError(
            "CAF Sampler goes from noise to picture only, and these sigmas rise; use CAF Invert for"
            " the reverse."
        )
    if len(levels) and (levels.min() < 0 or levels.max() > 1 + 1e-4):
        raise ValueError(
            f"CAF Sampler needs sigmas between 1 and 0, and these run from {levels.max():.4g} to"
            f" {levels.min():.4g}; connect those of its own."
        )
    return flow.time_of((1 - levels).clamp_min(0), h).tolist()


def _nets(
    model,
    extra_args: dict,
    worn: caf_model.Heads,
    seen: Callable[[int, Tensor, Tensor], None],
    bar: tqdm,
) -> tuple[flow.Velocity, flow.Acceleration]:
    """The velocity net and the acceleration net; `seen(step, x, denoised)` hears where each step's
    path leads, if it goes on as it is.
    """
    ask, h, steps = caf_model.asking(model, extra_args), worn.adapter.h, iter(range(10**9))
    velocity, acceleration = heads.velocity_net(ask, h), heads.acceleration_net(ask, h)

    def first(x: Tensor, t: Tensor) -> Tensor:
        found = velocity(x, t)
        bar.update()
        return found

    def then(x: Tensor, t: Tensor, start: Tensor) -> Tensor:
        found = acceleration(x, t, start)
        now = flow.at(t, x)
        seen(next(steps), x, x + (1 - now) * (start + (1 + now) / 2 * found))
        bar.update()
        return found

    return first, then


def chart(model: ModelPatcher, found: Tensor, velocity: Velocity | None) -> dict:
    """A chart of kind "facts" (`charts.py`): what sampling will cost."""
    worn, steps = caf_model.heads_of(model), len(found) - 1
    calls = steps + (velocity is None)
    why = (
        "one for the velocity, then one per step"
        if velocity is None
        else "one per step; the velocity is given"
    )
    return {
        "kind": "facts",
        "title": f"{_count(steps, 'step')}, {_count(calls, 'call')} of the model",
        "summary": [
            ["calls", why],
            ["pace", f"h = {worn.adapter.h:g}"],
            ["sigmas", caf.row(found)],
            ["file", worn.name],
        ],
    }


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


# ---- inversion


class _Inversion(comfy.samplers.Sampler):
    """Goes from the latent image to its noise where ComfyUI would sample."""

    def __init__(self, worn: caf_model.Heads, ahead: float):
        self.worn, self.ahead = worn, ahead
        self.found: tuple[Tensor, Tensor] | None = None

    @torch.no_grad()
    def sample(
        self,
        model_wrap,
        sigmas,
        extra_args,
        callback,
        noise,
        latent_image=None,
        denoise_mask=None,
        disable_pbar=False,
    ):
        total = len(sigmas) - 1

        def seen(step: int, x: Tensor, denoised: Tensor) -> None:
            if callback is not None:
                callback(step, x, x, total)  # the preview is the picture turning into noise

        with tqdm(total=total + 1, disable=disable_pbar) as bar:
            velocity, accelerate = _nets(model_wrap, extra_args, self.worn, seen, bar)
            self.found = flow.invert(
                velocity,
                accelerate,
                latent_image,
                flow.uniform(total)[::-1],
                self.ahead,
                self.worn.adapter.h,
            )
        return latent_image


def invert(
    model: ModelPatcher, positive: list, latent: dict, steps: int, ahead: float = AHEAD
) -> tuple[InvertedNoise, Velocity]:
    """(NOISE, CAF_VELOCITY) from which CAF Sampler draws the latent again, in steps + 1 calls of
    the model, without CFG.

    Raises ValueError in plain words for a model without CAF heads, or a latent that is empty or not
    this model's.
    """
    worn = caf_model.heads_of(model)
    samples = _checked(model, latent["samples"])
    guider, inversion = comfy.samplers.CFGGuider(model), _Inversion(worn, ahead)
    guider.inner_set_conds({"positive": positive})
    levels = sigmas(model, steps).flip(0)
    guider.sample(
        torch.zeros_like(samples),
        samples,
        inversion,
        levels,
        callback=latent_preview.prepare_callback(model, steps),
        seed=0,
        disable_pbar=not comfy.utils.PROGRESS_BAR_ENABLED,
    )
    noise, start = (tensor.float().cpu() for tensor in inversion.found)
    # by which such a model's noise is multiplied
    scale = getattr(model.get_model_object("model_sampling"), "noise_scale", 1.0)
    return InvertedNoise(noise / scale), Velocity(start, worn.name)


def _checked(model: ModelPatcher, samples: Tensor) -> Tensor:
    """The latent with the dimensions of the model's own. Raises ValueError for one that cannot be
    inverted.
    """
    if samples.is_nested:
        raise ValueError(
            "The latent holds several streams (video with sound), which CAF Invert cannot take."
        )
    form = model.get_model_object("latent_format")
    if not samples.any():
        raise ValueError(
            "The latent is empty, and there is nothing to invert; connect a picture through VAE"
            " Encode."
        )
    samples = comfy.sample.fix_empty_latent_channels(model, samples)
    if samples.ndim != 2 + form.latent_dimensions or samples.shape[1] != form.latent_channels:
        raise ValueError(
            f"The latent is {_shape(samples)}, and this model's have {form.latent_channels}"
            f" channels in {form.latent_dimensions} dimensions; encode the picture with this"
            " model's own VAE."
        )
    return samples


def inversion_chart(noise: InvertedNoise, velocity: Velocity, steps: int) -> dict:
    """A chart of kind "facts": what it cost, and how like random numbers the noise is."""
    values = noise.noise.double()
    return {
        "kind": "facts",
        "title": f"inverted in {_count(steps, 'step')}, {_count(steps + 1, 'call')} of the model",
        "summary": [
            [
                "noise",
                f"mean {values.mean():+.3f}, deviation {values.std():.3f} (random noise: 0 and 1)",
            ],
            ["velocity", f"root mean square {velocity.start.double().square().mean().sqrt():.3f}"],
            ["file", velocity.name],
        ],
    }
