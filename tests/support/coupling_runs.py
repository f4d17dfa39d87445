"""Make CAF Couplings on a tiny random model."""

import comfy.latent_formats
import comfy.model_sampling
import comfy.samplers
import torch

import tiny_models
from nibble.accel.caf import couplings
from nibble.nodes.bridge.caf import couplings as caf_couplings
from nibble.nodes.bridge.caf.teacher import CouplingsJob

SIGMAS = torch.tensor([1.0, 0.7, 0.3, 0.0])


def prompts(*seeds: int, name: str = "flux") -> list:
    return [entry for seed in seeds for entry in tiny_models.prompt(name, seed)]


def euler(**options):
    return comfy.samplers.ksampler("euler", options)


def job(model, **changes) -> CouplingsJob:
    defaults = {
        "positive": [prompts(2, 3)],
        "latents": [{"samples": torch.zeros(1, 16, 4, 4)}],
        "sampler": euler(),
        "sigmas": SIGMAS,
        "count": 5,
        "seed": 7,
        "filename": "mine",
    }
    return CouplingsJob(model, **defaults | changes)


def made(model, **changes) -> couplings.Couplings:
    return caf_couplings.make_couplings(job(model, **changes))[0]


def everything(found) -> list:
    return [
        (noise.tolist(), data.tolist(), caption)
        for noise, data, caption in map(found.pair, range(len(found)))
    ]


def calls_of(model, monkeypatch) -> list[int]:
    """Batch sizes of the calls of the diffusion model, as they come."""
    calls, plain = [], model.model.diffusion_model.forward
    monkeypatch.setattr(
        model.model.diffusion_model,
        "forward",
        lambda x, *args, **options: (calls.append(len(x)), plain(x, *args, **options))[1],
    )
    return calls
