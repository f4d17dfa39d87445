"""How the demo's weights were made: ``python -m nibble.demo.train --out DIR`` (about two hours on
two CPU cores).

1. A TAESD-format autoencoder (16 latent channels, 8x down): its encoder is written in closed form
  (principal components of 8x8 patches), its decoder learns 32-pixel crops of the world, L1 and L2
  on the picture.
2. A FLUX (diffusers' class, small sizes) learns the latents by rectified flow: x_t = (1 - t) x_0 +
  t n, target n - x_0 (Liu et al., "Flow Straight and Fast", eq. 1), with an exponential moving
  average of the weights.

Run again on the same folder, it trains what is there further, at a lower rate. The shipped decoder
had 3400 steps, the shipped FLUX 9000 and then 2600 more.

The weights land as ``flux-demo.safetensors`` in Black Forest Labs' key names and
``vae-demo.safetensors`` in TAESD's.
"""

import argparse
import math
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from ..quant import diffusers as models
from . import pictures, prompts, world

# pixels: the autoencoder is convolutional, so crops teach it the whole picture at a quarter of the
# cost
CROP = 32


def picture_batch(count: int, rng: np.random.Generator) -> tuple[list[world.Scene], torch.Tensor]:
    """Random scenes and their pictures, float32 (count, 3, 64, 64) in [-1, 1]."""
    scenes = [world.random_scene(rng) for _ in range(count)]
    images = np.stack([world.render(s, world.random_pose(s.place, rng)) for s in scenes])
    return scenes, torch.from_numpy(images).permute(0, 3, 1, 2) * 2 - 1


def silence_blocks(half) -> None:
    """Residual branches start at zero and the other convolutions keep the variance: TAESD has no
    normalisation layers to help.
    """
    for name, module in half.named_modules():
        if isinstance(module, torch.nn.Conv2d):
            torch.nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
            if name.endswith("conv.4"):
                torch.nn.init.zeros_(module.weight)
            if module.bias is not None:
                torch.nn.init.zeros_(module.bias)


class PatchEncoder:
    """A linear encoder in closed form: the first 16 principal components of 8x8 patches, scaled
    into the decoder's range.

    mean float32 (8, 8, 3) · components float32 (16, 8, 8, 3) · scale float32 (16,)
    """

    def __init__(self, rng: np.random.Generator, count: int = 2000):
        patches = self.patches(picture_batch(count, rng)[1])
        mean = patches.mean(0)
        centred = (patches - mean).double()
        components = torch.linalg.eigh(centred.T @ centred)[1].flip(1)[:, :16].T.float()
        # the decoder's soft clamp is at 3
        self.scale = 3 / ((patches - mean) @ components.T).abs().quantile(0.999, dim=0)
        self.mean, self.components = mean.reshape(8, 8, 3), components.reshape(16, 8, 8, 3)

    @staticmethod
    def patches(images: torch.Tensor) -> torch.Tensor:
        """Pictures (batch, 3, 64, 64) in [-1, 1] → their patches (batch * 64, 192) in [0, 1], (y,
        x, colour) within.
        """
        cut = torch.nn.functional.unfold(images.add(1).div(2), 8, stride=8)
        return cut.reshape(len(images), 3, 8, 8, -1).permute(0, 4, 2, 3, 1).reshape(-1, 192)

    def latents(self, images: torch.Tensor) -> torch.Tensor:
        """What the written encoder gives, at a thousandth of the cost: (batch, 16, 8, 8)."""
        values = (self.patches(images) - self.mean.flatten()) @ (
            self.components.reshape(16, 192) * self.scale[:, None]
        ).T
        return values.reshape(len(images), 8, 8, 16).permute(0, 3, 1, 2)

    @torch.no_grad()
    def write(self, vae) -> None:
        """Writes itself into TAESD's convolutions.

        Two strided ones gather a patch into channels (colours are positive, so the ReLUs between
        pass them); the third projects, each component beside its negative so that ReLU loses no
        sign; the last joins the two, subtracts the mean and scales.
        """
        silence_blocks(vae.encoder)
        layers = vae.encoder.layers
        first, gather, project, last = layers[0], (layers[2], layers[6]), layers[10], layers[14]
        for layer in (first, *gather, project, last):
            layer.weight.zero_()
        for c in range(3):
            first.weight[c, c, 1, 1] = 1
        for layer, channels in zip(gather, (3, 12), strict=True):
            for i, (dy, dx, c) in enumerate(np.ndindex(2, 2, channels)):
                layer.weight[i, c, 1 + dy, 1 + dx] = 1
        for dy, dx in np.ndindex(2, 2):
            # the channel order that the two gathers left
            for i, (y2, x2, y1, x1, c) in enumerate(np.ndindex(2, 2, 2, 2, 3)):
                row = self.components[:, 4 * dy + 2 * y2 + y1, 4 * dx + 2 * x2 + x1, c]
                project.weight[:16, i, 1 + dy, 1 + dx] = row
                project.weight[16:32, i, 1 + dy, 1 + dx] = -row
        for k in range(16):
            last.weight[k, k, 1, 1], last.weight[k, 16 + k, 1, 1] = self.scale[k], -self.scale[k]
        last.bias.copy_(-(self.components * self.mean).sum((1, 2, 3)) * self.scale)


def crops_with_shapes(
    images: torch.Tensor, scenes: list[world.Scene], rng: np.random.Generator
) -> torch.Tensor:
    """One CROP x CROP window of each picture, near its shape: the rest is flat and teaches
    little.
    """
    crops = []
    for image, scene in zip(images, scenes, strict=True):
        row, column = divmod(world.PLACES.index(scene.place), 3)
        y, x = (
            int(np.clip(14 + 18 * i - CROP // 2 + rng.integers(-12, 13), 0, world.SIZE - CROP))
            for i in (row, column)
        )
        crops.append(image[:, y : y + CROP, x : x + CROP])
    return torch.stack(crops)


def warm_cosine(
    optimizer: torch.optim.Optimizer, steps: int, warm: int = 100
) -> torch.optim.lr_scheduler.LambdaLR:
    """Linear warm-up, then half a cosine down to one per cent."""
    return torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda i: (
            min(1.0, (i + 1) / warm)
            * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * min(1.0, i / steps))))
        ),
    )


def train_vae(out: Path, steps: int, batch: int = 8, seed: int = 0) -> None:
    """Stage 1; writes vae-demo.safetensors (float16), or trains the one that is there further."""
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    if (out / "vae-demo.safetensors").exists():
        vae = pictures.load_vae(out / "vae-demo.safetensors").train()
    else:
        vae = pictures.build_vae()
        PatchEncoder(np.random.default_rng(seed)).write(vae)
        silence_blocks(vae.decoder)
    optimizer = torch.optim.AdamW(vae.decoder.parameters(), lr=1e-3, weight_decay=1e-4)
    schedule = warm_cosine(optimizer, steps)
    for step in (bar := tqdm(range(steps), desc="autoencoder")):
        scenes, images = picture_batch(batch, rng)
        images = crops_with_shapes(images, scenes, rng)
        with torch.no_grad():
            latents = vae.encode(images).latents
        drawn = vae.decode(latents + 0.03 * torch.randn_like(latents)).sample
        loss = torch.nn.functional.l1_loss(drawn, images) + torch.nn.functional.mse_loss(
            drawn, images
        )
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.decoder.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 20 == 0:
            bar.set_postfix(loss=f"{loss.item():.4f}")
        if step % 100 == 99 or step == steps - 1:
            pictures.save_vae(vae, out / "vae-demo.safetensors")


def flow_loss(flux, latents: torch.Tensor, words: torch.Tensor) -> torch.Tensor:
    """Rectified-flow loss of one batch, at logit-normal times."""
    noise = torch.randn_like(latents)
    t = torch.sigmoid(0.4 + 1.2 * torch.randn(len(latents)))
    x_t = torch.lerp(latents, noise, t[:, None, None, None])
    guidance = 1 + 4 * torch.rand(len(latents))
    velocity = models.velocity(flux, x_t, t, *prompts.embed(words), guidance)
    return torch.nn.functional.mse_loss(velocity, noise - latents)


def train_flux(out: Path, steps: int, batch: int = 32, seed: int = 0) -> None:
    """Stage 2, on pictures drawn afresh for every step; writes flux-demo.safetensors (bfloat16,
    moving average of the weights), or trains the one that is there further.
    """
    torch.manual_seed(seed)
    rng = np.random.default_rng()  # never the same pictures twice, whatever was drawn before
    encoder = PatchEncoder(np.random.default_rng(seed))
    begun = (out / "flux-demo.safetensors").exists()
    flux = (
        pictures.load_flux(out / "flux-demo.safetensors").train()
        if begun
        else pictures.build_flux()
    )
    averaged = torch.optim.swa_utils.AveragedModel(
        flux, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.999)
    )
    optimizer = torch.optim.AdamW(
        flux.parameters(), lr=5e-4 if begun else 8e-4, weight_decay=0.01, betas=(0.9, 0.99)
    )
    schedule = warm_cosine(optimizer, steps, warm=300)
    for step in (bar := tqdm(range(steps), desc="flux")):
        scenes, images = picture_batch(batch, rng)
        loss = flow_loss(
            flux, encoder.latents(images), prompts.word_indices([str(scene) for scene in scenes])
        )
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(flux.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        averaged.update_parameters(flux)
        if step % 50 == 0:
            bar.set_postfix(loss=f"{loss.item():.4f}")
        if step % 500 == 499 or step == steps - 1:
            pictures.save_flux(averaged.module, out / "flux-demo.safetensors")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="folder for the two weight files")
    parser.add_argument(
        "--vae-steps", type=int, default=4000, help="0: leave the autoencoder as it is"
    )
    parser.add_argument(
        "--flux-steps", type=int, default=9000, help="0: leave the diffusion model as it is"
    )
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    if options.vae_steps:
        train_vae(options.out, options.vae_steps)
    if options.flux_steps:
        train_flux(options.out, options.flux_steps)


if __name__ == "__main__":
    main()
