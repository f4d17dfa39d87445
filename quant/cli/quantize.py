"""nibble quantize SOURCE TARGET: prepare, measure outside ComfyUI (measure.py), write."""

import argparse
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from ..files import text_encoders
from ..files.checkpoint import open_quantized
from ..files.errors import FileRefused
from ..files.report import Report
from ..files.source_files import open_stored
from ..job.checkpoint_run import QuantizeJob
from ..job.monitor import Monitor
from ..svdquant.recipe import WIDE_SHARE
from ..svdquant.recipe import Recipe as SVDQuantRecipe
from ..svdquant.stock.recipe import StockRecipe
from ..vq4dit.recipe import Recipe as VQRecipe
from . import driven, measure, methods, shares
from .console import Bar, print_summary

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
    """SOURCE → TARGET, with a progress bar and a summary; or with lines for a program."""
    if options.driven:
        with driven.driven() as monitor:
            driven.say_report(run(options, monitor))
    else:
        report = run(options)
        print_summary(shares.written(options), report.summary())


def run(options: argparse.Namespace, monitor: Monitor | None = None) -> Report:
    """SOURCE → TARGET, with a progress bar unless there is a monitor or `options.quiet`. Raises
    FileRefused and ValueError before anything is written.
    """
    options.quiet = options.quiet or monitor is not None
    _check_numbers(options)
    _encoders_own(options)
    recipe = recipe_of(options)
    share = shares.asked(options, recipe)
    with share.held() as target:
        job = methods.prepare(options.source, target, recipe)
        if not options.overwrite:
            _keep_another(job)
        share.check(job)
        for note in job.unmatched:  # now, and not after hours of work
            print(f"nibble: {note}", file=sys.stderr)
        measurement = measure.measure(options, job)
        with Bar(shown=not options.quiet) as bar:
            return share.write(job, measurement, monitor or bar.monitor)


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
    raise measure.another(job)


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


def recipe_of(options: argparse.Namespace) -> AnyRecipe:
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
