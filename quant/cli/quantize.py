"""nibble quantize SOURCE TARGET: prepare, measure outside ComfyUI, write.

Only FLUX.1 can be run here (by diffusers). The preset fast records what costs little: a FLUX.1 that
fits under the memory cap in float32, on random conditioning. What is drawn, and what the file says
of it, is what ComfyUI's node draws of the same prompts.
"""

import argparse
import math
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from ...kernels.optional import optional
from ..calibration import pictures as drawn_pictures
from ..files import prompts as prompts_file
from ..files import text_encoders
from ..files.checkpoint import open_quantized
from ..files.errors import FileRefused
from ..files.prompts import Prompts
from ..files.report import Report
from ..files.source_files import open_stored
from ..job.checkpoint_run import QuantizeJob
from ..job.measurement import Measurement
from ..svdquant.recipe import WIDE_SHARE
from ..svdquant.recipe import Recipe as SVDQuantRecipe
from ..svdquant.stock.recipe import StockRecipe
from ..vq4dit.recipe import Recipe as VQRecipe
from . import methods
from .console import Bar, print_summary

WEIGHTS_ALONE = Measurement({"kind": "weights only"})
_WIDTHS = ("activations", "share_8bit")
# method → its options, each with the field of its recipe
_OPTIONS = {
    "svdquant": {
        "rank": "rank",
        "solver": "solver",
        "rotation": "rotation",
        "gptq": "gptq",
        "w4a16": "w4a16",
        "format": "format",
        "group": "group",
        "compare": "compare",
    },
    "stock": {"format": "format", "gptq": "gptq"},
    "vq": {
        "bits": "bits",
        "codewords": "codewords",
        "vector": "vector",
        "budget": "budget_gb",
        "candidates": "candidates",
        "steps": "steps",
    },
}
AnyRecipe = SVDQuantRecipe | StockRecipe | VQRecipe
RECIPES: dict[str, type[AnyRecipe]] = {
    "svdquant": SVDQuantRecipe,
    "stock": StockRecipe,
    "vq": VQRecipe,
}


def quantize(options: argparse.Namespace) -> None:
    """SOURCE → TARGET, with a progress bar and a summary."""
    print_summary(options.target, run(options).summary())


def run(options: argparse.Namespace) -> Report:
    """SOURCE → TARGET, with a progress bar unless `options.quiet`. Raises FileRefused and
    ValueError before anything is written.
    """
    _check_numbers(options)
    _encoders_own(options)
    job = methods.prepare(options.source, options.target, _recipe(options))
    if not options.overwrite:
        _keep_another(job)
    measurement = _measure(options, job)
    with Bar(shown=not options.quiet) as bar:
        return job.write(measurement, bar.monitor, options.device)


def _check_numbers(options: argparse.Namespace) -> None:
    """Refuses a device that is not there and an amount of memory that nothing can have."""
    try:
        torch.empty(1, device=options.device)
    # torch raises either, and AssertionError where it was built without CUDA
    except (RuntimeError, AssertionError, ImportError, ValueError) as error:
        said = str(error).strip().partition("\n")[0]
        raise ValueError(
            f"--device {options.device} cannot be used by this torch {torch.__version__} ({said});"
            " give cpu, or the name of a device that it has"
        ) from error
    if not options.memory_cap >= 0:
        raise ValueError(
            f"--memory-cap {options.memory_cap:g} is less than nothing; give GB, 0 or more"
        )


def _keep_another(job: QuantizeJob) -> None:
    """Refuses to replace an intact file of another model or recipe; one that is damaged or of
    another version is made again.
    """
    if job.existing is not None or not job.target.exists():
        return
    try:
        open_quantized(job.target)
    except FileRefused:
        return
    raise _another(job)


def _another(job: QuantizeJob) -> FileRefused:
    return FileRefused(
        f"{job.target.name} exists and was made with other options or of another model; choose"
        " another name, or add --overwrite."
    )


def _measured(
    options: argparse.Namespace, job: QuantizeJob, measurement: Measurement
) -> Measurement:
    """A measurement to write with. Raises FileRefused where the target was made on another."""
    existing = job.existing
    if existing is not None and not options.overwrite:
        if existing.fact("calibration") != measurement.provenance:
            raise _another(job)
    return measurement


def _encoders_own(options: argparse.Namespace) -> None:
    """What a text encoder gets where nothing else is asked for: W4A8 without a branch, closer than
    4-bit weights alone at the same size (docs/benchmarks.md).
    """
    source = Path(options.source)
    chosen = (options.format, options.rank, options.activations, options.group)
    if options.method != "svdquant" or any(value is not None for value in chosen):
        return
    if source.is_file() and source.suffix in (".safetensors", ".gguf"):
        shapes = {name: info.shape for name, info in open_stored(source).tensors.items()}
        if text_encoders.family_of(shapes) is not None:
            options.format, options.rank = "svdquant_w4a8", 0


def _recipe(options: argparse.Namespace) -> AnyRecipe:
    """The method's recipe. Raises ValueError for options of the other methods."""
    own = _OPTIONS[options.method]
    for method, names in _OPTIONS.items():
        _refuse_options(options, names.keys() - own.keys() - {"steps"}, method)
    changes: dict[str, Any] = {field: getattr(options, name) for name, field in own.items()}
    if options.method == "svdquant":
        changes |= _widths(options)
    else:
        _refuse_options(options, _WIDTHS, "svdquant")
    modulation = options.modulation
    if modulation == "w4a16":  # 4-bit weights: as any other layer's, where there are no such
        modulation = {"vq": "vq", "stock": "quantize"}.get(options.method, modulation)
    return RECIPES[options.method].from_preset(
        options.preset, keep=options.keep, seed=options.seed, modulation=modulation, **changes
    )


def _widths(options: argparse.Namespace) -> dict[str, Any]:
    """Fields of the recipe for the bits of activations."""
    if options.activations != "auto":
        if options.share_8bit is not None:
            raise ValueError(
                "--share-8bit belongs to --activations auto; leave it out, or add that"
            )
        return {"act_bits": options.activations and int(options.activations)}
    return {"wide_share": WIDE_SHARE if options.share_8bit is None else options.share_8bit}


def _refuse_options(options: argparse.Namespace, names: Iterable[str], method: str) -> None:
    for name in names:
        if getattr(options, name) is not None:
            raise ValueError(
                f"--{name.replace('_', '-')} belongs to --method {method}; leave it out, or choose"
                " that method"
            )


def _measure(options: argparse.Namespace, job: QuantizeJob) -> Measurement:
    """Records the layers' inputs, or gives the model at work, as far as the recipe needs it and the
    target has not got it already.
    """
    fast = options.preset == "fast"
    if job.architecture != "FLUX.1":
        if fast:
            return _measured(options, job, WEIGHTS_ALONE)
        node = {"vq": "VQ Quantize Checkpoint"}.get(options.method, "SVDQuant Quantize Checkpoint")
        if text_encoders.family_of(job.source.shapes) is not None:
            node = "Quantize Text Encoder"
        raise ValueError(
            f"{job.source.name} is a {job.architecture}, and outside ComfyUI only FLUX.1 can be"
            f" calibrated; use --preset fast, or the node {node} in ComfyUI"
        )
    prompts = None if options.prompts is None else prompts_file.read(options.prompts)
    in_float32 = 4 * sum(map(math.prod, job.source.shapes.values()))
    if fast and prompts is None and in_float32 > options.memory_cap * 1e9:
        return _measured(options, job, WEIGHTS_ALONE)
    diffusers, why = optional("..diffusers", __package__)
    if diffusers is None:
        if fast and prompts is None:
            return _weights_alone(options, job, why)
        raise ValueError(
            f"--preset {options.preset} needs diffusers to run the model, and {why}; pip install"
            " --upgrade diffusers, or use --preset fast without --prompts"
        )
    drawing = _drawing(diffusers, options, job, prompts)
    provenance = drawing.provenance()
    job.source.notes.extend(_notes(job, drawing))
    _measured(options, job, Measurement(provenance))
    if job.existing_report(provenance) is not None:
        return Measurement(provenance)
    cap = int(options.memory_cap * 1e9)
    state = {name: job.source.read(name).float() for name in job.source.shapes}
    if options.method == "vq" and not fast:
        return Measurement(provenance, teacher=diffusers.flux_teacher(state, drawing, cap))
    with Bar("tokens", not options.quiet) as bar:
        statistics = diffusers.record_inputs(
            state,
            job.quantized_names,
            drawing,
            cap,
            report=lambda done, total: bar(done, total, "recording inputs"),
        )
    return Measurement(provenance, statistics.get)


def _drawing(
    diffusers: Any, options: argparse.Namespace, job: QuantizeJob, prompts: Prompts | None
) -> Any:
    """A `diffusers.Drawing`: of the prompts, or of random conditioning; as typed, else as the file
    of prompts says, else as ComfyUI's node has it. Raises ValueError for what no FLUX.1 draws.
    """
    typed: dict[str, Any] = {
        name: getattr(options, name)
        for name in ("steps", "shift", "seed")
        if getattr(options, name) is not None
    }
    if options.method == "vq":
        typed.pop("steps", None)  # of calibration there
    for name, value in (("--width", options.width), ("--height", options.height)):
        if value is not None and (value < 16 or value % 16):
            raise ValueError(f"{name} {value} is not a multiple of 16 pixels")
    if typed.get("steps", 1) < 1:
        raise ValueError(f"--steps {typed['steps']} is less than 1")
    shapes = {name: torch.empty(shape, device="meta") for name, shape in job.source.shapes.items()}
    if prompts is None:
        size = _size(options, drawn_pictures.RANDOM_PIXELS)
        return diffusers.Drawing.without_data(shapes, _random_prompts(options), size=size, **typed)
    wanted = (shapes["txt_in.weight"].shape[1], shapes["vector_in.in_layer.weight"].shape[1])
    found = (prompts.tokens[0].shape[1], prompts.pooled.shape[1])
    if wanted != found:
        raise FileRefused(
            f"{options.prompts.name} holds prompts of {found[0]} and {found[1]} channels, and"
            f" {job.source.name} reads {wanted[0]} and {wanted[1]}; save them with this model's"
            " text encoders."
        )
    told = {"shift": diffusers.shift_of(shapes), "size": prompts.size}
    if prompts.guidance is not None:
        told["guidance"] = prompts.guidance
    if prompts.size is None or options.width or options.height:
        told["size"] = _size(options, drawn_pictures.PROMPT_PIXELS)
    return diffusers.Drawing(prompts.tokens, prompts.pooled, **(told | typed))


def _random_prompts(options: argparse.Namespace) -> int:
    """How many pictures of random conditioning: more where a recipe calibrates on them."""
    if options.preset == "fast":
        return drawn_pictures.RANDOM_PROMPTS
    svdquant = options.method == "svdquant"
    return drawn_pictures.ENOUGH_PROMPTS if svdquant else drawn_pictures.TEACHER_PROMPTS


def _size(options: argparse.Namespace, default: int) -> tuple[int, int]:
    """(height, width) of the latents, an eighth of the picture's; default: pixels."""
    height = options.height or options.width or default
    return height // 8, (options.width or height) // 8


def _notes(job: QuantizeJob, drawing: Any) -> list[str]:
    """What the report says of a measurement that was not on enough prompts."""
    if drawing.kind == drawn_pictures.RANDOM:
        calibrated = getattr(job.recipe, "calibrated", False)
        return [drawn_pictures.ON_NOISE_CALIBRATED if calibrated else drawn_pictures.ON_NOISE]
    few = len(drawing.tokens) < drawn_pictures.ENOUGH_PROMPTS
    return [drawn_pictures.few_prompts(len(drawing.tokens))] if few else []


def _weights_alone(options: argparse.Namespace, job: QuantizeJob, why: str) -> Measurement:
    """Instead of a measurement that can be done without; said while it works, and in the report."""
    note = f"{why}, so the weights alone were used"
    print(f"nibble: {note}", file=sys.stderr)
    job.source.notes.append(note)
    return _measured(options, job, WEIGHTS_ALONE)
