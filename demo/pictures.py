"""The demo model at work outside ComfyUI: its two files, its prompts and its sampler."""

from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from ..quant import diffusers as models
from .prompts import WORD_DIM, embed, word_indices
from .taesd import tiny_autoencoder, to_taesd_names

# a folder for each kind of ComfyUI's model folders that lists what is in it
WEIGHTS = Path(__file__).parent / "weights"
# of the time schedule: a picture of 16 tokens is decided near pure noise, so most steps go there
SHIFT = 3.0
# ComfyUI's latent format of FLUX.1: the model sees (latent - shift) * scale
LATENT_SCALE, LATENT_SHIFT = 0.3611, 0.1159
FLUX_FILE = WEIGHTS / "diffusion_models" / "flux-demo.safetensors"
VAE_FILE = WEIGHTS / "vae" / "vae-demo.safetensors"


def build_flux():
    """The untrained demo FLUX: 9.2 M parameters, hidden 256, 2 double and 4 single blocks."""
    return models.flux_transformer(
        patch_size=1,
        in_channels=64,
        num_layers=2,
        num_single_layers=4,
        attention_head_dim=128,
        num_attention_heads=2,
        joint_attention_dim=WORD_DIM,
        pooled_projection_dim=WORD_DIM,
        guidance_embeds=True,
    )


def build_vae():
    """The untrained demo autoencoder: TAESD with 16 latent channels."""
    return tiny_autoencoder()


def load_vae(path: Path = VAE_FILE):
    """The demo autoencoder in float32, ready to decode."""
    return tiny_autoencoder(
        {name: tensor.float() for name, tensor in load_file(path).items()}
    ).eval()


def save_vae(vae, path: Path) -> None:
    """Writes TAESD's names in float16, and what ComfyUI does to a FLUX's latents between the model
    and the autoencoder.
    """
    tensors = {name: tensor.half().contiguous() for name, tensor in to_taesd_names(vae).items()}
    save_file(
        tensors
        | {"vae_scale": torch.tensor(LATENT_SCALE), "vae_shift": torch.tensor(LATENT_SHIFT)},
        path,
    )


def load_flux(path: Path = FLUX_FILE):
    """The 16-bit demo FLUX in float32, as diffusers' model."""
    return models.flux_transformer(
        {name: tensor.float() for name, tensor in load_file(path).items()}
    ).eval()


def save_flux(flux, path: Path) -> None:
    """Writes Black Forest Labs' names in bfloat16."""
    save_file(
        {
            name: tensor.bfloat16().contiguous()
            for name, tensor in models.to_flux_names(flux.state_dict()).items()
        },
        path,
    )


def sample(
    flux,
    prompts: list[str],
    seeds: list[int],
    steps: int = 12,
    guidance: float = 3.5,
    report: Callable[[int], None] = lambda step: None,
) -> torch.Tensor:
    """Draws each prompt from its seed: latents, float32 (len(prompts), 16, 8, 8)."""
    noise = torch.stack(
        [torch.randn(16, 8, 8, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
    )
    return models.euler(flux, noise, *embed(word_indices(prompts)), steps, guidance, SHIFT, report)


@torch.no_grad()
def decode(vae, latents: torch.Tensor) -> torch.Tensor:
    """Latents → pictures, float32 (batch, height, width, 3) in [0, 1]."""
    return vae.decode(latents).sample.add(1).div(2).clamp(0, 1).permute(0, 2, 3, 1)
