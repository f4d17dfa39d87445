"""A whole checkpoint to 4 bits, a few layers in memory at a time: plan, read, decompose, write.

Every layer draws its random numbers from the recipe's seed and its own name, so the result does not
depend on the order of the work, on how many layers are made at once or on where an earlier run was
interrupted: the file comes out the same, byte for byte (on one kind of machine).
"""

import math
import time
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NamedTuple, TypedDict

import torch
from torch import Tensor

from ..calibration.statistics import InputStats
from ..files.architectures import LayerPlan, by_input
from ..files.layer_formats import FORMATS, OPTIONAL, dtypes_of, layer_sizes
from ..files.report import DATA_FREE, WIDE, LayerRow, Report
from ..files.safetensors import TensorSpec
from ..files.source import Source, StateDictSource
from ..files.writer import Writer
from ..job.checkpoint_run import NOT_MEASURED, UNWATCHED, LayerQuantizer, QuantizeJob
from ..job.measurement import Measurement, measured_on
from ..job.monitor import Monitor
from ..job.run_metadata import JSON_BYTES, WHY_ROOM, padded
from ..job.side_by_side import at_once, side_by_side
from ..job.whole_groups import with_zeros
from ..weights.base import StoredWeight
from . import rows8, widths
from .choice import closer, without_data
from .decompose import LayerError, quantize_linear
from .nvfp4 import quantize_linear_nvfp4
from .recipe import Recipe
from .space_search import shared_smoothing
from .w4a16 import quantize_w4a16


class SVDQuantJob(QuantizeJob):
    """A checkpoint's quantization to 4-bit weights and activations."""

    method = "svdquant"

    def layout(self) -> list[TensorSpec]:
        recipe, kept = self.recipe, self.source.kept_dtype
        table = (recipe.format, recipe.group)
        return layout(self.source.shapes, self.layers, recipe.rank, kept, *table)

    def quantizer(
        self, writer: Writer, measurement: Measurement, monitor: Monitor, device: torch.device
    ) -> "SVDQuantizer":
        return SVDQuantizer(self, writer, measurement, monitor, device)


predict = SVDQuantJob.predict


def quantize_checkpoint(
    source: str | Path | Source | StateDictSource,
    target: str | Path,
    recipe: Recipe,
    measurement: Measurement = NOT_MEASURED,
    monitor: Monitor = UNWATCHED,
    device: str | torch.device = "cpu",
) -> Report:
    """Writes the 4-bit file of a model; returns at once when the target was made from the same
    model with the same options and measurement.

    source       path of a .safetensors file, or an opened source (a live model: StateDictSource)
    measurement  recorded inputs; where there are none, synthetic ones stand in
    Raises FileRefused for input that cannot be used, before anything is written where that is
    possible; never leaves a half-written target.
    """
    return SVDQuantJob.prepare(source, target, recipe).write(measurement, monitor, device)


class _Group(NamedTuple):
    """Layers that read one input, and so have the same smoothing; most are alone. unfinished: those
    to make. The rest by name, weights of all layers.
    """

    unfinished: list[LayerPlan]
    weights: dict[str, Tensor]
    biases: dict[str, Tensor | None]
    statistics: dict[str, InputStats | None]


class _Known(TypedDict):
    """What the plan knows of a layer, as both `quantize_linear` take it."""

    post_gelu: bool
    smooth: Tensor | None
    generator: torch.Generator


class _Made(NamedTuple):
    """A layer, its error in dB, how it was made, and the same choices fitted to other inputs."""

    weight: StoredWeight
    db: float
    how: str
    refitted: Callable[[InputStats], StoredWeight]


class _Unit(NamedTuple):
    """A layer that is made."""

    layer: LayerPlan
    tensors: dict[str, Tensor]
    row: LayerRow


class SVDQuantizer(LayerQuantizer):
    """Group by group; on a CPU several at once. What is read and written is so here, one after
    another; only the arithmetic between is done side by side.
    """

    def __init__(
        self,
        job: SVDQuantJob,
        writer: Writer,
        measurement: Measurement,
        monitor: Monitor,
        device: torch.device,
    ):
        super().__init__(job, writer, monitor, device)
        self.statistics = partial(self.recorded, measurement)
        self.wide: frozenset[str] = frozenset()

    def quantize(self, layers: list[LayerPlan]) -> None:
        for layer in layers:
            if layer.action == "rows8":
                self.start(layer.name)
                self.write_unit(layer.name, partial(self._rows8, layer))
                self.finish([layer])
        layers = [layer for layer in layers if layer.action != "rows8"]
        groups = by_input(layers)
        if self.recipe.wide_share:
            measured = [self._measured(group) for group in groups if group[0].action == "w4a4"]
            self.wide = widths.chosen(measured, self.recipe.wide_share)
        if self.device.type == "cpu":
            sizes = (sum(layer.K * layer.N for layer in group) for group in groups)
            largest = max(sizes, default=0)  # a part may be of 8-bit rows alone
            count, heed = at_once(largest), self.monitor.cancelled
            made = side_by_side(self._made, self._read(groups), count, heed)
        else:
            made = map(self._made, self._read(groups))
        for group in made:
            for unit in group:
                self.put(unit.layer.name, unit.tensors, unit.row)
                self.finish([unit.layer])
                self.monitor.cancelled()

    def _rows8(self, layer: LayerPlan) -> tuple[dict[str, Tensor], LayerRow]:
        name, bias = layer.name, f"{layer.name}.bias"
        codes, scale, db = rows8.quantize_rows(self.source.read(f"{name}.weight"), self.device)
        row = LayerRow(
            name=name,
            action=layer.action,
            why=layer.why,
            db=round(db, 2) if math.isfinite(db) else None,
            bytes_before=self.source.nbytes(name),
            bytes_after=0,
        )
        own = {bias: self.source.read(bias)} if layer.bias else {}
        return rows8.tensors(name, codes, scale) | own, row

    def _read(self, groups: list[list[LayerPlan]]) -> Iterator[_Group]:
        """What is left to do, with what it takes."""
        for group in groups:
            unfinished = [layer for layer in group if layer.name not in self.writer.finished]
            self.finish(layer for layer in group if layer not in unfinished)
            if not unfinished:
                continue
            self.start(unfinished[0].name)
            read = group if len(group) > 1 else unfinished
            yield _Group(
                unfinished,
                {layer.name: with_zeros(self.source.weight(layer.name)) for layer in read},
                {layer.name: self.source.bias(layer.name) for layer in unfinished},
                {layer.name: self.statistics(layer.name) for layer in read},
            )

    def _measured(self, group: list[LayerPlan]) -> widths.Layers:
        """What 8 bits would save in layers that read one input, and cost."""
        self.start(group[0].name)
        return widths.together(
            widths.measured(
                layer.name,
                with_zeros(self.source.weight(layer.name)).to(self.device),
                self.statistics(layer.name),
                self.recipe,
                layer.post_gelu,
            )
            for layer in group
        )

    def _recipe_of(self, name: str) -> Recipe:
        """The recipe with the width of a layer's activations."""
        return widths.widened(self.recipe) if name in self.wide else self.recipe

    def _made(self, group: _Group) -> list[_Unit]:
        smooth = None
        if len(group.weights) > 1:
            weights = [weight.to(self.device) for weight in group.weights.values()]
            statistics = next(iter(group.statistics.values()))
            recipe = self._recipe_of(group.unfinished[0].name)
            smooth = shared_smoothing(weights, statistics, recipe)
        return [self._quantized(layer, group, smooth) for layer in group.unfinished]

    def _quantized(self, layer: LayerPlan, group: _Group, smooth: Tensor | None) -> _Unit:
        began = time.monotonic()
        weight, bias = group.weights[layer.name].to(self.device), group.biases[layer.name]
        if bias is not None:
            bias = bias.to(self.device)
        stats = group.statistics[layer.name]
        result: StoredWeight
        if layer.action == "w4a4":
            result, db, how = self._w4a4(layer, weight, bias, stats, smooth)
        else:
            result, db, how = self._w4a16(weight, bias, stats)
        why = f"{layer.why}; {how}" if how else layer.why
        why = why[: len(layer.why.encode()) + WHY_ROOM // 2]
        tensors = {key: tensor.cpu() for key, tensor in result.tensors(layer.name).items()}
        tensors[f"{layer.name}.comfy_quant"] = padded(tensors[f"{layer.name}.comfy_quant"])
        row = LayerRow(
            name=layer.name,
            action="nvfp4" if self.recipe.floats and layer.action == "w4a4" else layer.action,
            why=why,
            db=round(db, 2) if math.isfinite(db) else None,
            bytes_before=self.source.nbytes(layer.name),
            bytes_after=0,
            seconds=time.monotonic() - began,
            on=measured_on(stats),
        )
        return _Unit(layer, tensors, row)

    def _w4a4(  # noqa: PLR0913  (a layer and what is known of it)
        self,
        layer: LayerPlan,
        weight: Tensor,
        bias: Tensor | None,
        stats: InputStats | None,
        smooth: Tensor | None,
    ) -> tuple[StoredWeight, float, str]:
        """The layer, its error in dB, and how it was made."""
        recipe = self._recipe_of(layer.name)

        def made(stats: InputStats | None, recipe: Recipe) -> _Made:
            known: _Known = {
                "post_gelu": layer.post_gelu,
                "smooth": smooth,
                "generator": generator_of(recipe, layer.name),
            }
            fitted = _floats if recipe.floats else _integers
            return fitted(weight, bias, stats, recipe, known)

        def data_free() -> StoredWeight:
            return made(None, without_data(recipe)).weight

        result, db, how = _settled(weight, bias, stats, made(stats, recipe), data_free)
        return result, db, f"{WIDE}, {how}" if layer.name in self.wide else how

    def _w4a16(
        self, weight: Tensor, bias: Tensor | None, stats: InputStats | None
    ) -> tuple[StoredWeight, float, str]:
        """The same for a layer of few tokens."""

        def fitted(stats: InputStats | None) -> tuple[StoredWeight, float]:
            return quantize_w4a16(weight, bias, stats, self.recipe)

        result, db = fitted(stats)
        first = _Made(result, db, "", lambda whole: fitted(whole)[0])
        return _settled(weight, bias, stats, first, lambda: fitted(None)[0])


def _integers(
    weight: Tensor, bias: Tensor | None, stats: InputStats | None, recipe: Recipe, known: _Known
) -> _Made:
    result, error = quantize_linear(weight, bias, stats, recipe, **known)

    def refitted(whole: InputStats) -> StoredWeight:
        return quantize_linear(weight, bias, whole, recipe, **known, chosen=error.chosen)[0]

    return _Made(result, error.db, _in_words(error), refitted)


def _floats(
    weight: Tensor, bias: Tensor | None, stats: InputStats | None, recipe: Recipe, known: _Known
) -> _Made:
    found = quantize_linear_nvfp4(weight, bias, stats, recipe, **known)

    def refitted(whole: InputStats) -> StoredWeight:
        chosen: _Known = {**known, "smooth": found.weight.smooth_factor}
        alone = replace(recipe, compare=False)
        return quantize_linear_nvfp4(weight, bias, whole, alone, **chosen).weight

    return _Made(found.weight, found.db, found.in_words(), refitted)


def _settled(
    weight: Tensor,
    bias: Tensor | None,
    stats: InputStats | None,
    first: _Made,
    data_free: Callable[[], StoredWeight],
) -> tuple[StoredWeight, float, str]:
    """The layer, its error in dB and how it was made: from its weights alone where that is closer
    on held-out pictures; else fitted once more, to these too. Its error is the one before that.
    """
    other = closer(weight, bias, stats, first.weight, data_free)
    if other is not None:
        return *other, DATA_FREE
    if stats is None or not stats.held_count:
        return first.weight, first.db, first.how
    return first.refitted(stats.whole()), first.db, first.how


def generator_of(recipe: Recipe, name: str) -> torch.Generator:
    """A layer's own random numbers, wherever and whenever it is made."""
    return torch.Generator().manual_seed(zlib.crc32(f"{recipe.seed} {name}".encode()))


def layout(
    shapes: Mapping[str, tuple[int, ...]],
    layers: Iterable[LayerPlan],
    rank: int,
    kept_dtype: Callable[[str], torch.dtype] = lambda name: torch.bfloat16,
    w4a4: str = "svdquant_w4a4",
    group: int = 64,
) -> list[TensorSpec]:
    """Every tensor of the 4-bit file, from shapes alone. w4a4: the format of its W4A4 layers."""
    specs, quantized = [], {layer.name: layer for layer in layers if layer.action != "keep"}
    for layer in quantized.values():
        if layer.action == "rows8":
            specs += rows8.specs(layer.name, layer.N, layer.K)
            if layer.bias:
                bias = f"{layer.name}.bias"
                specs.append(TensorSpec(bias, kept_dtype(bias), (layer.N,)))
            continue
        kind = w4a4 if layer.action == "w4a4" else "awq_w4a16"
        config = {"format": kind, "rank": rank, "group": group}
        sizes = layer_sizes(config, layer.N, layer.columns // 2)
        assert sizes is not None  # the plan's layers have whole groups
        rules = dict(FORMATS[kind][0])
        if kind == "svdquant_w4a8" and rank:
            rules |= OPTIONAL[kind]
        for suffix, rule in rules.items():
            shape = tuple(sizes[letter] for letter in rule.split(","))
            dtype = _dtype_of(kind, suffix)
            specs.append(TensorSpec(f"{layer.name}.{suffix}", dtype, shape))
        if layer.bias:
            specs.append(TensorSpec(f"{layer.name}.bias", torch.bfloat16, (layer.N,)))
        specs.append(TensorSpec(f"{layer.name}.comfy_quant", torch.uint8, (JSON_BYTES,)))
    owned = {f"{name}.{part}" for name in quantized for part in ("weight", "bias")}
    return specs + [
        TensorSpec(key, kept_dtype(key), tuple(shape))
        for key, shape in shapes.items()
        if key not in owned
    ]


_FLOAT32 = ("weight_channel_scale", "weight_scale_2")  # of a row; the rest is bfloat16


def _dtype_of(kind: str, suffix: str) -> torch.dtype:
    """The dtype that a tensor is written in."""
    allowed = dtypes_of(kind, suffix)
    if torch.bfloat16 not in allowed:
        return allowed[0]
    return torch.float32 if suffix in _FLOAT32 else torch.bfloat16


def _in_words(error: LayerError) -> str:
    words = [f"smoothing {error.smoothing}"]
    if error.act_unsigned:
        words.append("unsigned inputs")
    if error.rotation:
        words.append("rotated")
    if error.gptq:
        words.append("GPTQ")
    return ", ".join([*words, error.inputs])
