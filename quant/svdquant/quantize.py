"""A whole checkpoint to 4 bits, a few layers in memory at a time: plan, read, decompose, write.

Every layer draws its random numbers from the recipe's seed and its own name, so the result does not
depend on the order of the work or on where an earlier run was interrupted: the file comes out the
same, byte for byte (on one machine with one number of threads).
"""

import itertools
import math
import zlib
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from ..files.architectures import LayerPlan
from ..files.layer_formats import FORMATS
from ..files.report import LayerRow, Report
from ..files.safetensors import TensorSpec
from ..files.source import Source, StateDictSource
from ..files.writer import Writer
from ..job.checkpoint_run import NOT_MEASURED, UNWATCHED, LayerQuantizer, QuantizeJob
from ..job.measurement import Measurement
from ..job.monitor import Monitor
from ..job.run_metadata import JSON_BYTES, WHY_ROOM, padded
from ..weights.awq_w4a16 import W4A16Weight
from ..weights.svdquant_w4a4 import SVDQuantWeight
from .decompose import LayerError, quantize_linear, shared_smoothing
from .recipe import Recipe
from .w4a16 import quantize_w4a16

_FORMAT_OF = {"w4a4": "svdquant_w4a4", "w4a16": "awq_w4a16"}


class SVDQuantJob(QuantizeJob):
    """A checkpoint's quantization to 4-bit weights and activations."""

    method = "svdquant"

    def layout(self) -> list[TensorSpec]:
        return layout(self.source.shapes, self.layers, self.recipe.rank, self.source.kept_dtype)

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


class SVDQuantizer(LayerQuantizer):
    """Layer by layer; those that read one input one behind the other, with the same smoothing."""

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

    def quantize(self, layers: list[LayerPlan]) -> None:
        for _, members in itertools.groupby(layers, key=lambda layer: layer.group or layer.name):
            group = list(members)
            smooth = None
            if len(group) > 1 and any(layer.name not in self.writer.finished for layer in group):
                self.monitor.cancelled()
                smooth = self._smoothing(group)
            for layer in group:
                self.start(layer.name)
                self.write_unit(layer.name, partial(self._quantized, layer, smooth))
                self.finish([layer])

    def _smoothing(self, group: list[LayerPlan]) -> Tensor:
        weights = [self.source.weight(layer.name).to(self.device) for layer in group]
        return shared_smoothing(weights, self.statistics(group[0].name), self.recipe)

    def _quantized(
        self, layer: LayerPlan, smooth: Tensor | None
    ) -> tuple[dict[str, Tensor], LayerRow]:
        weight = self.source.weight(layer.name).to(self.device)
        bias = self.source.bias(layer.name)
        if bias is not None:
            bias = bias.to(self.device)
        stats = self.statistics(layer.name)
        why = layer.why
        result: SVDQuantWeight | W4A16Weight
        if layer.action == "w4a4":
            seed = zlib.crc32(f"{self.recipe.seed} {layer.name}".encode())
            result, error = quantize_linear(
                weight,
                bias,
                stats,
                self.recipe,
                post_gelu=layer.post_gelu,
                smooth=smooth,
                generator=torch.Generator().manual_seed(seed),
            )
            db = error.db
            why = f"{why}; {_in_words(error)}"[: len(why.encode()) + WHY_ROOM // 2]
        else:
            result, db = quantize_w4a16(weight, bias, stats, self.recipe)
        tensors = {key: tensor.cpu() for key, tensor in result.tensors(layer.name).items()}
        tensors[f"{layer.name}.comfy_quant"] = padded(tensors[f"{layer.name}.comfy_quant"])
        row = LayerRow(
            name=layer.name,
            action=layer.action,
            why=why,
            db=round(db, 2) if math.isfinite(db) else None,
            bytes_before=self.source.nbytes(layer.name),
            bytes_after=0,
        )
        return tensors, row


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
            dtype = torch.int8 if suffix == "weight" else torch.bfloat16
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


def _in_words(error: LayerError) -> str:
    words = [f"smoothing {error.smoothing}"]
    if error.act_unsigned:
        words.append("unsigned inputs")
    if error.rotation:
        words.append("rotated")
    if error.gptq:
        words.append("GPTQ")
    return ", ".join([*words, error.inputs])
