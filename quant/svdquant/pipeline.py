"""A whole checkpoint to 4 bits, a few layers in memory at a time: plan, read, decompose, write.

Every layer draws its random numbers from the recipe's seed and its own name, so the result does not depend on the order of the work or on
where an earlier run was interrupted: the file comes out the same, byte for byte (on one machine with one number of threads).
"""

import itertools
import json
import math
import time
import zlib
from collections.abc import Callable, Iterable, Mapping
from fnmatch import fnmatchcase
from pathlib import Path

import torch
from torch import Tensor

from ..architectures import LayerPlan, plan, recognise
from ..container import FORMAT_VERSION, FORMATS, FileRefused, open_quantized
from ..sources import Source, StateDictSource
from ..statistics import InputStats
from ..writer import TensorSpec, Writer, check_target, metadata_room
from .decompose import quantize_linear, quantize_w4a16, shared_smoothing
from .recipe import Recipe
from .report import LayerRow, Report

JSON_BYTES = 128  # a layer's JSON is padded with blanks to this length, for the file is laid out before its options are known
_FORMAT_OF = {"w4a4": "svdquant_w4a4", "w4a16": "awq_w4a16"}
_WHY_ROOM = 200   # bytes that a finished row may be longer than its plan
_PASSED_ON = 65536  # bytes of a source's own metadata that are passed on (ComfyUI reads "config" of some video models)


def quantize_checkpoint(source: str | Path | Source | StateDictSource, target: str | Path, recipe: Recipe,
                        statistics: Callable[[str], InputStats | None] | None = None,
                        progress: Callable[[int, int, str], None] | None = None, cancelled: Callable[[], None] | None = None,
                        device: str | torch.device = "cpu", calibration: dict | None = None) -> Report:
    """Writes the 4-bit file of a model; returns at once when the target was made from the same model with the same options.

    source       path of a .safetensors file, or an opened source (a live model: StateDictSource)
    statistics   recorded inputs by a layer's name; without them, or where they are None, synthetic ones stand in
    progress     called before each layer with (weights done, weights in all, the layer's name)
    cancelled    called before each layer; raises to stop. What is finished stays and the next run goes on from there
    calibration  what the statistics come from, as JSON: part of the file, and of what "the same options" means
    Raises FileRefused for input that cannot be used, before anything is written where that is possible; never leaves a half-written target.
    """
    source = source if isinstance(source, (Source, StateDictSource)) else Source(source)
    check_target(source.path, target)
    architecture = recognise(source.shapes, source.name)
    layers = plan(source.shapes, architecture, recipe, source.name)
    facts = {"source": json.dumps({"name": source.name, "bytes": source.bytes, "fingerprint": source.fingerprint}),
             "recipe": recipe.to_json(), "calibration": json.dumps(calibration or {})}
    if done := _finished(target, facts):
        return done
    report = Report(architecture.name, bytes_before=source.bytes, notes=[*source.notes, *_unmatched(recipe, layers)])
    specs = layout(source.shapes, layers, recipe.rank, source.kept_dtype)
    metadata = _passed_on(source.metadata) | {"format": "nibble", "nibble_version": str(FORMAT_VERSION), "method": "svdquant", **facts}
    began = time.monotonic()
    with Writer(target, specs, json.dumps(facts), _room(metadata, report, layers)) as writer:
        run = _Run(source, writer, recipe, statistics or (lambda name: None), torch.device(device))
        run.all(layers, specs, progress or (lambda *_: None), cancelled or (lambda: None))
        report.rows = [LayerRow(**writer.finished[layer.name]) for layer in layers]
        report.bytes_after, report.seconds = writer.size, time.monotonic() - began
        writer.finish(_choices(metadata, report))
    return report


class _Run:
    """One run's work, unit by unit; skips what the writer has already."""

    def __init__(self, source, writer: Writer, recipe: Recipe, statistics: Callable, device: torch.device):
        self.source, self.writer, self.recipe, self.statistics, self.device = source, writer, recipe, statistics, device

    def all(self, layers: list[LayerPlan], specs: Iterable[TensorSpec], progress: Callable, cancelled: Callable) -> None:
        """Kept tensors first: they are quick, and show soon whether the file can be read."""
        done, total = 0, sum(layer.K * layer.N for layer in layers)
        kept = {layer.name: layer for layer in layers if layer.action == "keep"}
        owned = {f"{layer.name}.{part}" for layer in layers for part in ("weight", "bias")}
        loose = [key for key in self.source.shapes if key not in owned]
        for unit in [*loose, *kept]:
            cancelled()
            if unit in kept:
                progress(done, total, unit)
                done += kept[unit].K * kept[unit].N
            self._step(unit, lambda unit=unit: self._keep(unit, kept.get(unit)))
        work = [layer for layer in layers if layer.action != "keep"]
        for _, group in itertools.groupby(work, key=lambda layer: layer.group or layer.name):
            smooth = None
            group = list(group)
            if len(group) > 1 and any(layer.name not in self.writer.finished for layer in group):
                cancelled()
                smooth = self._checked(lambda group=group: self._smoothing(group))
            for layer in group:
                cancelled()
                progress(done, total, layer.name)
                self._step(layer.name, lambda layer=layer, smooth=smooth: self._quantize(layer, smooth))
                done += layer.K * layer.N
        progress(total, total, "")

    def _step(self, unit: str, make: Callable[[], tuple[Mapping[str, Tensor], LayerRow | None]]) -> None:
        if unit in self.writer.finished:
            return
        began = time.monotonic()
        tensors, row = self._checked(make)
        if row is not None:
            row.bytes_after, row.seconds = sum(tensor.nbytes for tensor in tensors.values()), round(time.monotonic() - began, 3)
        self.writer.write(unit, tensors, vars(row) if row else {})

    def _checked(self, make: Callable):
        """Runs a computation; when its input cannot be used, no later run could finish either, and the unfinished file goes."""
        try:
            return make()
        except ValueError:
            self.writer.discard()
            raise

    def _keep(self, unit: str, layer: LayerPlan | None) -> tuple[dict[str, Tensor], LayerRow | None]:
        if layer is None:
            return {unit: self.source.read(unit)}, None
        keys = [f"{unit}.weight"] + [f"{unit}.bias"] * layer.bias
        return {key: self.source.read(key) for key in keys}, LayerRow(unit, "keep", layer.why, None, self.source.nbytes(unit), 0)

    def _smoothing(self, group: list[LayerPlan]) -> Tensor:
        weights = [self.source.weight(layer.name).to(self.device) for layer in group]
        return shared_smoothing(weights, self._statistics(group[0]), self.recipe)

    def _quantize(self, layer: LayerPlan, smooth: Tensor | None) -> tuple[dict[str, Tensor], LayerRow]:
        weight, bias = self.source.weight(layer.name).to(self.device), self.source.bias(layer.name)
        bias = None if bias is None else bias.to(self.device)
        seed = zlib.crc32(f"{self.recipe.seed} {layer.name}".encode())
        stats, why = self._statistics(layer), layer.why
        if layer.action == "w4a4":
            result, error = quantize_linear(weight, bias, stats, self.recipe, post_gelu=layer.post_gelu, smooth=smooth,
                                            generator=torch.Generator().manual_seed(seed))
            db, why = error.db, f"{why}; {_in_words(error)}"[:len(why.encode()) + _WHY_ROOM // 2]
        else:
            result, db = quantize_w4a16(weight, bias, stats, self.recipe)
        tensors = {key: tensor.cpu() for key, tensor in result.tensors(layer.name).items()}
        tensors[f"{layer.name}.comfy_quant"] = _padded(tensors[f"{layer.name}.comfy_quant"])
        row = LayerRow(layer.name, layer.action, why, round(db, 2) if math.isfinite(db) else None, self.source.nbytes(layer.name), 0)
        return tensors, row

    def _statistics(self, layer: LayerPlan) -> InputStats | None:
        return self.statistics(layer.name)


def layout(shapes: Mapping[str, tuple[int, ...]], layers: Iterable[LayerPlan], rank: int,
           kept_dtype: Callable[[str], torch.dtype] = lambda name: torch.bfloat16) -> list[TensorSpec]:
    """Every tensor of the 4-bit file, from shapes alone."""
    specs, quantized = [], {layer.name: layer for layer in layers if layer.action != "keep"}
    for layer in quantized.values():
        sizes = {"N": layer.N, "K": layer.K, "K/2": layer.K // 2, "G": layer.K // 64, "R": rank}
        for suffix, rule in FORMATS[_FORMAT_OF[layer.action]][0].items():
            shape = tuple(sizes[letter] for letter in rule.split(","))
            specs.append(TensorSpec(f"{layer.name}.{suffix}", torch.int8 if suffix == "weight" else torch.bfloat16, shape))
        if layer.bias:
            specs.append(TensorSpec(f"{layer.name}.bias", torch.bfloat16, (layer.N,)))
        specs.append(TensorSpec(f"{layer.name}.comfy_quant", torch.uint8, (JSON_BYTES,)))
    owned = {f"{name}.{part}" for name in quantized for part in ("weight", "bias")}
    return specs + [TensorSpec(key, kept_dtype(key), tuple(shape)) for key, shape in shapes.items() if key not in owned]


def predict(shapes: Mapping[str, tuple[int, ...]], recipe: Recipe, name: str, bytes_before: int | None = None,
            kept_dtype: Callable[[str], torch.dtype] = lambda name: torch.bfloat16) -> Report:
    """The report that a run would give, without errors and seconds: sizes to the byte. bytes_before: of the source; by default as bf16."""
    architecture = recognise(shapes, name)
    layers = plan(shapes, architecture, recipe, name)
    specs = layout(shapes, layers, recipe.rank, kept_dtype)
    sizes: dict[str, int] = {}
    for spec in specs:
        owner = spec.name.rpartition(".")[0]
        sizes[owner] = sizes.get(owner, 0) + spec.nbytes
    bytes_before = bytes_before or 2 * sum(math.prod(shape) for shape in shapes.values())
    report = Report(architecture.name, bytes_before=bytes_before, notes=_unmatched(recipe, layers))
    report.rows = [LayerRow(layer.name, layer.action, layer.why, None, 2 * layer.N * (layer.K + layer.bias), sizes[layer.name])
                   for layer in layers]
    facts = {"source": json.dumps({"name": name, "bytes": 0, "fingerprint": "0" * 64}), "recipe": recipe.to_json(), "calibration": "{}"}
    metadata = {"format": "nibble", "nibble_version": str(FORMAT_VERSION), "method": "svdquant", **facts}
    report.bytes_after = Writer("plan.safetensors", specs, "", _room(metadata, report, layers)).size
    return report


def _unmatched(recipe: Recipe, layers: Iterable[LayerPlan]) -> list[str]:
    """A note for each of the user's patterns that names no layer: most likely a slip."""
    names = [layer.name for layer in layers]
    return [f"no layer matches the pattern {pattern!r}" for pattern in (*recipe.keep, *recipe.w4a16)
            if not any(fnmatchcase(name, pattern) for name in names)]


def _in_words(error) -> str:
    words = [f"smoothing {error.smoothing}", "unsigned inputs" * error.act_unsigned, "rotated" * bool(error.rotation), "GPTQ" * error.gptq]
    return ", ".join(filter(None, [*words, error.inputs]))


def _padded(text: Tensor) -> Tensor:
    if len(text) > JSON_BYTES:
        raise ValueError(f"a layer's JSON has {len(text)} bytes, more than the {JSON_BYTES} reserved for it")
    return torch.cat([text.cpu(), torch.full((JSON_BYTES - len(text),), ord(" "), dtype=torch.uint8)])


def calibrated_on(target: str | Path, source: Source | StateDictSource, recipe: Recipe) -> dict | None:
    """What an existing target was calibrated on, if it was made from this model by this recipe; else None. Tells, before the long recording
    of inputs starts, that all is done."""
    try:
        file = open_quantized(target)
    except FileRefused:
        return None
    same = file.metadata.get("recipe") == recipe.to_json() and file.fact("source").get("fingerprint") == source.fingerprint
    return file.fact("calibration") if same else None


def _finished(target: str | Path, facts: Mapping[str, str]) -> Report | None:
    """The report of an existing target if it is the result of the same run."""
    if not Path(target).exists():
        return None
    try:
        found = open_quantized(target).metadata
        same = all(found.get(key) == value for key, value in facts.items())
        return Report.from_json(found["report"]) if same else None
    except (FileRefused, KeyError, ValueError):
        return None  # damaged or of another version: it is made again


def _passed_on(metadata: Mapping[str, str]) -> dict[str, str]:
    return {key: value for key, value in metadata.items() if key != "_quantization_metadata" and len(value) <= _PASSED_ON}


def _choices(metadata: Mapping[str, str], report: Report) -> Iterable[dict[str, str]]:
    """The metadata with the whole report, and with shorter ones in case it does not fit."""
    for options in ({}, {"why": False}, {"rows": False}):
        yield {**metadata, "report": report.to_json(seconds=False, **options)}


def _room(metadata: Mapping[str, str], report: Report, layers: Iterable[LayerPlan]) -> int:
    """Bytes to reserve for metadata: those of a report with the longest rows there can be."""
    largest = 10**15
    rows = [LayerRow(layer.name, layer.action, layer.why + " " * _WHY_ROOM, -9999.99, largest, largest) for layer in layers]
    worst = Report(report.architecture, rows, largest, largest, 0.0, report.notes)
    return metadata_room({**metadata, "report": worst.to_json(seconds=False)})
