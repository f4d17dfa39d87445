"""A whole checkpoint to 4 bits, a few layers in memory at a time: plan, read, decompose, write.

Every layer draws its random numbers from the recipe's seed and its own name, so the result does not
depend on the order of the work or on where an earlier run was interrupted: the file comes out the
same, byte for byte (on one machine with one number of threads).
"""

import itertools
import json
import math
import time
import zlib
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from ..architectures import LayerPlan, plan, recognise
from ..calibration.statistics import InputStats
from ..checkpoint_run import (
    JSON_BYTES,
    WHY_ROOM,
    Run,
    calibrated_on,
    choices,
    facts_of,
    finished,
    metadata_of,
    padded,
    predicted_facts,
    room,
    unmatched,
)
from ..files.checkpoint import FORMATS
from ..files.safetensors import TensorSpec
from ..files.source import Source, StateDictSource
from ..files.writer import Writer, check_target
from ..report import LayerRow, Report
from .decompose import quantize_linear, quantize_w4a16, shared_smoothing
from .recipe import Recipe

__all__ = ["calibrated_on", "layout", "predict", "quantize_checkpoint"]
_FORMAT_OF = {"w4a4": "svdquant_w4a4", "w4a16": "awq_w4a16"}


def quantize_checkpoint(
    source: str | Path | Source | StateDictSource,
    target: str | Path,
    recipe: Recipe,
    statistics: Callable[[str], InputStats | None] | None = None,
    progress: Callable[[int, int, str], None] | None = None,
    cancelled: Callable[[], None] | None = None,
    device: str | torch.device = "cpu",
    calibration: dict | None = None,
) -> Report:
    """Writes the 4-bit file of a model; returns at once when the target was made from the same
    model with the same options.

    source       path of a .safetensors file, or an opened source (a live model: StateDictSource)
    statistics   recorded inputs by a layer's name; without them, or where they are None, synthetic
      ones stand in
    progress     called before each layer with (weights done, weights in all, the layer's name)
    cancelled    called before each layer; raises to stop. What is finished stays and the next run
      goes on from there
    calibration  what the statistics come from, as JSON: part of the file, and of what "the same
      options" means
    Raises FileRefused for input that cannot be used, before anything is written where that is
    possible; never leaves a half-written target.
    """
    source = source if isinstance(source, (Source, StateDictSource)) else Source(source)
    check_target(source.path, target)
    architecture = recognise(source.shapes, source.name)
    layers = plan(source.shapes, architecture, recipe, source.name)
    facts = facts_of(source, recipe, calibration)
    if done := finished(target, facts):
        return done
    report = Report(
        architecture.name,
        bytes_before=source.bytes,
        notes=[*source.notes, *unmatched((*recipe.keep, *recipe.w4a16), layers)],
    )
    specs = layout(source.shapes, layers, recipe.rank, source.kept_dtype)
    metadata = metadata_of("svdquant", facts, source.metadata)
    began = time.monotonic()
    with Writer(target, specs, json.dumps(facts), room(metadata, report, layers)) as writer:
        run = _Run(source, writer, recipe, statistics or (lambda name: None), torch.device(device))
        run.all(layers, progress or (lambda *_: None), cancelled or (lambda: None))
        report.rows = [LayerRow(**writer.finished[layer.name]) for layer in layers]
        report.bytes_after, report.seconds = writer.size, time.monotonic() - began
        writer.finish(choices(metadata, report))
    return report


class _Run(Run):
    """One run's work."""

    def __init__(
        self, source, writer: Writer, recipe: Recipe, statistics: Callable, device: torch.device
    ):
        super().__init__(source, writer)
        self.recipe, self.statistics, self.device = recipe, statistics, device

    def all(self, layers: list[LayerPlan], progress: Callable, cancelled: Callable) -> None:
        """Kept tensors first, then the layers; those that read one input one behind the other."""
        total = sum(layer.K * layer.N for layer in layers)
        done = self.keep_rest(layers, progress, cancelled, total)
        work = [layer for layer in layers if layer.action != "keep"]
        for _, group in itertools.groupby(work, key=lambda layer: layer.group or layer.name):
            smooth = None
            group = list(group)
            if len(group) > 1 and any(layer.name not in self.writer.finished for layer in group):
                cancelled()
                smooth = self.checked(lambda group=group: self._smoothing(group))
            for layer in group:
                cancelled()
                progress(done, total, layer.name)
                self.step(
                    layer.name, lambda layer=layer, smooth=smooth: self._quantize(layer, smooth)
                )
                done += layer.K * layer.N
        progress(total, total, "")

    def _smoothing(self, group: list[LayerPlan]) -> Tensor:
        weights = [self.source.weight(layer.name).to(self.device) for layer in group]
        return shared_smoothing(weights, self._statistics(group[0]), self.recipe)

    def _quantize(
        self, layer: LayerPlan, smooth: Tensor | None
    ) -> tuple[dict[str, Tensor], LayerRow]:
        weight, bias = self.source.weight(layer.name).to(self.device), self.source.bias(layer.name)
        bias = None if bias is None else bias.to(self.device)
        seed = zlib.crc32(f"{self.recipe.seed} {layer.name}".encode())
        stats, why = self._statistics(layer), layer.why
        if layer.action == "w4a4":
            result, error = quantize_linear(
                weight,
                bias,
                stats,
                self.recipe,
                post_gelu=layer.post_gelu,
                smooth=smooth,
                generator=torch.Generator().manual_seed(seed),
            )
            db, why = error.db, f"{why}; {_in_words(error)}"[: len(why.encode()) + WHY_ROOM // 2]
        else:
            result, db = quantize_w4a16(weight, bias, stats, self.recipe)
        tensors = {key: tensor.cpu() for key, tensor in result.tensors(layer.name).items()}
        tensors[f"{layer.name}.comfy_quant"] = padded(tensors[f"{layer.name}.comfy_quant"])
        row = LayerRow(
            layer.name,
            layer.action,
            why,
            round(db, 2) if math.isfinite(db) else None,
            self.source.nbytes(layer.name),
            0,
        )
        return tensors, row

    def _statistics(self, layer: LayerPlan) -> InputStats | None:
        return self.statistics(layer.name)


def layout(
    shapes: Mapping[str, tuple[int, ...]],
    layers: Iterable[LayerPlan],
    rank: int,
    kept_dtype: Callable[[str], torch.dtype] = lambda name: torch.bfloat16,
) -> list[TensorSpec]:
    """Every tensor of the 4-bit file, from shapes alone."""
    specs, quantized = [], {layer.name: layer for layer in layers if layer.action != "keep"}
    for layer in quantized.values():
        sizes = {"N": layer.N, "K": layer.K, "K/2": layer.K // 2, "G": layer.K // 64, "R": rank}
        for suffix, rule in FORMATS[_FORMAT_OF[layer.action]][0].items():
            shape = tuple(sizes[letter] for letter in rule.split(","))
            specs.append(
                TensorSpec(
                    f"{layer.name}.{suffix}",
                    torch.int8 if suffix == "weight" else torch.bfloat16,
                    shape,
                )
            )
        if layer.bias:
            specs.append(TensorSpec(f"{layer.name}.bias", torch.bfloat16, (layer.N,)))
        specs.append(TensorSpec(f"{layer.name}.comfy_quant", torch.uint8, (JSON_BYTES,)))
    owned = {f"{name}.{part}" for name in quantized for part in ("weight", "bias")}
    return specs + [
        TensorSpec(key, kept_dtype(key), tuple(shape))
        for key, shape in shapes.items()
        if key not in owned
    ]


def predict(
    shapes: Mapping[str, tuple[int, ...]],
    recipe: Recipe,
    name: str,
    bytes_before: int | None = None,
    kept_dtype: Callable[[str], torch.dtype] = lambda name: torch.bfloat16,
) -> Report:
    """The report that a run would give, without errors and seconds: sizes to the byte.
    bytes_before: of the source; by default as bf16.
    """
    architecture = recognise(shapes, name)
    layers = plan(shapes, architecture, recipe, name)
    specs = layout(shapes, layers, recipe.rank, kept_dtype)
    sizes: dict[str, int] = {}
    for spec in specs:
        owner = spec.name.rpartition(".")[0]
        sizes[owner] = sizes.get(owner, 0) + spec.nbytes
    bytes_before = bytes_before or 2 * sum(math.prod(shape) for shape in shapes.values())
    report = Report(
        architecture.name,
        bytes_before=bytes_before,
        notes=unmatched((*recipe.keep, *recipe.w4a16), layers),
    )
    report.rows = [
        LayerRow(
            layer.name,
            layer.action,
            layer.why,
            None,
            2 * layer.N * (layer.K + layer.bias),
            sizes[layer.name],
        )
        for layer in layers
    ]
    metadata = metadata_of("svdquant", predicted_facts(name, recipe))
    report.bytes_after = Writer("plan.safetensors", specs, "", room(metadata, report, layers)).size
    return report


def _in_words(error) -> str:
    words = [
        f"smoothing {error.smoothing}",
        "unsigned inputs" * error.act_unsigned,
        "rotated" * bool(error.rotation),
        "GPTQ" * error.gptq,
    ]
    return ", ".join(filter(None, [*words, error.inputs]))
