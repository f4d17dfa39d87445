"""A whole checkpoint into a file for stock ComfyUI, layer by layer, resumable to the byte."""

import math
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...files import architectures
from ...files.architectures import GROUP, Architecture, LayerPlan
from ...files.atomic import Held
from ...files.errors import FileRefused
from ...files.report import LayerRow, Report
from ...files.safetensors import TensorSpec, read_header
from ...files.source import Source, StateDictSource
from ...files.writer import Writer, check_target
from ...job.checkpoint_run import LayerQuantizer, QuantizeJob
from ...job.measurement import Measurement
from ...job.monitor import Monitor
from ...job.run_metadata import WHY_ROOM, identity_of
from ...weights.base import json_tensor
from .fit import quantize_layer
from .formats import FORMATS

# "format" in the metadata: no file of Nibble's own layers, but one that may be written over
KIND = "nibble-stock"


class StockJob(QuantizeJob):
    """A checkpoint's quantization to a format of ComfyUI's own."""

    method = "stock"

    @classmethod
    def prepare(
        cls, source: str | Path | Source | StateDictSource, target: str | Path | Held, recipe: Any
    ) -> "StockJob":
        if not isinstance(source, (Source, StateDictSource)):
            source = Source(source)
        source.check()
        check_target(source.path, target, KIND)
        job = cls._planned(source, Path(target), recipe)
        job.held = target if isinstance(target, Held) else None
        return job

    @staticmethod
    def plan(
        shapes: Mapping[str, tuple[int, ...]], architecture: Architecture, recipe: Any, name: str
    ) -> list[LayerPlan]:
        action = FORMATS[recipe.format].action
        return [
            _planned(layer, action)
            for layer in architectures.plan(shapes, architecture, recipe, name)
        ]

    def layout(self) -> list[TensorSpec]:
        form = FORMATS[self.recipe.format]
        specs, quantized = [], [layer for layer in self.layers if layer.action != "keep"]
        for layer in quantized:
            text = json_tensor(form.facts(layer.K))
            own = [
                *form.specs(layer.N, layer.K),
                TensorSpec("comfy_quant", torch.uint8, text.shape),
            ]
            specs += [spec._replace(name=f"{layer.name}.{spec.name}") for spec in own]
            if layer.bias:
                # ComfyUI makes them what it computes in; bfloat16 rounds off what a bias takes up
                specs.append(TensorSpec(f"{layer.name}.bias", torch.float32, (layer.N,)))
        owned = {f"{layer.name}.{part}" for layer in quantized for part in ("weight", "bias")}
        return specs + [
            TensorSpec(key, self.source.kept_dtype(key), tuple(shape))
            for key, shape in self.source.shapes.items()
            if key not in owned
        ]

    def quantizer(
        self, writer: Writer, measurement: Measurement, monitor: Monitor, device: torch.device
    ) -> "_StockQuantizer":
        return _StockQuantizer(self, writer, measurement, monitor, device)

    def metadata(self, identity: Mapping[str, str]) -> dict[str, str]:
        return super().metadata(identity) | {"format": KIND}

    def existing_report(self, provenance: Mapping | None = None) -> Report | None:
        """The report of the target if it is an intact result of the same run."""
        if not self.target.exists() or provenance is None:
            return None
        try:
            identity = identity_of(self.source, self.recipe, dict(provenance))
            made = read_header(self.target).metadata
            if any(made.get(key) != value for key, value in identity.items()):
                return None
            return Report.from_json(made.get("report", ""))
        except (FileRefused, ValueError):
            return None  # damaged, or of another version: it is made again


class _StockQuantizer(LayerQuantizer):
    def __init__(
        self,
        job: StockJob,
        writer: Writer,
        measurement: Measurement,
        monitor: Monitor,
        device: torch.device,
    ):
        super().__init__(job, writer, monitor, device)
        self.form = FORMATS[job.recipe.format]
        self.statistics = partial(self.recorded, measurement)

    def quantize(self, layers: list[LayerPlan]) -> None:
        for layer in layers:
            self.start(layer.name)
            self.write_unit(layer.name, partial(self._quantized, layer))
            self.finish([layer])

    def _quantized(self, layer: LayerPlan) -> tuple[dict[str, Tensor], LayerRow]:
        name, bias = layer.name, self.source.bias(layer.name)
        made, db, words = quantize_layer(
            self.source.weight(name).to(self.device),
            None if bias is None else bias.to(self.device),
            self.statistics(name),
            self.form,
            self.recipe,
            layer.post_gelu,
        )
        row = LayerRow(
            name=name,
            action=layer.action,
            why=f"{layer.why}; {words}"[: len(layer.why.encode()) + WHY_ROOM // 2],
            db=round(db, 2) if math.isfinite(db) else None,
            bytes_before=self.source.nbytes(name),
            bytes_after=0,
        )
        return {f"{name}.{suffix}": tensor.cpu() for suffix, tensor in made.items()}, row


def _planned(layer: LayerPlan, action: str) -> LayerPlan:
    """A layer's plan; stock ComfyUI puts no zeros behind what a layer reads."""
    if layer.action == "keep":
        return layer
    if layer.columns != layer.K:
        return replace(layer, action="keep", why=f"K={layer.K} is not a multiple of {GROUP}")
    return replace(layer, action=action)
