"""Pictures and captions to train on, and the loss: LATENTs and CONDITIONINGs.

    loss = f(x0(x_t, t), x_0)     x_t = model_sampling.noise_scaling(sigma(t), noise, x_0)

with t uniform in 0..1 and x0 the model's denoised picture: the loss of ComfyUI's Train LoRA. For a
flow model x0 - x_0 = sigma (v* - v).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass

import comfy.sample
import torch
from comfy.latent_formats import LatentFormat
from comfy.model_patcher import ModelPatcher
from torch import Tensor

from .session import Session

LOSSES = {
    "MSE": torch.nn.functional.mse_loss,
    "L1": torch.nn.functional.l1_loss,
    "Huber": torch.nn.functional.huber_loss,
    "SmoothL1": torch.nn.functional.smooth_l1_loss,
}
PREVIEW_STEPS = 8


@dataclass(frozen=True)
class Dataset:
    """latents: (1, C, [T,] h, w) each, as a VAE gives them; captions: ComfyUI's conditioning
    entries, one for all or one for each.
    """

    latents: list[Tensor]
    captions: list[list]

    def digest(self) -> str:
        """16 hex digits of all pictures and captions."""
        sha = hashlib.sha256(repr([tuple(latent.shape) for latent in self.latents]).encode())
        for tensor in [*self.latents, *_tensors(self.captions)]:
            sha.update(tensor.detach().float().cpu().contiguous().numpy().tobytes())
        return sha.hexdigest()[:16]

    def loss(self, session: Session, generator: torch.Generator) -> Tensor:
        """The mean loss of a batch; pictures, times and noise are drawn from the generator, on the
        CPU.
        """
        chosen = torch.randperm(len(self.latents), generator=generator)[
            : session.settings.batch
        ].tolist()
        percents = torch.rand(len(chosen), generator=generator).tolist()
        noises = [torch.randn(self.latents[i].shape, generator=generator) for i in chosen]
        # pictures of one caption and size go through the model together
        groups: dict[tuple, list[int]] = {}
        for place, i in enumerate(chosen):
            groups.setdefault((self._caption(i), self.latents[i].shape), []).append(place)
        losses = [
            self._loss(
                session,
                caption,
                [chosen[p] for p in places],
                [percents[p] for p in places],
                [noises[p] for p in places],
            )
            * len(places)
            for (caption, _), places in groups.items()
        ]
        return torch.stack(losses).sum() / len(chosen)

    def _caption(self, picture: int) -> int:
        return picture if len(self.captions) > 1 else 0

    def _loss(
        self,
        session: Session,
        caption: int,
        chosen: list[int],
        percents: list[float],
        noises: list[Tensor],
    ) -> Tensor:
        sampling = session.inner.model_sampling
        clean = session.inner.process_latent_in(torch.cat([self.latents[i] for i in chosen])).to(
            session.device
        )
        sigmas = torch.tensor(
            [float(sampling.percent_to_sigma(percent)) for percent in percents],
            device=session.device,
        )
        noisy = sampling.noise_scaling(sigmas, torch.cat(noises).to(session.device), clean, False)
        denoised = session.denoised(noisy, sigmas, [caption] * len(chosen), clean[:1])
        return LOSSES[session.settings.loss](denoised.float(), clean.float())

    def draw(self, session: Session) -> Tensor:
        """The first caption drawn as the model now would, always from the same noise, as large as
        the first picture.
        """
        noise = comfy.sample.prepare_noise(
            torch.zeros_like(self.latents[0]), session.settings.seed
        ).to(session.device)
        return session.euler(noise, 0, PREVIEW_STEPS)


def _tensors(value: object) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for name in sorted(value, key=str):
            yield from _tensors(value[name])
    elif isinstance(value, (list, tuple)):
        for part in value:
            yield from _tensors(part)


def dataset_of(model: ModelPatcher, latents: list[dict], positive: list[list]) -> Dataset:
    """LATENTs and CONDITIONINGs, in the order of ComfyUI's dataset nodes. Raises ValueError in
    plain words for what cannot be trained on.
    """
    latent_format = model.get_model_object("latent_format")
    pictures: list[Tensor] = []
    for latent in latents:
        samples = latent["samples"]
        if samples.is_nested:
            raise ValueError(
                "The latents hold several streams (video with sound), which cannot be trained on"
                " here; connect the pictures' latents alone."
            )
        if latent_format.latent_dimensions == 3 and samples.ndim == 4:
            samples = samples.unsqueeze(2)
        _check(samples, latent_format)
        pictures += [samples[i : i + 1].detach().cpu().float().clone() for i in range(len(samples))]
    captions = [entry for conditioning in positive for entry in conditioning]
    if not pictures:
        raise ValueError("There are no latents to train on; connect pictures through VAE Encode.")
    if len(captions) not in (1, len(pictures)):
        raise ValueError(
            f"There are {len(pictures)} latents and {len(captions)} prompts; connect one prompt for"
            " all pictures, or one for each."
        )
    return Dataset(pictures, captions)


def _check(samples: Tensor, latent_format: LatentFormat) -> None:
    if (
        samples.ndim != 2 + latent_format.latent_dimensions
        or samples.shape[1] != latent_format.latent_channels
    ):
        raise ValueError(
            f"The latents are {' x '.join(map(str, samples.shape))}, and this model's have"
            f" {latent_format.latent_channels} channels in {latent_format.latent_dimensions}"
            " dimensions; encode the pictures with this model's own VAE."
        )
    if not samples.isfinite().all():
        raise ValueError(
            "The latents hold values that are not finite; look at the pictures and the VAE that"
            " they come from."
        )
    if not samples.any():
        raise ValueError(
            "The latents are empty; connect pictures through VAE Encode in place of an empty"
            " latent."
        )
