"""The quantize node's work: find source and target, measure what the layers see, run the pipeline,
leave memory as it was.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import comfy.model_management
import comfy.sd
import folder_paths
from comfy.model_patcher import ModelPatcher

from ....quant.architectures import plan, recognise
from ....quant.files.checkpoint import FileRefused
from ....quant.files.source import Source, StateDictSource
from ....quant.report import Report
from ....quant.svdquant.quantize import calibrated_on, quantize_checkpoint
from ....quant.svdquant.recipe import Recipe
from ..host.progress import Progress
from ..quantized.loading import FOLDER, model_path, quantized_files
from . import record_inputs
from .patched_weights import PatchedWeights

NO_PROMPTS = (
    "The preset 'best' watches the model while it samples your own prompts. Connect a text"
    " encoder's CONDITIONING to 'positive' (join several prompts with Conditioning (Combine)), or"
    " choose the preset 'fast'."
)
MEASURED_ON_NOISE = "inputs were measured on noise and random conditioning"


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
    """Files that can be quantized: ComfyUI's diffusion models that are not quantized by
    Nibble yet.
    """
    done = set(quantized_files())
    return [
        name
        for name in folder_paths.get_filename_list(FOLDER)
        if name not in done and name.endswith((".safetensors", ".sft"))
    ]


def run(job: Job) -> tuple[str, Report]:
    """Quantizes; returns the new file's name for the load node, and the report. Raises FileRefused
    and ValueError in plain words.
    """
    if job.recipe.preset == "best" and not job.positive:
        raise ValueError(NO_PROMPTS)
    source = source_of(job)
    target, name = place(file_name(origin_of(job), job.filename, job.recipe.rank), source)
    layers = plan(source.shapes, recognise(source.shapes, source.name), job.recipe, source.name)
    names = [layer.name for layer in layers if layer.action != "keep"]
    try:
        facts = facts_without_prompts(target, source, job)
        statistics = {}
        if facts is None:
            facts, statistics = _measure(job, source, target, name, names)
        # decomposing layers needs VRAM, and a model that was only measured is not needed again
        comfy.model_management.unload_all_models()
        report = quantize_checkpoint(
            source,
            target,
            job.recipe,
            statistics.get,
            Progress("quantizing", job.node_id),
            Progress.check,
            comfy.model_management.get_torch_device(),
            facts,
        )
    finally:
        comfy.model_management.soft_empty_cache()
    # so that the load node of this very graph finds the file
    folder_paths.filename_list_cache.pop(FOLDER, None)
    return name, report


def _measure(job: Job, source, target: Path, name: str, names: list[str]) -> tuple[dict, dict]:
    """(what the statistics come from, the statistics by layer): records the model's inputs, unless
    the target has the result already.
    """
    drawing = drawing_for(job, source)
    facts = {"kind": "weights only"} if isinstance(drawing, str) else drawing[1].facts()
    if calibrated_on(target, source, job.recipe) == facts:
        return facts, {}
    refuse_existing(job, target, name)
    if isinstance(drawing, str):
        source.notes.append(drawing)
        return facts, {}
    patcher, pictures = drawing
    source.notes += [] if job.positive else [MEASURED_ON_NOISE]
    return facts, record_inputs.record(
        patcher, names, pictures, int(job.memory_gb * 1e9), Progress("measuring", job.node_id)
    )


def refuse_existing(job, target: Path, name: str) -> None:
    """Raises FileRefused where another file stands in the way and may not be replaced."""
    if target.exists() and not job.overwrite:
        raise FileRefused(
            f"{name} exists already and was made with other options; switch 'overwrite' on, or give"
            " another filename."
        )


def drawing_for(job, source, **random) -> tuple[ModelPatcher, record_inputs.Pictures] | str:
    """(the 16-bit model, what to draw with it), or why the weights alone are used. random: changes
    of `calibration.random_pictures`.
    """
    if job.model is None and not job.positive and not record_inputs.fits_in_memory(source.bytes):
        return (
            "the 16-bit model does not fit in memory, so the weights alone were used; connect"
            " 'positive' to measure anyway"
        )
    patcher = (
        job.model if job.model is not None else comfy.sd.load_diffusion_model(str(source.path))
    )
    if job.positive:
        return patcher, record_inputs.pictures_of(
            patcher, job.positive, job.latent, job.steps, job.recipe.seed
        )
    pictures = record_inputs.random_pictures(patcher, job.recipe.seed, **random)
    return (
        f"{pictures}, so the weights alone were used"
        if isinstance(pictures, str)
        else (patcher, pictures)
    )


def facts_without_prompts(target: Path, source, job) -> dict | None:
    """The same for a job without prompts: the model need not even be loaded to see that all is
    done.
    """
    facts = calibrated_on(target, source, job.recipe) if not job.positive else None
    return facts if facts and facts.get("kind") != "prompts" else None


def file_name(origin: str, filename: str, rank: int) -> str:
    """The new file's name in ComfyUI's lists: as asked for, else beside its origin."""
    return named(origin, filename, f"svdq-int4-r{rank}")


def named(origin: str, filename: str, ending: str) -> str:
    """The same for any method: its ending is added to the origin's name."""
    name = filename.strip() or str(
        Path(origin).with_name(f"{Path(origin).name.removesuffix('.safetensors')}-{ending}")
    )
    return name if name.endswith(".safetensors") else f"{name}.safetensors"


def source_of(job) -> Source | StateDictSource:
    """The weights to quantize: the connected model's, else the file's."""
    return (
        StateDictSource(PatchedWeights(job.model))
        if job.model is not None
        else Source(model_path(job.model_name))
    )


def origin_of(job) -> str:
    """What the new file is named after."""
    return (
        job.model_name if job.model is None else f"{type(job.model.model).__name__.lower()}-patched"
    )


def place(name: str, source) -> tuple[Path, str]:
    """(path of the new file, its name in ComfyUI's lists): beside the source, else in the first
    folder that can be written to.
    """
    folders = [Path(folder) for folder in folder_paths.get_folder_paths(FOLDER)]
    home = next(
        (folder for folder in folders if source.path is not None and folder in source.path.parents),
        None,
    )
    for folder in [home, *folders] if home else folders:
        target = (folder / name).resolve()
        if folder.resolve() not in target.parents:
            raise FileRefused(
                f"{name} lies outside ComfyUI's {FOLDER} folder; give a plain file name."
            )
        target.parent.mkdir(parents=True, exist_ok=True) if os.access(folder, os.W_OK) else None
        if os.access(target.parent, os.W_OK):
            return target, os.path.relpath(target, folder.resolve())
    raise FileRefused(
        f"None of ComfyUI's {FOLDER} folders can be written to ({', '.join(map(str, folders))});"
        " change their permissions."
    )
