"""TeaCache Sampler's work: SamplerCustomAdvanced's run on a model with caching, drawn while it
goes, compared with an uncached run on request.

The run itself is ComfyUI's own node, so noise, guiders, masks, previews, progress and the Stop
button are exactly its own.
"""

from __future__ import annotations

import copy
import math
import time
from dataclasses import dataclass

import comfy.model_patcher
import comfy.samplers
import torch
from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import WrappersMP

from ....accel.caching.steps import Record
from ..host.progress import Progress
from ..host.samplers import sampler_name
from .apply import apply, notes
from .charts import strip_chart
from .run import uncached
from .settings import CachingChoice


@dataclass(frozen=True)
class SamplingJob:
    """SamplerCustomAdvanced's inputs, how to cache, and what to compare."""

    noise: object
    guider: comfy.samplers.CFGGuider
    sampler: comfy.samplers.Sampler
    sigmas: torch.Tensor
    latent: dict
    choice: CachingChoice
    compare: bool = False
    vae: object | None = None  # compare pictures and not latents
    node_id: str | None = None


@dataclass(frozen=True)
class Sampled:
    """What the node returns: two LATENTs as SamplerCustomAdvanced gives them, and the strip."""

    output: dict
    denoised: dict
    chart: dict


def sample(job: SamplingJob) -> Sampled:
    """Samples with caching. Raises ValueError and FileRefused of `apply` before work starts."""
    strip = _Strip(job)
    model = patcher_of(job.guider)
    cached = apply(model, job.choice, strip.watch)
    output, denoised, seconds = _timed(job, cached)
    summary = [["time", duration(seconds)]]
    if job.compare and strip.record is not None:
        strip.show([*summary, ["against uncached", "sampling once more, to compare"]])
        plain, _, plain_seconds = _timed(job, uncached(model))
        times = plain_seconds / max(seconds, 1e-9)
        summary = [
            ["time", f"{duration(seconds)}; uncached {duration(plain_seconds)}, {times:.2f}×"],
            ["against uncached", difference(output["samples"], plain["samples"], job.vae)],
        ]
    return Sampled(output, denoised, strip.chart(summary))


class _Strip:
    """Draws the run in the node: its record so far, and what an artist should know."""

    def __init__(self, job: SamplingJob):
        self.choice = job.choice
        self.record: Record | None = None
        self._progress = Progress(job.choice.title, job.node_id)
        sentences = notes(
            patcher_of(job.guider),
            job.choice.settings,
            job.choice.calibration,
            job.sigmas,
            sampler_name(job.sampler),
        )
        self._notes = [["note", sentence] for sentence in sentences]

    def watch(self, record: Record) -> None:
        self.record = record
        self.show([])

    def show(self, summary: list) -> None:
        self._progress.show(self.chart(summary))

    def chart(self, summary: list) -> dict:
        title, subtitle = self.choice.title, self.choice.subtitle
        if self.record is None:
            nothing = ["note", "there were no steps to sample"]
            return {"kind": "facts", "title": title, "summary": [nothing]}
        return strip_chart(self.record, title, subtitle, [*summary, *self._notes])


def patcher_of(guider) -> ModelPatcher:
    """A clone of the guider's model with the guider's own options, which other nodes may have
    changed.
    """
    model = guider.model_patcher.clone()
    model.model_options = comfy.model_patcher.create_model_options_clone(guider.model_options)
    return model


def _on(guider, model: ModelPatcher):
    """The guider on another model; the original, which other nodes hold, stays as it is."""
    guider = copy.copy(guider)
    guider.model_patcher, guider.model_options = model, model.model_options
    return guider


def _timed(job: SamplingJob, model: ModelPatcher) -> tuple[dict, dict, float]:
    """SamplerCustomAdvanced's two outputs with the guider on this model, and the seconds of the
    sampling loop alone, without loading the model.
    """
    # here: a change there must not keep the pack from loading
    from comfy_extras.nodes_custom_sampler import SamplerCustomAdvanced

    model, seconds = model.clone(), []

    def clock(executor, *args, **kwargs):
        began = time.perf_counter()
        samples = executor(*args, **kwargs)
        samples.flatten()[:1].tolist()  # waits for the GPU
        seconds.append(time.perf_counter() - began)
        return samples

    model.add_wrapper_with_key(WrappersMP.SAMPLER_SAMPLE, "nibble_clock", clock)
    output, denoised = SamplerCustomAdvanced.execute(
        job.noise, _on(job.guider, model), job.sampler, job.sigmas, job.latent
    ).result
    return output, denoised, sum(seconds)


def difference(ours: torch.Tensor, reference: torch.Tensor, vae=None) -> str:
    """PSNR in dB in words: of decoded pictures (peak 1) where there is a VAE, else of latents
    (peak: the reference's range).
    """
    if vae is not None:
        return _decibels(vae.decode(ours), vae.decode(reference), 1.0, "the picture")
    pairs = list(zip(_streams(ours), _streams(reference), strict=True))
    peak = max(float(old.max() - old.min()) for _, old in pairs)
    return _decibels(
        *(torch.cat([pair[side].flatten() for pair in pairs]) for side in (0, 1)),
        peak,
        "the latent",
    )


def _streams(samples) -> list[torch.Tensor]:
    return list(samples.unbind()) if getattr(samples, "is_nested", False) else [samples]


def _decibels(ours: torch.Tensor, reference: torch.Tensor, peak: float, of: str) -> str:
    error = (ours.double() - reference.double()).square().mean().item()
    if error == 0:
        return f"{of} is the same bit for bit"
    return f"{10 * math.log10(max(peak, 1e-12) ** 2 / error):.1f} dB PSNR of {of}"


def duration(seconds: float) -> str:
    """Seconds for people: 3.2 s, 41 s, 2 min 5 s."""
    if seconds < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    return f"{int(seconds) // 60} min {int(seconds) % 60} s"
