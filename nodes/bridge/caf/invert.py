"""Inversion with a MODEL that has CAF heads: the noise and the initial velocity from which CAF
Sampler makes a picture again (algorithm 3 of arXiv:2411.00322).
"""

from __future__ import annotations

import comfy.sample
import comfy.samplers
import comfy.utils
import latent_preview
import torch
from comfy.model_patcher import ModelPatcher
from torch import Tensor
from tqdm.auto import tqdm

from ....accel.caf import flow
from .load import Heads, asking, heads_of
from .sample import AHEAD, Velocity, count, nets, shape_of, sigmas
from .straight import coordinates_of, noise_of


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
                f"The noise from CAF Invert is of a latent {shape_of(self.noise)}, and this one is"
                f" {shape_of(samples)}; connect the latent that was inverted, or an empty one of"
                " that size and number."
            )
        return self.noise.clone()


class _Inversion(comfy.samplers.Sampler):
    """Goes from the latent image to its noise where ComfyUI would sample."""

    def __init__(self, heads: Heads, ahead: float):
        self.heads, self.ahead = heads, ahead
        self.ends: tuple[Tensor, Tensor] | None = None  # noise and initial velocity

    @torch.no_grad()
    def sample(  # noqa: PLR0913 (ComfyUI's)
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
            where = coordinates_of(model_wrap.inner_model.model_sampling)
            ask = asking(model_wrap, extra_args, where)
            velocity, accelerate = nets(ask, self.heads.adapter.h, seen, bar)
            self.ends = flow.invert(
                velocity,
                accelerate,
                latent_image,
                flow.uniform(total)[::-1],
                self.ahead,
                self.heads.adapter.h,
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
    heads = heads_of(model)
    samples = _checked(model, latent["samples"])
    guider, inversion = comfy.samplers.CFGGuider(model), _Inversion(heads, ahead)
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
    noise, start = (tensor.float().cpu() for tensor in inversion.ends)
    noise = noise_of(model.get_model_object("model_sampling"), noise)
    return InvertedNoise(noise), Velocity(start, heads.name)


def _checked(model: ModelPatcher, samples: Tensor) -> Tensor:
    """The latent with the dimensions of the model's own. Raises ValueError for one that cannot be
    inverted.
    """
    if samples.is_nested:
        raise ValueError(
            "The latent holds several streams (video with sound), which CAF Invert cannot take."
        )
    latent_format = model.get_model_object("latent_format")
    if not samples.any():
        raise ValueError(
            "The latent is empty, and there is nothing to invert; connect a picture through VAE"
            " Encode."
        )
    samples = comfy.sample.fix_empty_latent_channels(model, samples)
    if (
        samples.ndim != 2 + latent_format.latent_dimensions
        or samples.shape[1] != latent_format.latent_channels
    ):
        raise ValueError(
            f"The latent is {shape_of(samples)}, and this model's have"
            f" {latent_format.latent_channels} channels in {latent_format.latent_dimensions}"
            " dimensions; encode the picture with this model's own VAE."
        )
    return samples


def chart(noise: InvertedNoise, velocity: Velocity, steps: int) -> dict:
    """A chart of kind "facts": what it cost, and how like random numbers the noise is."""
    values = noise.noise.double()
    return {
        "kind": "facts",
        "title": f"inverted in {count(steps, 'step')}, {count(steps + 1, 'call')} of the model",
        "summary": [
            [
                "noise",
                f"mean {values.mean():+.3f}, deviation {values.std():.3f} (random noise: 0 and 1)",
            ],
            ["velocity", f"root mean square {velocity.start.double().square().mean().sqrt():.3f}"],
            ["file", velocity.name],
        ],
    }
