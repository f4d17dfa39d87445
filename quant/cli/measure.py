"""What a quantization from the terminal knows of the 16-bit model at work.

FLUX.1 and class-conditional DiT can be run here (by diffusers). The preset fast records what costs
little: a model that fits under the memory cap in float32, a FLUX.1 on random conditioning, a DiT on
random classes, which are all that it ever reads. What is drawn of prompts, and what the file says
of it, is what ComfyUI's node draws of them.
"""

import argparse
import math
import sys
from typing import Any

import torch

from ...kernels.optional import optional
from ..calibration import pictures as drawn_pictures
from ..calibration.teacher import Teacher
from ..files import prompts as prompts_file
from ..files import text_encoders
from ..files.errors import FileRefused
from ..files.prompts import Prompts
from ..job.checkpoint_run import QuantizeJob
from ..job.measurement import Measurement
from .console import Bar

WEIGHTS_ALONE = Measurement({"kind": "weights only"})
DIT = "DiT (diffusers)"
RUN_HERE = ("FLUX.1", DIT)


def another(job: QuantizeJob) -> FileRefused:
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
            raise another(job)
    return measurement


def runs_model(options: argparse.Namespace, job: QuantizeJob) -> bool:
    """Whether `measure` runs the 16-bit model where it can."""
    if job.architecture not in RUN_HERE:
        return False
    in_float32 = 4 * sum(map(math.prod, job.source.shapes.values()))
    return _is_asked_for(options) or in_float32 <= options.memory_cap * 1e9


def _is_asked_for(options: argparse.Namespace) -> bool:
    return options.preset != "fast" or options.prompts is not None


def measure(options: argparse.Namespace, job: QuantizeJob) -> Measurement:
    """Records the layers' inputs, or gives the model at work, as far as the recipe needs it and the
    target has not got it already.
    """
    if job.architecture not in RUN_HERE:
        if options.preset == "fast":
            return _measured(options, job, WEIGHTS_ALONE)
        node = {"vq": "VQ Quantize Checkpoint"}.get(options.method, "SVDQuant Quantize Checkpoint")
        if text_encoders.family_of(job.source.shapes) is not None:
            node = "Quantize Text Encoder"
        way = "use --preset fast"
        if "(diffusers)" not in job.architecture:  # ComfyUI has a class for it
            way += f", or the node {node} in ComfyUI"
        raise ValueError(
            f"{job.source.name} is a {job.architecture}, and outside ComfyUI only FLUX.1 and DiT"
            f" can be calibrated; {way}"
        )
    classes = job.architecture == DIT
    if classes:
        _refuse_prompts(options, job)
    if not runs_model(options, job):
        return _measured(options, job, WEIGHTS_ALONE)
    asked = _is_asked_for(options)
    prompts = None if options.prompts is None else prompts_file.read(options.prompts)
    diffusers, why = optional("..diffusers", __package__)
    if diffusers is None:
        if not asked:
            return _weights_alone(options, job, why)
        raise ValueError(
            f"--preset {options.preset} needs diffusers to run the model, and {why}; pip install"
            " --upgrade diffusers, or use --preset fast without --prompts"
        )
    if classes and not asked and "config" not in job.source.metadata:
        return _weights_alone(options, job, "there is no config.json beside the model")
    drawing = (
        _classes(diffusers, options) if classes else _drawing(diffusers, options, job, prompts)
    )
    provenance = drawing.provenance()
    if not classes:
        job.source.notes.extend(_notes(job, drawing))
    _measured(options, job, Measurement(provenance))
    if job.existing_report(provenance) is not None:
        return Measurement(provenance)
    at_work = _dit_at_work if classes else _flux_at_work
    return at_work(diffusers, options, job, drawing)


def _flux_at_work(
    diffusers: Any, options: argparse.Namespace, job: QuantizeJob, drawing: Any
) -> Measurement:
    """A FLUX.1, or what its layers read."""
    cap = int(options.memory_cap * 1e9)
    state = {name: job.source.read(name).float() for name in job.source.shapes}
    if _is_calibrated(options):
        teacher = diffusers.flux_teacher(state, drawing, cap)
        return Measurement(drawing.provenance(), teacher=teacher)
    with Bar("tokens", not options.quiet) as bar:
        statistics = diffusers.record_inputs(
            state,
            job.quantized_names,
            drawing,
            cap,
            report=lambda done, total: bar(done, total, "recording inputs"),
        )
    return Measurement(drawing.provenance(), statistics.get)


def _dit_at_work(
    diffusers: Any, options: argparse.Namespace, job: QuantizeJob, classes: Any
) -> Measurement:
    """The same of a DiT."""
    cap = int(options.memory_cap * 1e9)
    model = diffusers.dit_model(job.source)
    if _is_calibrated(options):
        run = classes.run(model, diffusers.dit_scheduler())
        return Measurement(classes.provenance(), teacher=Teacher(model, run, cap=cap))
    with Bar("layers", not options.quiet) as bar:
        statistics = diffusers.record_dit(
            model,
            job.quantized_names,
            classes,
            cap,
            report=lambda done, total: bar(done, total, "recording inputs"),
        )
    return Measurement(classes.provenance(), statistics.get)


def _is_calibrated(options: argparse.Namespace) -> bool:
    """Whether codewords are fitted beside the model at work."""
    return options.method == "vq" and options.preset != "fast"


def _refuse_prompts(options: argparse.Namespace, job: QuantizeJob) -> None:
    """Raises ValueError for options of what a DiT does not read."""
    for name in ("prompts", "width", "height", "shift"):
        if getattr(options, name) is not None:
            raise ValueError(
                f"--{name} is of models that read prompts, and {job.source.name} is a DiT, which"
                " draws classes in one size; leave it out"
            )


def _classes(diffusers: Any, options: argparse.Namespace) -> Any:
    """A `diffusers.Classes`: more pictures where layers are fitted to what they read, one by
    one, than beside the model at work.
    """
    given: dict[str, Any] = {} if options.seed is None else {"seed": options.seed}
    if options.method != "vq" and options.steps is not None:
        if options.steps < 1:
            raise ValueError(f"--steps {options.steps} is less than 1")
        given["steps"] = options.steps
    if not _is_calibrated(options):
        given["pictures"] = drawn_pictures.ENOUGH_PICTURES
    return diffusers.Classes(**given)


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
