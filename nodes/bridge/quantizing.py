"""The quantize node's work: find source and target, measure what the layers see, run the pipeline, leave memory as it was."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import comfy.model_management
import comfy.sd
import folder_paths
from comfy.model_patcher import ModelPatcher

from ...quant.architectures import plan, recognise
from ...quant.container import FileRefused
from ...quant.sources import Source, StateDictSource
from ...quant.svdquant.pipeline import calibrated_on, quantize_checkpoint
from ...quant.svdquant.recipe import Recipe
from ...quant.svdquant.report import Report
from . import calibration
from .loading import FOLDER, model_path, quantized_files
from .progress import Progress
from .sources import PatchedWeights

NO_PROMPTS = ("The preset 'best' watches the model draw your own prompts. Connect a text encoder's CONDITIONING to 'positive' "
              "(several prompts: join them with Conditioning (Combine)), or choose the preset 'fast'.")


@dataclass
class Job:
    """What the user asked for. model_name is used unless a model is connected."""

    model_name: str
    recipe: Recipe
    filename: str = ""
    overwrite: bool = False
    model: ModelPatcher | None = None
    positive: list | None = None
    latent: dict | None = None
    steps: int = 8
    memory_gb: float = 4.0
    node_id: str | None = None


def sources() -> list[str]:
    """Files that can be quantized: ComfyUI's diffusion models that are not quantized by Nibble yet."""
    done = set(quantized_files())
    return [name for name in folder_paths.get_filename_list(FOLDER) if name not in done and name.endswith((".safetensors", ".sft"))]


def run(job: Job) -> tuple[str, Report]:
    """Quantizes; returns the new file's name for the load node, and the report. Raises FileRefused and ValueError in plain words."""
    if job.recipe.preset == "best" and not job.positive:
        raise ValueError(NO_PROMPTS)
    source = StateDictSource(PatchedWeights(job.model)) if job.model is not None else Source(model_path(job.model_name))
    target, name = _target(job, source)
    layers = plan(source.shapes, recognise(source.shapes, source.name), job.recipe, source.name)
    names = [layer.name for layer in layers if layer.action != "keep"]
    try:
        facts = _facts_of(target, source, job)
        statistics = {}
        if facts is None:
            facts, statistics = _measure(job, source, target, name, names)
        comfy.model_management.unload_all_models()  # decomposing layers needs VRAM, and a model that was only measured is not needed again
        report = quantize_checkpoint(source, target, job.recipe, statistics.get, Progress("quantizing", job.node_id), Progress.check,
                                     comfy.model_management.get_torch_device(), facts)
    finally:
        comfy.model_management.soft_empty_cache()
    folder_paths.filename_list_cache.pop(FOLDER, None)  # so that the load node of this very graph finds the file
    return name, report


def _measure(job: Job, source, target: Path, name: str, names: list[str]) -> tuple[dict, dict]:
    """(what the statistics come from, the statistics by layer): records the model's inputs, unless the target has the result already."""
    patcher, pictures, notes = _pictures(job, source)
    facts = pictures.facts() if pictures else {"kind": "weights only"}
    if calibrated_on(target, source, job.recipe) == facts:
        return facts, {}
    if target.exists() and not job.overwrite:
        raise FileRefused(f"{name} exists already and was made with other options; switch 'overwrite' on, or give another filename.")
    source.notes += notes
    if pictures is None:
        return facts, {}
    return facts, calibration.record(patcher, names, pictures, int(job.memory_gb * 1e9), Progress("measuring", job.node_id))


def _pictures(job: Job, source) -> tuple[ModelPatcher | None, calibration.Pictures | None, list[str]]:
    """(the 16-bit model, what to draw with it, notes for the report); nothing to draw means weights only."""
    if job.model is None and not job.positive and not calibration.fits_in_memory(source.bytes):
        return None, None, ["the 16-bit model does not fit in memory, so the weights alone were used; connect 'positive' to measure anyway"]
    patcher = job.model if job.model is not None else comfy.sd.load_diffusion_model(str(source.path))
    if job.positive:
        return patcher, calibration.pictures_of(patcher, job.positive, job.latent, job.steps, job.recipe.seed), []
    pictures = calibration.random_pictures(patcher, job.recipe.seed)
    if isinstance(pictures, str):
        return None, None, [f"{pictures}, so the weights alone were used"]
    return patcher, pictures, ["inputs were measured on noise and random conditioning"]


def _facts_of(target: Path, source, job: Job) -> dict | None:
    """The same for a job without prompts: the model need not even be loaded to see that all is done."""
    facts = calibrated_on(target, source, job.recipe) if not job.positive else None
    return facts if facts and facts.get("kind") != "prompts" else None


def file_name(origin: str, filename: str, rank: int) -> str:
    """The new file's name in ComfyUI's lists: as asked for, else beside its origin."""
    name = filename.strip() or str(Path(origin).with_name(f"{Path(origin).name.removesuffix('.safetensors')}-svdq-int4-r{rank}"))
    return name if name.endswith(".safetensors") else f"{name}.safetensors"


def _target(job: Job, source) -> tuple[Path, str]:
    """(path of the new file, its name in ComfyUI's lists): beside the source, else in the first folder that can be written to."""
    origin = job.model_name if job.model is None else f"{type(job.model.model).__name__.lower()}-patched"
    name = file_name(origin, job.filename, job.recipe.rank)
    folders = [Path(folder) for folder in folder_paths.get_folder_paths(FOLDER)]
    home = next((folder for folder in folders if source.path is not None and folder in source.path.parents), None)
    for folder in [home, *folders] if home else folders:
        target = (folder / name).resolve()
        if folder.resolve() not in target.parents:
            raise FileRefused(f"{name} lies outside ComfyUI's {FOLDER} folder; give a plain file name.")
        target.parent.mkdir(parents=True, exist_ok=True) if os.access(folder, os.W_OK) else None
        if os.access(target.parent, os.W_OK):
            return target, os.path.relpath(target, folder.resolve())
    raise FileRefused(f"None of ComfyUI's {FOLDER} folders can be written to ({', '.join(map(str, folders))}); change their permissions.")
