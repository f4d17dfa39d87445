"""Caching on the tiny models of every family: what was asked of a model, what it says by itself,
and calibrations in which every part costs the same.
"""

from __future__ import annotations

import comfy.samplers
import numpy as np
import torch
from comfy.patcher_extension import WrappersMP

import tiny_models
from nibble.accel.caching.calibration_file import Calibration
from nibble.accel.caching.smoothcache import Curve
from nibble.nodes.bridge.caching.measure import Measurement, measure
from nibble.nodes.bridge.caching.models import family_of
from nibble.nodes.bridge.caching.wrap_sublayers import kinds
from nibble.nodes.bridge.host.fingerprint import fingerprint
from nibble.nodes.bridge.host.progress import Progress

STEPS = 6


def latents(samples) -> list[torch.Tensor]:
    """A run's result as tensors, whether of one stream or several."""
    return list(samples.unbind()) if samples.is_nested else [samples]


def same(a, b) -> bool:
    return all(torch.equal(x, y) for x, y in zip(latents(a), latents(b), strict=True))


class Spy:
    """Sees every call of the model from outside, and can make the same call of the model without
    caching.
    """

    def __init__(self, model):
        self.calls = []
        self.model = model.clone()
        self.model.add_wrapper_with_key(WrappersMP.APPLY_MODEL, "spy", self._see)

    def _see(self, executor, *args, **kwargs):
        inputs = [arg.clone() if torch.is_tensor(arg) else arg for arg in args]
        self.calls.append((inputs, kwargs, executor(*args, **kwargs).clone()))
        return self.calls[-1][-1].clone()

    def plain(self, call: int) -> torch.Tensor:
        """What the model gives for that call's inputs by itself."""
        (x, t, c_concat, c_crossattn, control, options), kwargs, _ = self.calls[call]
        options = {
            key: value
            for key, value in options.items()
            if key in ("cond_or_uncond", "uuids", "sigmas", "sample_sigmas")
        }
        with torch.no_grad():
            return self.model.model.apply_model(
                x, t, c_concat, c_crossattn, control, options, **kwargs
            )


def calibrated(model, family: str, steps: int) -> Calibration:
    """What Calibrate Cache finds of a tiny model of a family."""
    return measure(
        Measurement(
            model=model,
            positive=tiny_models.prompt(family),
            negative=None,
            cfg=1.0,
            sampler=comfy.samplers.sampler_object("euler"),
            sigmas=tiny_models.schedule(model, steps),
            latent={"samples": torch.zeros_like(tiny_models.latent(family))},
            seed=3,
        ),
        Progress("calibrating"),
    )


def measured(model, family, error: float) -> Calibration:
    """A calibration in which reusing any part costs the same error at any step."""
    sigmas = tiny_models.schedule(model, STEPS).tolist()
    blocks = family_of(model.model.diffusion_model)
    every = ["step", *kinds(blocks, "block"), *kinds(blocks, "sublayer")]
    curves = {
        kind: Curve(
            [[error] * (STEPS - k) for k in (1, 2, 3)], [[0.0] * (STEPS - k) for k in (1, 2, 3)], 1
        )
        for kind in every
    }
    return Calibration(
        {"class": "", "fingerprint": fingerprint(model), "name": family, "weights": ""},
        {"sampler": "euler", "steps": STEPS, "sigmas": sigmas, "prompts": 1},
        None,
        curves,
        np.zeros((1, STEPS, STEPS)),
    )
