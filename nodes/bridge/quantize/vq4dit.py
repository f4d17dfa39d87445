"""The VQ quantize node's work: as `quantizing`, and where the recipe calibrates, the 16-bit model
at work inside ComfyUI as the teacher.

Zero-data calibration follows the sampler's own trajectory (VQ4DiT, Deng et al., 2024,
arXiv:2408.17131, section 3.3): ComfyUI samples with the model from noise, under random conditioning
or the user's prompts, and every call of the diffusion model is recorded and replayed.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import comfy.model_management
import folder_paths
from comfy.model_patcher import ModelPatcher

from ....quant.checkpoint_run import calibrated_on, facts_of, finished
from ....quant.report import Report
from ....quant.vq4dit.quantize import Teacher, plan, quantize_checkpoint
from ....quant.vq4dit.recipe import Recipe
from ..host.progress import Progress
from ..quantized.loading import FOLDER
from . import job as quantizing
from . import record_inputs
from .charts import LiveBlocks

PROMPTS = 8  # random ones of a zero-data calibration


@dataclass
class Job(quantizing.Job):
    """What the user asked for, as in SVDQuant's; steps are the sampler's."""

    recipe: Recipe
    memory_gb: float = 2.0


def recipe_of(
    preset: str,
    bits: int,
    codewords: int = 0,
    vector: int = 0,
    candidates: int = 0,
    steps: int = 0,
    budget_gb: float = 0.0,
    rotation: bool = False,
    **changes,
) -> Recipe:
    """A recipe from a node's inputs, where 0 stands for the preset's own. Raises ValueError in
    plain words.
    """
    return Recipe.from_preset(
        preset,
        bits=bits,
        codewords=codewords or None,
        vector=vector or None,
        candidates=candidates or None,
        steps=steps or None,
        budget_gb=budget_gb or None,
        rotation=64 if rotation else None,
        **changes,
    )


def file_name(origin: str, filename: str, recipe: Recipe) -> str:
    """The new file's name in ComfyUI's lists: as asked for, else beside its origin."""
    kind = f"{recipe.bits}" if recipe.codewords is None else f"-k{recipe.codewords}d{recipe.vector}"
    return quantizing.named(origin, filename, f"vq{kind}-{recipe.preset}")


def run(job: Job) -> tuple[str, Report]:
    """Quantizes; returns the new file's name for the load node, and the report. Raises FileRefused
    and ValueError in plain words.
    """
    source = quantizing.source_of(job)
    target, name = quantizing.place(
        file_name(quantizing.origin_of(job), job.filename, job.recipe), source
    )
    names = [
        layer.name
        for layer in plan(source.shapes, job.recipe, source.name)
        if layer.action != "keep"
    ]
    try:
        report = _known(job, source, target) or _make(job, source, target, name, names)
    finally:
        if job.recipe.calibrated:
            comfy.model_management.unload_all_models()
        comfy.model_management.soft_empty_cache()
    # so that the load node of this very graph finds the file
    folder_paths.filename_list_cache.pop(FOLDER, None)
    return name, report


def _known(job: Job, source, target: Path) -> Report | None:
    """The report of a closed form without prompts that was done before: the model need not even be
    loaded to see it.
    """
    facts = None if job.recipe.calibrated else quantizing.facts_without_prompts(target, source, job)
    return None if facts is None else finished(target, facts_of(source, job.recipe, facts))


def _make(job: Job, source, target: Path, name: str, names: list[str]) -> Report:
    """Draws with the model as far as the recipe needs it, and quantizes."""
    zero_data = (
        dict(prompts=PROMPTS, steps=job.steps, latent=job.latent) if job.recipe.calibrated else {}
    )
    drawing = quantizing.drawing_for(job, source, **zero_data)
    if isinstance(drawing, str) and job.recipe.calibrated:
        why = drawing.partition(", so the weights alone")[0]
        raise ValueError(
            f"The preset {job.recipe.preset!r} watches the 16-bit model while it samples, but"
            f" {why}. Connect 'positive' (and 'model'), or choose the preset 'fast'."
        )
    facts = {"kind": "weights only"} if isinstance(drawing, str) else drawing[1].facts()
    facts |= {"cap_gb": job.memory_gb} if job.recipe.calibrated else {}
    if calibrated_on(target, source, job.recipe) != facts:
        quantizing.refuse_existing(job, target, name)
    elif report := finished(target, facts_of(source, job.recipe, facts)):
        return report
    if isinstance(drawing, str):
        source.notes.append(drawing)
    elif not job.positive:
        source.notes.append(
            "calibrated on noise and random conditioning"
            if job.recipe.calibrated
            else quantizing.MEASURED_ON_NOISE
        )
    if job.recipe.calibrated:
        return _calibrated(job, source, target, *drawing, facts)
    return _closed_form(job, source, target, drawing, facts, names)


def _closed_form(job: Job, source, target: Path, drawing, facts: dict, names: list[str]) -> Report:
    statistics = {}
    if not isinstance(drawing, str) and job.recipe.turns:
        patcher, pictures = drawing
        statistics = record_inputs.record(
            patcher, names, pictures, int(job.memory_gb * 1e9), Progress("measuring", job.node_id)
        )
    comfy.model_management.unload_all_models()  # a model that was only measured is not needed again
    return quantize_checkpoint(
        source,
        target,
        job.recipe,
        statistics.get,
        None,
        Progress("quantizing", job.node_id),
        None,
        Progress.check,
        comfy.model_management.get_torch_device(),
        facts,
    )


def _calibrated(
    job: Job,
    source,
    target: Path,
    patcher: ModelPatcher,
    pictures: record_inputs.Pictures,
    facts: dict,
) -> Report:
    progress, drawn = Progress("calibrating", job.node_id), Progress("drawing", job.node_id)
    live = LiveBlocks(target.stem, f"{job.recipe.preset}, {job.recipe.bits} bits", progress)
    teacher = Teacher(
        patcher.model.diffusion_model,
        lambda: record_inputs.draw(patcher, pictures, _counted(pictures, drawn)),
        cap=int(job.memory_gb * 1e9),
        device=patcher.load_device,
    )
    with _in_training():
        return quantize_checkpoint(
            source,
            target,
            job.recipe,
            None,
            teacher,
            progress,
            live,
            Progress.check,
            patcher.load_device,
            facts,
        )


def _counted(pictures: record_inputs.Pictures, progress: Progress) -> Callable:
    """A sampler's callback that moves the bar over all pictures' steps."""
    total, done = len(pictures.prompts) * pictures.steps, iter(range(1, 1 << 30))
    return lambda *_: progress(min(next(done), total), total, "with the 16-bit model")


@contextlib.contextmanager
def _in_training() -> Iterator[None]:
    """ComfyUI's own switch: its models then compute with operators that have gradients."""
    before, comfy.model_management.in_training = comfy.model_management.in_training, True
    try:
        yield
    finally:
        comfy.model_management.in_training = before
