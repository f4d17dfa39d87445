"""diffusers' tiny autoencoder (TAESD) under the names that ComfyUI's VAE loader reads."""

import re
from collections.abc import Iterable

import diffusers
from torch import Tensor


def tiny_autoencoder(
    state: dict[str, Tensor] | None = None, latent_channels: int = 16
) -> diffusers.AutoencoderTiny:
    """Diffusers' TAESD, optionally from a state dict in TAESD's names (taesd_encoder.*,
    taesd_decoder.*).
    """
    vae = diffusers.AutoencoderTiny(
        latent_channels=latent_channels, scaling_factor=1.0, shift_factor=0.0
    )
    if state is not None:
        vae.load_state_dict(dict(_taesd_names(state, to_diffusers=True)))
    return vae


def to_taesd_names(vae: diffusers.AutoencoderTiny) -> dict[str, Tensor]:
    """An AutoencoderTiny's weights under TAESD's own names, as ComfyUI's VAE loader reads them."""
    return dict(_taesd_names(vae.state_dict(), to_diffusers=False))


def _taesd_names(state: dict[str, Tensor], to_diffusers: bool) -> Iterable[tuple[str, Tensor]]:
    for name, tensor in state.items():
        if to_diffusers and (match := re.match(r"taesd_(encoder|decoder)\.(\d+)(\..*)", name)):
            half, index, rest = match[1], int(match[2]), match[3]
            # TAESD's decoder counts its clamp as layer 0
            yield f"{half}.layers.{index - (half == 'decoder')}{rest}", tensor
        elif not to_diffusers and (
            match := re.match(r"(encoder|decoder)\.layers\.(\d+)(\..*)", name)
        ):
            half, index, rest = match[1], int(match[2]), match[3]
            yield f"taesd_{half}.{index + (half == 'decoder')}{rest}", tensor
