"""The demo model at work outside ComfyUI: its two files, its prompts, and a plain Euler sampler for rectified flow."""

from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from ..quant import diffusers as models
from .prompts import WORD_DIM, embed, word_indices

WEIGHTS = Path(__file__).parent / "weights"
FLUX_FILE, VAE_FILE = WEIGHTS / "flux-demo.safetensors", WEIGHTS / "vae-demo.safetensors"
SHIFT = 1.15   # of the time schedule: FLUX.1 dev's value, and ComfyUI's default for it


def build_flux():
    """The untrained demo FLUX: 9.2 M parameters, hidden 256, 2 double and 4 single blocks."""
    return models.flux_transformer(
        patch_size=1, in_channels=64, num_layers=2, num_single_layers=4, attention_head_dim=128, num_attention_heads=2,
        joint_attention_dim=WORD_DIM, pooled_projection_dim=WORD_DIM, guidance_embeds=True)


def build_vae():
    """The untrained demo autoencoder: TAESD with 16 latent channels."""
    return models.tiny_autoencoder()


def load_vae(path: Path = VAE_FILE):
    """The demo autoencoder in float32, ready to decode."""
    return models.tiny_autoencoder({name: tensor.float() for name, tensor in load_file(path).items()}).eval()


def save_vae(vae, path: Path) -> None:
    """Writes TAESD's names in float16."""
    save_file({name: tensor.half().contiguous() for name, tensor in models.to_taesd_names(vae).items()}, path)


def load_flux(path: Path = FLUX_FILE):
    """The 16-bit demo FLUX in float32, as diffusers' model."""
    return models.flux_transformer({name: tensor.float() for name, tensor in load_file(path).items()}).eval()


def save_flux(flux, path: Path) -> None:
    """Writes Black Forest Labs' names in bfloat16."""
    save_file({name: tensor.bfloat16().contiguous() for name, tensor in models.to_flux_names(flux.state_dict()).items()}, path)


def velocity(flux, latents: torch.Tensor, t: torch.Tensor, tokens: torch.Tensor, pooled: torch.Tensor, guidance: torch.Tensor) -> torch.Tensor:
    """The model's velocity for latents (batch, 16, h, w) at times t (batch,), 1 = noise; the same shape."""
    batch, channels, height, width = latents.shape
    h, w = height // 2, width // 2
    packed = latents.reshape(batch, channels, h, 2, w, 2).permute(0, 2, 4, 1, 3, 5).reshape(batch, h * w, channels * 4)
    ids = torch.stack([torch.zeros(h, w), *torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij")], -1)
    out = flux(hidden_states=packed, timestep=t, guidance=guidance, pooled_projections=pooled, encoder_hidden_states=tokens,
               txt_ids=torch.zeros(tokens.shape[1], 3), img_ids=ids.reshape(h * w, 3).to(packed), return_dict=False)[0]
    return out.reshape(batch, h, w, channels, 2, 2).permute(0, 3, 1, 4, 2, 5).reshape(latents.shape)


def schedule(steps: int) -> torch.Tensor:
    """Shifted times from 1 to 0, float32 (steps + 1,): t = e^s / (e^s + 1/u - 1), as FLUX.1's reference sampler."""
    u = torch.linspace(1, 0, steps + 1)
    shift = torch.tensor(SHIFT).exp()
    return shift * u / (1 + (shift - 1) * u)


@torch.no_grad()
def sample(flux, prompts: list[str], seeds: list[int], steps: int = 12, guidance: float = 3.5,
           report: Callable[[int], None] = lambda step: None) -> torch.Tensor:
    """Euler steps from seeded noise: latents, float32 (len(prompts), 16, 8, 8)."""
    tokens, pooled = embed(word_indices(prompts))
    x = torch.stack([torch.randn(16, 8, 8, generator=torch.Generator().manual_seed(seed)) for seed in seeds])
    times = schedule(steps)
    for i in range(steps):
        x = x + (times[i + 1] - times[i]) * velocity(flux, x, times[i].expand(len(x)), tokens, pooled, torch.full((len(x),), guidance))
        report(i + 1)
    return x


@torch.no_grad()
def decode(vae, latents: torch.Tensor) -> torch.Tensor:
    """Latents → pictures, float32 (batch, height, width, 3) in [0, 1]."""
    return vae.decode(latents).sample.add(1).div(2).clamp(0, 1).permute(0, 2, 3, 1)
