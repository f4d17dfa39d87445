"""python -m nibble quantize SOURCE TARGET: prepare, measure outside ComfyUI, write.

Only FLUX.1 can be run here (by diffusers). The preset fast records what costs little: a FLUX.1 that
fits under the memory cap in float32, on random conditioning.
"""

import argparse
import math
import sys
from collections.abc import Iterable
from pathlib import Path

from torch import Tensor

from ...kernels.optional import optional
from ..calibration.statistics import ENOUGH_PICTURES
from ..files.errors import FileRefused
from ..files.safetensors import checksum, read_header, read_tensor
from ..job.checkpoint_run import QuantizeJob, few_prompts
from ..job.measurement import Measurement
from ..svdquant.nvfp4.quantize import NVFP4Recipe
from ..svdquant.recipe import Recipe as SVDQuantRecipe
from ..svdquant.stock.recipe import StockRecipe
from ..vq4dit.recipe import Recipe as VQRecipe
from . import methods
from .console import Bar, print_summary

WEIGHTS_ALONE = Measurement({"kind": "weights only"})
# method → its options, each with the field of its recipe
_OPTIONS = {
    "svdquant": {
        name: name for name in ("rank", "solver", "rotation", "gptq", "w4a16", "format", "compare")
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


def quantize(options: argparse.Namespace) -> None:
    """SOURCE → TARGET, with a progress bar and a summary."""
    job = methods.prepare(options.source, options.target, _recipe(options))
    measurement = _measure(options, job)
    with Bar() as bar:
        report = job.write(measurement, bar.monitor, options.device)
    print_summary(options.target, report.summary())


def _recipe(options: argparse.Namespace) -> AnyRecipe:
    """The method's recipe. Raises ValueError for options of the other methods."""
    own = _OPTIONS[options.method]
    for method, names in _OPTIONS.items():
        _refuse_options(options, names.keys() - own.keys(), method)
    changes = {field: getattr(options, name) for name, field in own.items()}
    modulation = options.modulation
    if modulation == "w4a16":  # 4-bit weights: as any other layer's, where there are no such
        modulation = {"vq": "vq", "stock": "quantize"}.get(options.method, modulation)
    return _recipe_class(options, changes).from_preset(
        options.preset, keep=options.keep, seed=options.seed, modulation=modulation, **changes
    )


def _recipe_class(
    options: argparse.Namespace, changes: dict
) -> type[SVDQuantRecipe] | type[StockRecipe] | type[VQRecipe]:
    """The class of recipe. SVDQuant's two formats are two, and so `format` leaves its changes."""
    if options.method != "svdquant":
        return StockRecipe if options.method == "stock" else VQRecipe
    form = changes.pop("format") or "int4"
    if form not in ("int4", "nvfp4"):
        raise ValueError(f"format={form!r} is not one of int4, nvfp4")
    if form == "nvfp4":
        return NVFP4Recipe
    if changes.pop("compare"):
        raise ValueError("--compare belongs to --format nvfp4; leave it out")
    return SVDQuantRecipe


def _refuse_options(options: argparse.Namespace, names: Iterable[str], method: str) -> None:
    for name in names:
        if getattr(options, name) is not None:
            raise ValueError(
                f"--{name} belongs to --method {method}; leave it out, or choose that method"
            )


def _measure(options: argparse.Namespace, job: QuantizeJob) -> Measurement:
    """Records the layers' inputs, or gives the model at work, as far as the recipe needs it and the
    target has not got it already.
    """
    fast = options.preset == "fast"
    if job.architecture != "FLUX.1":
        if fast:
            return WEIGHTS_ALONE
        raise ValueError(
            f"{job.source.name} is a {job.architecture}, and outside ComfyUI only FLUX.1 can be"
            " calibrated; use --preset fast, or the node"
            f" {'VQ' if options.method == 'vq' else 'SVDQuant'} Quantize Checkpoint in ComfyUI"
        )
    in_float32 = 4 * sum(map(math.prod, job.source.shapes.values()))
    if fast and in_float32 > options.memory_cap * 1e9:
        return WEIGHTS_ALONE
    diffusers, why = optional("..diffusers", __package__)
    if diffusers is None:
        if fast:
            return _weights_alone(job, why)
        raise ValueError(
            f"--preset {options.preset} needs diffusers to run the model, and {why}; pip install"
            " --upgrade diffusers, or use --preset fast"
        )
    if fast or options.prompts is None:
        tokens, pooled, provenance = None, None, {"kind": "random conditioning"}
    else:
        tokens, pooled, provenance = _prompts(options.prompts)
        if len(tokens) < ENOUGH_PICTURES:
            job.source.notes.append(few_prompts(len(tokens)))
    if job.existing_report(provenance) is not None:
        return Measurement(provenance)
    cap = int(options.memory_cap * 1e9)
    state = {name: job.source.read(name).float() for name in job.source.shapes}
    seed = job.recipe.seed
    if options.method == "vq" and not fast:
        teacher = diffusers.flux_teacher(state, tokens, pooled, cap=cap, seed=seed)
        return Measurement(provenance, teacher=teacher)
    with Bar("tokens") as bar:
        statistics = diffusers.record_inputs(
            state,
            job.quantized_names,
            tokens,
            pooled,
            cap=cap,
            seed=seed,
            report=lambda done, total: bar(done, total, "recording inputs"),
        )
    return Measurement(provenance, statistics.get)


def _weights_alone(job: QuantizeJob, why: str) -> Measurement:
    """Instead of a measurement that can be done without; said while it works, and in the report."""
    note = f"{why}, so the weights alone were used"
    print(f"nibble: {note}", file=sys.stderr)
    job.source.notes.append(note)
    return WEIGHTS_ALONE


def _prompts(path: Path) -> tuple[Tensor, Tensor, dict]:
    """(tokens, pooled, their provenance) of a file with text encoders' outputs."""
    header = read_header(path)
    if not {"tokens", "pooled"} <= header.tensors.keys():
        raise FileRefused(
            f"{path.name} lacks the tensors 'tokens' and 'pooled'; save the text encoders' outputs"
            " under these names."
        )
    tokens = read_tensor(header, "tokens").float()
    pooled = read_tensor(header, "pooled").float()
    provenance = {
        "kind": "prompts",
        "prompts": len(tokens),
        "fingerprint": f"{checksum(tokens)}{checksum(pooled)}",
    }
    return tokens, pooled, provenance
