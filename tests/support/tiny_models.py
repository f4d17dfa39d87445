"""Tiny random models of ComfyUI's transformer families, built through ComfyUI's own classes: what a
cache must survive.

    model = build("wan")                  a ModelPatcher on the CPU in float32
    picture = sample(model, "wan")        a run of ComfyUI's own sampler

A family's entry says how ComfyUI would configure it, in a few thousand parameters, and what a
prompt for it holds.
"""

from __future__ import annotations

import contextlib
from unittest import mock

import torch

from tiny_flux_families import FLUX_LIKE
from tiny_more_families import MORE
from tiny_other_families import OTHERS
from tiny_picture_families import PICTURES
from tiny_wan_families import BESIDE, WAN_KIN

FAMILIES = FLUX_LIKE | PICTURES | OTHERS | MORE | WAN_KIN | BESIDE


def build(name: str, seed: int = 0):
    """A family's tiny model as ComfyUI's ModelPatcher: random float32 weights on the CPU, scaled so
    that signals neither die nor grow.
    """
    import comfy.model_patcher
    import comfy.supported_models

    family = FAMILIES[name]
    config = getattr(comfy.supported_models, family.config)(dict(family.options))
    # the configuration class sets some options itself, for the full size
    config.unet_config.update(family.options)
    config.set_inference_dtype(torch.float32, None)
    with contextlib.ExitStack() as tiny:
        for part in family.parts():
            tiny.enter_context(mock.patch.object(*part))
        model = config.get_model(family.beside(), "")
    fill(model.diffusion_model, seed)
    cpu = torch.device("cpu")
    return comfy.model_patcher.ModelPatcher(model, load_device=cpu, offload_device=cpu)


def fill(module: torch.nn.Module, seed: int) -> None:
    """Random weights; ComfyUI's layers come without any."""
    draw = torch.Generator().manual_seed(seed)
    for name, value in module.state_dict(keep_vars=True).items():
        if not value.is_floating_point():
            continue
        if "inv_freq" in name:  # some models bring it along in their files
            places = torch.arange(value.shape[-1]) / value.shape[-1]
            value.data.copy_((10000**-places).expand_as(value))
            continue
        random = torch.randn(value.shape, generator=draw)
        fan_in = value[0].numel() if value.ndim > 1 else 1
        if value.ndim > 1:
            random *= 0.7 / max(fan_in, 1) ** 0.5
        elif name.endswith(("bias", "beta")):
            random *= 0.02
        else:  # a norm's scale
            random = 1 + 0.1 * random
        value.data.copy_(random)


def latent(name: str, batch: int = 1, shape: tuple[int, ...] | None = None, seed: int = 1):
    """Noise of the family's latent shape; ComfyUI's NestedTensor for a model of several streams."""
    draw, shape = torch.Generator().manual_seed(seed), shape or FAMILIES[name].latent
    if isinstance(shape[0], int):
        return torch.randn(batch, *shape, generator=draw)
    from comfy.nested_tensor import NestedTensor

    return NestedTensor([torch.randn(batch, *part, generator=draw) for part in shape])


def prompt(name: str, seed: int = 2) -> list:
    """A CONDITIONING of random tokens with whatever else the family wants."""
    family, draw = FAMILIES[name], torch.Generator().manual_seed(seed)
    extras = {
        key: value() if callable(value) else torch.randn(value, generator=draw)
        for key, value in family.extras.items()
    }
    return [[torch.randn(1, *family.context, generator=draw), extras]]


def schedule(model, steps: int) -> torch.Tensor:
    """ComfyUI's simple schedule for the model: steps + 1 noise levels."""
    import comfy.samplers

    return comfy.samplers.calculate_sigmas(
        model.get_model_object("model_sampling"), "simple", steps
    )


def sample(
    model,
    name: str,
    steps: int = 6,
    batch: int = 1,
    cfg: float = 1.0,
    sampler: str = "euler",
    noise=None,
    sigmas: torch.Tensor | None = None,
    callback=None,
):
    """A run of ComfyUI's sampler with a prompt and, where cfg is not 1, another one against it."""
    import comfy.samplers

    guider = comfy.samplers.CFGGuider(model)
    guider.set_conds(prompt(name), prompt(name, seed=3))
    guider.set_cfg(cfg)
    sigmas = schedule(model, steps) if sigmas is None else sigmas
    noise = latent(name, batch) if noise is None else noise
    return guider.sample(
        noise,
        noise * 0,
        comfy.samplers.sampler_object(sampler),
        sigmas,
        callback=callback,
        disable_pbar=True,
        seed=1,
    )
