"""nibble inspect FILE: what a file is, or what would become of it."""

import argparse
import json
from pathlib import Path

from ..files.checkpoint import is_quantized, open_quantized
from ..files.errors import FileRefused, reading
from ..files.known_shapes import KNOWN_MODELS, known_shapes
from ..files.modelspec import PREFIX, REQUIRES
from ..files.report import LayerRow, Report
from ..files.source import Source
from ..interop.convert import facts_of as published_summary
from ..interop.identify import identify, is_published
from ..svdquant.recipe import Recipe as SVDQuantRecipe
from ..vq4dit.recipe import Recipe as VQRecipe
from .console import Bar, print_summary
from .methods import JOBS

_MODELS = ("diffusion_models", "checkpoints")  # folders of models that could be quantized
# what a file's metadata tell people
_TOLD = (REQUIRES, *(f"{PREFIX}{key}" for key in ("title", "author", "license")))


def inspect(options: argparse.Namespace) -> None:
    """Prints what a file is, or what would become of it."""
    content = _planned(options) if options.plan else facts(options)
    if options.json:
        print(json.dumps(content, indent=1))
    else:
        _print_content(content, options.verify)


def facts(options: argparse.Namespace) -> dict:
    """What a file is, as the JSON of `inspect`. Raises FileRefused for one that is damaged."""
    if is_quantized(options.file):
        return _own_file(options)
    # adapters, states, couplings: what reads them is above this room
    content = options.small_file(Path(options.file), options.verify)
    if content is None:
        return _other_file(options)
    if options.verify:
        content["checksums"] = "all match, or the file is older than they are"
    return content


def _planned(options: argparse.Namespace) -> dict:
    name, report = _predicted(options)
    size = {"rank": options.rank} if options.method == "svdquant" else {"bits": options.bits}
    return {"model": name, **size, "report": json.loads(report.to_json(seconds=False))}


def _own_file(options: argparse.Namespace) -> dict:
    quantized = open_quantized(options.file)
    if options.verify:
        with Bar("tensors") as bar:
            quantized.verify(bar)
    return {
        "file": quantized.path.name,
        "kind": identify(quantized.path).line,
        "format": quantized.metadata["nibble_version"],
        "method": quantized.metadata["method"],
        "layers": quantized.layers,
        **{key: quantized.metadata[key] for key in _TOLD if key in quantized.metadata},
        **{key: quantized.fact(key) for key in ("source", "recipe", "calibration", "report")},
    }


def _other_file(options: argparse.Namespace) -> dict:
    """A published 4-bit file, a model that can be quantized, or whatever else it is."""
    if options.verify:
        raise FileRefused(
            f"{Path(options.file).name} was not made by Nibble's quantizers, so --verify finds no"
            " checksums of theirs in it; leave it out."
        )
    path, kind = Path(options.file), identify(options.file)
    if is_published(path):
        summary = published_summary(path)
        assert summary is not None  # it is so for Nibble's own alone, which `_own_file` reads
        return summary | {"kind": kind.line}
    named = {"file": path.name, "kind": kind.line}
    try:
        source = Source(path)
        report = _of_source(source, SVDQuantRecipe.from_preset("fast"))
    except FileRefused as refusal:
        # a model that cannot be quantized is told why; what is none needs no telling
        return named | ({"quantizing": str(refusal)} if kind.folder in _MODELS else {})
    left_out = {"left out": source.left_out} if source.left_out else {}
    return named | {
        "file": source.name,
        "quantized": False,
        "architecture": report.architecture,
        "weights": source.stored_as,
        "files": source.files,
        "bytes": report.bytes_before,
        "layers": len(report.rows),
        **left_out,
        "hint": "add --plan to see what quantizing it would give",
    }


def _predicted(options: argparse.Namespace) -> tuple[str, Report]:
    """(name, predicted report) of a file or a well-known model."""
    recipe: VQRecipe | SVDQuantRecipe
    if options.method == "vq":
        recipe = VQRecipe.from_preset("best", bits=options.bits)
    else:
        recipe = SVDQuantRecipe.from_preset("fast", rank=options.rank)
    path = Path(options.file)
    if path.exists() or path.suffix:
        source = Source(path)
        return source.name, _of_source(source, recipe)
    shapes = known_shapes(options.file)
    if shapes is None:
        raise FileRefused(
            f"{options.file} is no file and no known model; choose a file or one of"
            f" {', '.join(KNOWN_MODELS)}."
        )
    return options.file, JOBS[type(recipe)].predict(shapes, recipe, options.file)


def _of_source(source: Source, recipe: VQRecipe | SVDQuantRecipe) -> Report:
    """The predicted report of a source, with what it says of itself."""
    predict = JOBS[type(recipe)].predict
    report = predict(source.shapes, recipe, source.name, source.bytes, source.kept_dtype)
    report.notes = [*source.notes, *report.notes]
    return report


def _print_content(content: dict, verified: bool) -> None:
    name = content.get("file") or content.get("model")
    if "report" not in content:
        print_summary(name, [(key, str(value)) for key, value in content.items() if key != "file"])
        return
    with reading(str(name), "copy it again or quantize again"):
        report = Report.from_json(json.dumps(content["report"]))
    lines = [
        (key, json.dumps(content[key]))
        for key in ("kind", "format", "method", *_TOLD, "source", "recipe", "calibration")
        if key in content
    ]
    lines += report.summary()
    if verified:
        lines.append(("checksums", "all tensors match"))
    _print_rows(report.rows)
    print_summary(name, lines)
    if content.get("model"):
        size = f"rank {content['rank']}" if "rank" in content else f"{content['bits']} bits"
        print(
            f"  predicted file  {report.bytes_after:,} bytes = {report.bytes_after / 1e9:.3f}"
            f" GB at {size}"
        )


def _print_rows(rows: list[LayerRow]) -> None:
    print(f"{'layer':<46}{'action':<8}{'dB':>7}{'MB before':>11}{'after':>9}  why")
    for row in rows:
        db = "" if row.db is None else f"{row.db:.1f}"
        before, after = row.bytes_before / 1e6, row.bytes_after / 1e6
        print(f"{row.name:<46}{row.action:<8}{db:>7}{before:>11.2f}{after:>9.2f}  {row.why}")
