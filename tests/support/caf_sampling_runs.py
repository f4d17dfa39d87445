"""Sampling with heads of constant acceleration in ComfyUI."""

import comfy.model_management
import comfy.sample
import comfy.samplers
import torch

from caching_runs import conditioning

DATA, FILE = -3.0, "test.caf.safetensors"


def noise(seed: int = 0, batch: int = 1) -> torch.Tensor:
    return torch.randn(batch, 16, 8, 8, generator=torch.Generator().manual_seed(seed))


def draw(
    model,
    sampler,
    sigmas,
    start=None,
    latent=None,
    mask=None,
    cfg: float = 1.0,
    callback=None,
    negative=None,
    positive=None,
):
    start = noise() if start is None else start
    return comfy.sample.sample_custom(
        model,
        start,
        cfg,
        sampler,
        sigmas,
        positive or conditioning(),
        negative or conditioning(9),
        torch.zeros_like(start) if latent is None else latent,
        noise_mask=mask,
        callback=callback,
        disable_pbar=True,
        seed=0,
    )
