"""ComfyUI's samplers: their names, their previews, and the switch that makes models trainable."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import comfy.model_management
import latent_preview
import torch
from comfy.cli_args import LatentPreviewMethod, args
from comfy.latent_formats import LatentFormat


def sampler_name(sampler: object) -> str:
    """ComfyUI's name of a SAMPLER, "euler"; empty for one that has none."""
    function = getattr(sampler, "sampler_function", None)
    return getattr(function, "__name__", "").removeprefix("sample_")


def previewer(
    device: torch.device, latent_format: LatentFormat
) -> latent_preview.LatentPreviewer | None:
    """ComfyUI's previewer by its own setting; where that is off, the quick one: a training preview
    is asked for by a widget of its own. None where the model has none.
    """
    chosen = latent_preview.get_previewer(device, latent_format)
    if (
        chosen is None
        and args.preview_method == LatentPreviewMethod.NoPreviews
        and latent_format.latent_rgb_factors is not None
    ):
        return latent_preview.Latent2RGBPreviewer(
            latent_format.latent_rgb_factors,
            latent_format.latent_rgb_factors_bias,
            latent_format.latent_rgb_factors_reshape,
        )
    return chosen


@contextlib.contextmanager
def in_training() -> Iterator[None]:
    """ComfyUI's models avoid operations without a gradient while its flag is up."""
    before = comfy.model_management.in_training
    comfy.model_management.in_training = True
    try:
        yield
    finally:
        comfy.model_management.in_training = before
