"""Make CAF Couplings: noise, and the picture that the connected model, sampler and sigmas make of
it, stored pair by pair.

    x0 = noise_scaling(sigma_0, randn(seed + i), 0)     x1 = what the sampler makes of x0     (both
      in the model's own latent units; x0 as it lies on the straight line, `straight.py`)

ComfyUI's own guider and sampler draw the pictures, so guidance, LoRAs and whatever else is on the
model are in them; both sides are taken where the sampler begins and ends, before ComfyUI turns
latents into those of the VAE. `accel/caf/couplings.py` stores them.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from functools import cached_property
from pathlib import Path

import comfy.sample
import comfy.samplers
import folder_paths
import torch
from comfy.model_patcher import ModelPatcher
from torch import Tensor

from ....accel.caf import conditioning_tree, couplings
from ....accel.caf.couplings import Couplings
from ....quant.files import atomic
from ..host import file_names
from ..host.charts import size
from ..host.fingerprint import fingerprint, patches_fingerprint
from ..host.progress import Progress
from ..host.samplers import previewer
from .teacher import DEFAULT, CouplingsJob, Teacher, check_teacher, teacher_name

# in ComfyUI's output folder
FOLDER = "caf_couplings"
# a prompt with these says nothing at some times or places
_PARTS = ("area", "mask", "start_percent", "end_percent")
EVERY = 1.0  # seconds between two drawings of the facts


def make_couplings(job: CouplingsJob) -> tuple[Couplings, dict]:
    """(the first `count` pairs, a chart of facts). Raises ValueError and FileRefused in plain words
    before anything is loaded, and ComfyUI's interrupt.
    """
    empty, prompts = _empty(job.model, job.latents), _prompts(job.positive)
    negative = None
    if job.negative is not None:
        negative = [entry for conditioning in job.negative for entry in conditioning]
    if negative is None and job.cfg != 1:
        raise ValueError(
            f"cfg is {job.cfg:g} and there is no negative prompt to guide away from; connect one,"
            " or set cfg to 1."
        )
    check_teacher(job)
    couplings.encoded(prompts)  # refuses what no file can hold, before there is a folder
    folder = couplings.home(folder_of(job.filename))
    with atomic.exclusive(folder):
        identity = _identity(job, empty, negative)
        found = couplings.create(folder, identity, prompts, job.overwrite)
        return _made(job, found, Teacher(job, empty, negative), prompts)


def _made(
    job: CouplingsJob, found: Couplings, teacher: Teacher, prompts: list[list]
) -> tuple[Couplings, dict]:
    """Draws the pairs that are missing, while the folder is held."""
    missing = [pair for pair in range(job.count) if pair not in found]
    watch = _Watch(job, found, len(missing))
    for pairs in _groups(missing, len(prompts), job.batch):
        prompt = pairs[0] % len(prompts)
        start, data = teacher.draw(prompts[prompt], pairs, watch.step(pairs))
        if not data.isfinite().all():
            raise ValueError(
                f"The picture of pair {pairs[0]} holds values that are not finite; load the model"
                f" in bf16 or fp32, or choose another sampler. The {len(found)} pairs before are"
                " kept."
            )
        found.add(pairs, start, data, [prompt] * len(pairs))
        watch.stored(len(pairs), data)
    return found.limited(job.count), watch.chart()


def folder_of(filename: str) -> Path:
    """Where couplings of that name lie. Raises FileRefused for what is no plain name."""
    name = file_names.chosen(filename, DEFAULT, "", f"output/{FOLDER}", subfolders=False)
    return Path(folder_paths.get_output_directory()) / FOLDER / name


# ---- before work starts


def _empty(model: ModelPatcher, latents: list[dict]) -> Tensor:
    """An empty latent (1, …) of the size that is asked for. Raises ValueError in plain words for
    latents that do not fit.
    """
    form, found = model.get_model_object("latent_format"), []
    for latent in latents:
        samples = latent["samples"]
        if not samples.is_nested:
            samples = comfy.sample.fix_empty_latent_channels(
                model,
                samples[:1],
                latent.get("downscale_ratio_spacial"),
                latent.get("downscale_ratio_temporal"),
            )
        if samples.is_nested:
            raise ValueError(
                "The latent holds several streams (video with sound), which cannot be coupled here;"
                " choose a model of pictures alone."
            )
        if latent.get("noise_mask") is not None:
            raise ValueError(
                "The latent has a mask, and couplings are made of whole pictures; connect an empty"
                " latent."
            )
        if (
            samples.ndim != 2 + form.latent_dimensions
            or samples.shape[1] != form.latent_channels
            or not samples.numel()
        ):
            raise ValueError(
                f"The latent is {_by(samples.shape)}, and this model's have {form.latent_channels}"
                f" channels in {form.latent_dimensions} dimensions; connect the empty latent that"
                " belongs to this model."
            )
        found.append(torch.zeros(samples.shape))
    if len({latent.shape for latent in found}) != 1:
        raise ValueError(
            "The latents are of several sizes"
            f" ({', '.join(sorted({_by(latent.shape) for latent in found}))}); make the couplings"
            " of each size under a filename of its own."
        )
    return found[0]


def _by(shape: torch.Size) -> str:
    return " x ".join(map(str, shape))


def _prompts(positive: list[list]) -> list[list]:
    """All entries. Raises ValueError where there are none, and for parts of prompts."""
    found = [[entry[0], dict(entry[1])] for conditioning in positive for entry in conditioning]
    if not found:
        raise ValueError("There are no prompts; connect at least one.")
    for number, (_, extras) in enumerate(found, 1):
        part = next(
            (
                key
                for key in _PARTS
                if extras.get(key) is not None
                and (key, extras[key]) not in (("start_percent", 0.0), ("end_percent", 1.0))
            ),
            None,
        )
        if part:
            raise ValueError(
                f"Prompt {number} is for a part of the picture or of the steps only ({part}), and"
                " each prompt makes pictures of its own here; connect whole prompts."
            )
    return found


def _identity(job: CouplingsJob, empty: Tensor, negative: list | None) -> dict:
    """All that the pairs depend on and that can be seen, in the order in which differences are
    told.
    """
    nodes, tensors = [], []
    if negative is not None:
        nodes = [
            conditioning_tree.encode(list(entry), tensors, "the negative prompt")
            for entry in negative
        ]
    options = {
        name: value if isinstance(value, (bool, int, float, str)) else type(value).__name__
        for name, value in getattr(job.sampler, "extra_options", {}).items()
    }
    return {
        "seed": job.seed,
        "cfg": job.cfg,
        "sampler": teacher_name(job.sampler),
        "sampler options": options,
        "shape": list(empty.shape[1:]),
        "steps": len(job.sigmas) - 1,
        "sigmas": [round(float(sigma), 6) for sigma in job.sigmas],
        "model": type(job.model.model).__name__,
        "weights": fingerprint(job.model),
        "LoRAs": patches_fingerprint(job.model),
        "negative prompt": conditioning_tree.digest(nodes, tensors)
        if negative is not None
        else None,
    }


# ---- the work


def _groups(missing: list[int], prompts: int, batch: int) -> list[list[int]]:
    """Pairs that are drawn together: of one prompt, at most `batch`; all prompts take turns, so
    that a stopped run has pairs of many.
    """
    found: dict[tuple[int, int], list[int]] = {}
    for pair in missing:
        found.setdefault((pair // (prompts * batch), pair % prompts), []).append(pair)
    return list(found.values())


class _Watch:
    """Sees every step: bar, text, facts so far, a preview of each batch, Stop."""

    def __init__(self, job: CouplingsJob, found: Couplings, missing: int):
        self.job, self.found, self.missing, self.made = job, found, missing, 0
        self.steps, self.before = len(job.sigmas) - 1, job.count - missing
        self.report, self.began, self.drawn = (
            Progress("couplings", job.node_id),
            time.monotonic(),
            0.0,
        )

    @cached_property
    def previewer(self):
        return previewer(
            self.job.model.load_device, self.job.model.get_model_object("latent_format")
        )

    def step(self, pairs: list[int]) -> Callable:
        """The sampler's callback for a batch."""
        there, count = self.before + self.made, self.job.count
        which = (
            f"pair {there + 1}" if len(pairs) == 1 else f"pairs {there + 1} to {there + len(pairs)}"
        )

        def callback(step, x0, x, total):
            done = min(step + 1, self.steps)
            left = self.left(self.made + len(pairs) * done / self.steps)
            self.report(
                there * self.steps + done * len(pairs),
                count * self.steps,
                f"{which} of {count}, step {done} of {self.steps}{left}",
            )

        return callback

    def left(self, made: float) -> str:
        """In words, how long it will take; nothing until a batch is done (the first one waits for
        the model), and in the last seconds.
        """
        seconds = (self.missing - made) * (time.monotonic() - self.began) / made
        if not self.made or seconds < 2:
            return ""
        return (
            f", about {seconds:.0f} s left"
            if seconds < 90
            else f", about {seconds / 60:.0f} min left"
        )

    def stored(self, count: int, data: Tensor) -> None:
        """A batch is on disk."""
        self.made += count
        if self.previewer is not None:
            preview = self.previewer.decode_latent_to_preview_image(
                "JPEG", data[:1].to(self.job.model.load_device)
            )
            self.report.picture(
                (self.before + self.made) * self.steps, self.job.count * self.steps, preview
            )
        if time.monotonic() - self.drawn > EVERY or self.made == self.missing:
            self.report.show(self.chart())
            self.drawn = time.monotonic()

    def chart(self) -> dict:
        """A chart of kind "facts" (`charts.py`)."""
        job, found = self.job, self.found.limited(self.job.count)
        guidance = f", cfg {job.cfg:g}" if job.cfg != 1 else ""
        speed = (
            f"{(time.monotonic() - self.began) / self.made:.3g} s"
            if self.made
            else "made already, with the same inputs"
        )
        return {
            "kind": "facts",
            "title": found.folder.name,
            "summary": [
                ["pairs", f"{len(found)} of {job.count}"],
                ["prompts", str(len(found.captions))],
                ["latent", _by(found.shape)],
                ["teacher", f"{teacher_name(job.sampler)}, {self.steps} steps{guidance}"],
                ["size", size(found.nbytes)],
                ["time per pair", speed],
                [
                    "folder",
                    os.path.relpath(found.folder, Path(folder_paths.get_output_directory()).parent),
                ],
            ],
        }
