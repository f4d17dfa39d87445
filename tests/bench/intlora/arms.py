"""What all arms of the IntLoRA bench share: demo model, concept, loss, scores, and the adapters
that each arm trains.
"""

import numpy as np
import torch

from bench import concept
from nibble.demo import pictures, prompts, scorer
from nibble.demo.train import PatchEncoder
from nibble.quant import diffusers as models
from nibble.quant.calibration import recorder
from nibble.quant.intlora import train
from nibble.quant.intlora.linear import Grid
from nibble.quant.merge.integer_grid import IntBase
from nibble.quant.weights import linears

ARMS = {
    "float LoRA": None,
    "QLoRA": "qlora",
    "IntLoRA MUL": "mul",
    "IntLoRA SHIFT": "shift",
    "SHIFT-ADD": "shift_add",
}


class FloatLoRA(torch.nn.Module):
    """x W^T + b + (x down^T) up^T."""

    def __init__(
        self, weight: torch.Tensor, bias: torch.Tensor | None, rank: int, generator: torch.Generator
    ):
        super().__init__()
        self.weight, self.bias = weight, bias
        self.in_features, self.out_features = weight.shape[1], weight.shape[0]
        self.lora_down = torch.nn.Parameter(
            (torch.rand(rank, weight.shape[1], generator=generator) * 2 - 1)
            / weight.shape[1] ** 0.5
        )
        self.lora_up = torch.nn.Parameter(torch.zeros(weight.shape[0], rank))

    def forward(self, x):
        return (
            torch.nn.functional.linear(x, self.weight, self.bias)
            + (x @ self.lora_down.T) @ self.lora_up.T
        )


def names_of(flux) -> list[str]:
    """The linears that are adapted: attention and feed-forward of every block."""
    return [name for name in recorder.find_linears(flux) if "blocks" in name and "norm" not in name]


def show_progress(step: int, steps: int, loss: float) -> None:
    """Prints every 25th step."""
    if step % 25 == 0:
        print(f"  {step}/{steps} {loss:.4f}", flush=True)


class Bench:
    """Model, data and options shared by all arms."""

    def __init__(self, options):
        self.options = options
        # before the world grows: its components are fitted to the world
        self.encoder = PatchEncoder(np.random.default_rng(0))
        concept.extend_world()

    def loss(self, flux, share: float, batch: int):
        """generator → flow-matching loss of a batch; share: of concept pictures in it."""

        def value(generator: torch.Generator) -> torch.Tensor:
            rng = np.random.default_rng(int(torch.randint(2**31, (1,), generator=generator)))
            scenes, images = concept.batch(batch, rng, share)
            latents = self.encoder.latents(images)
            noise = torch.randn(latents.shape, generator=generator)
            t = torch.sigmoid(0.4 + 1.2 * torch.randn(batch, generator=generator))
            guidance = 1 + 4 * torch.rand(batch, generator=generator)
            words = prompts.embed(prompts.word_indices([str(scene) for scene in scenes]))
            velocity = models.velocity(
                flux, torch.lerp(latents, noise, t[:, None, None, None]), t, *words, guidance
            )
            return torch.nn.functional.mse_loss(velocity, noise - latents)

        return value

    @torch.no_grad()
    def score(self, flux) -> dict:
        """Losses and accuracies of a model."""
        row = {}
        for name, share, seed in (("loss", 1.0, 10**9), ("prior loss", 0.0, 2 * 10**9)):
            draw = self.loss(flux, share, 32)
            row[name] = float(
                np.mean(
                    [
                        draw(torch.Generator().manual_seed(seed + i)).item()
                        for i in range(self.options.batches)
                    ]
                )
            )
        asked = concept.scenes()[:: 36 // self.options.prompts]
        row |= self.accuracy(flux, asked, "concept")
        return row

    def accuracy(self, flux, scenes, kind: str) -> dict:
        latents = pictures.sample(
            flux, [str(scene) for scene in scenes], [7000 + i for i in range(len(scenes))]
        )
        found = scorer.score(self.read(latents), scenes)
        return {f"{kind} {fact}": found[fact] for fact in ("all", "colour", "shape", "place")}

    def read(self, latents: torch.Tensor) -> np.ndarray:
        """Latents (batch, 16, 8, 8) → pictures (batch, 64, 64, 3): the inverse of the encoder on
        its 16 components.
        """
        e = self.encoder
        values = (
            latents.permute(0, 2, 3, 1).reshape(-1, 16) / e.scale @ e.components.reshape(16, 192)
            + e.mean.flatten()
        )
        patches = values.reshape(-1, 8, 8, 3).permute(0, 3, 1, 2).reshape(len(latents), 64, 192).mT
        return (
            torch.nn.functional.fold(patches, (64, 64), 8, stride=8)
            .clamp(0, 1)
            .permute(0, 2, 3, 1)
            .numpy()
        )

    def readable(self) -> dict:
        """The scorer on rendered pictures that went through the encoder and its inverse: the
        ceiling.
        """
        rng = np.random.default_rng(1)
        return {
            kind: scorer.score(self.read(self.encoder.latents(images)), scenes)["all"]
            for kind, (scenes, images) in (
                ("concept", concept.batch(72, rng, 1.0)),
                ("prior", concept.batch(72, rng, 0.0)),
            )
        }

    def attach(self, flux, arm: str | None) -> dict:
        o = self.options
        if arm in ("mul", "shift", "shift_add"):
            return train.attach(
                flux,
                names_of(flux),
                train.AdapterOptions(
                    arm, o.rank, grid=Grid(bits=o.bits, group=o.group, lora_bits=o.lora_bits)
                ),
            )
        layers = {}
        flux.requires_grad_(False)
        for i, name in enumerate(names_of(flux)):
            old = flux.get_submodule(name)
            weight = (
                old.weight.detach()
                if arm is None
                else IntBase.from_weight(old.weight.detach(), o.bits, o.group).weight()
            )
            layers[name] = FloatLoRA(
                weight, old.bias.detach(), o.rank, torch.Generator().manual_seed(i)
            )
            linears.replace(flux, name, layers[name])
        return layers

    def teach(self, arm: str | None) -> tuple[dict, torch.nn.Module, list[float]]:
        """Trains an arm: layers, model, losses."""
        flux = pictures.load_flux()
        layers = self.attach(flux, arm)
        return layers, flux, self.learn(flux, layers)

    def learn(self, flux, layers: dict) -> list[float]:
        """Trains layers that are in a model: losses."""
        return train.train(
            layers,
            self.loss(flux, 0.75, self.options.batch),
            train.Options(steps=self.options.steps, lr=self.options.lr),
            progress=show_progress,
        )
