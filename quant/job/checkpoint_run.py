"""A checkpoint's quantization, told once for all methods: prepare, measure, write.

    job = SVDQuantJob.prepare(source, target, recipe)   plans, and looks once at what the target is
    job.existing_report(provenance)                     all is done already? then nothing is run
    job.write(measurement, monitor, device)             unit by unit, resumable to the byte

Measuring belongs to whoever can run the model (ComfyUI, diffusers) and gives a `Measurement`.
A method adds what becomes of its layers (`plan`), how its file is laid out (`layout`), and a
`LayerQuantizer` that does the work.
"""

import json
import math
import os
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor

from ..calibration.statistics import InputStats
from ..files import architectures
from ..files.architectures import Architecture, LayerPlan, recognise
from ..files.atomic import Held
from ..files.checkpoint import QuantizedFile, open_quantized
from ..files.errors import FileRefused
from ..files.report import LayerRow, Report
from ..files.source import Source, StateDictSource, passed_on
from ..files.writer import TensorSpec, Writer, check_path, check_target
from .measurement import Measurement
from .monitor import Monitor
from .run_metadata import (
    file_metadata,
    identity_of,
    metadata_choices,
    predicted_identity,
    reserved_bytes,
)

NOT_MEASURED = Measurement()
UNWATCHED = Monitor()


@dataclass
class ShapesOnly:
    """Stands for a source of which only names and shapes are known: enough to plan."""

    name: str
    shapes: Mapping[str, tuple[int, ...]]
    bytes: int
    kept_dtype: Callable[[str], torch.dtype]
    path: None = None
    notes: list[str] = field(default_factory=list)


Job = TypeVar("Job", bound="QuantizeJob")


@dataclass
class QuantizeJob(ABC):
    """One model, one target, one recipe, planned. `existing`: the target where it is an intact file
    of this model and recipe, whatever was measured for it; held: the target, where its lock is held
    already.
    """

    method: ClassVar[str]  # as the file's metadata have it

    source: Source | StateDictSource
    target: Path
    recipe: Any  # of the method; see `recipe.FromPreset`
    architecture: str
    layers: list[LayerPlan]
    existing: QuantizedFile | None = None
    held: Held | None = None

    @classmethod
    def prepare(
        cls: type[Job],
        source: str | Path | Source | StateDictSource,
        target: str | Path | Held,
        recipe: Any,
    ) -> Job:
        """Opens, plans and checks. source: path of a model (`Source`), or an opened source (a live
        model: StateDictSource); target: a path, or one whose lock is held. Raises FileRefused for
        input that cannot be used.
        """
        if not isinstance(source, (Source, StateDictSource)):
            source = Source(source)
        source.check()
        previous = _previous_result(source, target)
        job = cls._planned(source, Path(target), recipe)
        job.held = target if isinstance(target, Held) else None
        if previous is not None and job._made(previous):
            job.existing = previous
        return job

    @classmethod
    def _planned(cls: type[Job], source: Any, target: Path, recipe: Any) -> Job:
        live = isinstance(source, StateDictSource)
        architecture = recognise(source.shapes, source.name, native=live)
        layers = cls.plan(source.shapes, architecture, recipe, source.name)
        if architecture.guessed and architectures.GUESSED not in source.notes:
            source.notes.append(architectures.GUESSED)
        return cls(source, target, recipe, architecture.name, layers)

    @staticmethod
    def plan(
        shapes: Mapping[str, tuple[int, ...]], architecture: Architecture, recipe: Any, name: str
    ) -> list[LayerPlan]:
        """What becomes of each linear, and why. `name` is the model's in refusals."""
        return architectures.plan(shapes, architecture, recipe, name)

    @abstractmethod
    def layout(self) -> list[TensorSpec]:
        """Every tensor of the file."""

    @abstractmethod
    def quantizer(
        self, writer: Writer, measurement: Measurement, monitor: Monitor, device: torch.device
    ) -> "LayerQuantizer":
        """What does the work. Raises ValueError where the measurement is not enough for it."""

    @property
    def quantized_names(self) -> list[str]:
        """The layers that are fitted to what they read, in the order of the file."""
        return [layer.name for layer in self.layers if layer.action not in ("keep", "rows8")]

    def existing_report(self, provenance: Mapping | None = None) -> Report | None:
        """The report of the target if it is the result of the same run. provenance: of the
        measurement that the run would have; None: any will do.
        """
        if self.existing is None:
            return None
        if provenance is not None and self.existing.fact("calibration") != provenance:
            return None
        try:
            return Report.from_json(self.existing.metadata.get("report", ""))
        except ValueError:
            return None  # of another version: it is made again

    def write(
        self,
        measurement: Measurement = NOT_MEASURED,
        monitor: Monitor = UNWATCHED,
        device: str | torch.device = "cpu",
        adopt: Callable[[Writer], None] = lambda writer: None,
    ) -> Report:
        """Writes the file; returns at once when the target is the result of the same run. Never
        leaves a half-written target. Raises FileRefused and ValueError for input that cannot be
        used, before anything is written where that is possible.

        adopt  writes the units that are finished elsewhere (`parts.py`), before any is made
        """
        report = self.existing_report(measurement.provenance)
        if report is not None:
            return report
        self.check_measurement(measurement)
        identity = identity_of(self.source, self.recipe, measurement.provenance)
        report = self._empty_report()
        began = time.monotonic()
        self.before_layout(measurement, monitor, torch.device(device))
        specs = self.layout()
        metadata = self.metadata(identity)
        reserved = reserved_bytes(metadata, report, self.layers)
        with Writer(self.held or self.target, specs, json.dumps(identity), reserved) as writer:
            adopt(writer)
            self.quantizer(writer, measurement, monitor, torch.device(device)).run()
            report.rows = [LayerRow(**writer.finished[layer.name]) for layer in self.layers]
            report.bytes_after = writer.size
            report.seconds = writer.seconds_before + time.monotonic() - began
            writer.finish(metadata_choices(metadata, report))
        return report

    def metadata(self, identity: Mapping[str, str]) -> dict[str, str]:
        """The file's metadata but the report."""
        return file_metadata(self.method, identity, self.source.metadata)

    def check_measurement(self, measurement: Measurement) -> None:  # noqa: B027  (few need more)
        """Raises ValueError where the recipe needs more than was measured."""

    def before_layout(  # noqa: B027  (few need it)
        self, measurement: Measurement, monitor: Monitor, device: torch.device
    ) -> None:
        """Finds out what the layout depends on besides the recipe and the shapes."""

    @classmethod
    def predict(
        cls,
        shapes: Mapping[str, tuple[int, ...]],
        recipe: Any,
        name: str,
        bytes_before: int | None = None,
        kept_dtype: Callable[[str], torch.dtype] = lambda name: torch.bfloat16,
    ) -> Report:
        """The report that a run would give, without errors and seconds: sizes to the byte.
        bytes_before: of the source; by default as bf16.
        """
        before = bytes_before or 2 * sum(math.prod(shape) for shape in shapes.values())
        source = ShapesOnly(name, shapes, before, kept_dtype)
        job = cls._planned(source, Path("plan.safetensors"), recipe)
        specs = job.layout()
        sizes: dict[str, int] = {}
        for spec in specs:
            owner = spec.name.rpartition(".")[0]
            sizes[owner] = sizes.get(owner, 0) + spec.nbytes
        report = job._empty_report()
        report.rows = [
            LayerRow(
                name=layer.name,
                action=layer.action,
                why=layer.why,
                db=None,
                bytes_before=2 * layer.N * (layer.K + layer.bias),
                bytes_after=sizes[layer.name],
            )
            for layer in job.layers
        ]
        metadata = file_metadata(cls.method, predicted_identity(name, recipe))
        reserved = reserved_bytes(metadata, report, job.layers)
        report.bytes_after = Writer(job.target, specs, "", reserved).size
        return report

    @property
    def unmatched(self) -> list[str]:
        """A note for each of the user's patterns that names no layer: most likely a slip."""
        names = [layer.name for layer in self.layers]
        return [
            f"no layer matches the pattern {pattern!r}"
            for pattern in (*self.recipe.keep, *self.recipe.w4a16)
            if not any(fnmatchcase(name, pattern) for name in names)
        ]

    def _empty_report(self) -> Report:
        return Report(
            self.architecture,
            bytes_before=self.source.bytes,
            notes=[*self.source.notes, *self.unmatched],
        )

    def _made(self, file: QuantizedFile) -> bool:
        """Whether a file was made from this model by this recipe, and ComfyUI will build it so."""
        if passed_on(self.source.metadata).get("config") != file.metadata.get("config"):
            return False
        # the source's fingerprint reads all of the model: asked last
        return file.metadata.get("recipe") == self.recipe.to_json() and file.metadata.get(
            "source"
        ) == identity_of(self.source, self.recipe, {}).get("source")


def _previous_result(
    source: Source | StateDictSource, target: str | os.PathLike
) -> QuantizedFile | None:
    """What a run has to look at in its target: an intact file of ours, or None. Raises FileRefused
    for a target that must not be written.
    """
    check_path(source.path, target)
    if not Path(target).exists():
        return None
    try:
        return open_quantized(target)
    except FileRefused:
        # another program's file is refused; ours, damaged or of another version, is made again
        check_target(source.path, target)
        return None


class LayerQuantizer(ABC):
    """Makes and writes a job's units one after the other; skips those that an earlier run wrote."""

    def __init__(self, job: QuantizeJob, writer: Writer, monitor: Monitor, device: torch.device):
        self.source = job.source
        self.recipe = job.recipe
        self.layers = job.layers
        self.writer = writer
        self.monitor = monitor
        self.device = device
        self.weights = sum(layer.K * layer.N for layer in job.layers)
        # of an earlier run: done from the start, so that the time left is told by this run's speed
        self._before = {layer.name for layer in job.layers if layer.name in writer.finished}
        self.layers_done = len(self._before)
        self.weights_done = sum(
            layer.K * layer.N for layer in job.layers if layer.name in self._before
        )

    def run(self) -> None:
        """What stays in 16 bit first, quick as it is: it shows soon whether the file can be read.
        Then the layers.
        """
        self._keep_rest()
        self.quantize([layer for layer in self.layers if layer.action != "keep"])
        self.monitor.progress(self.weights, self.weights, "")

    @abstractmethod
    def quantize(self, layers: list[LayerPlan]) -> None:
        """Writes all planned layers: calls `start`, `write_unit` and `finish` for each."""

    def start(self, name: str) -> None:
        """Says that a layer or block is next; raises where the user pressed Stop."""
        self.monitor.layers(self.layers_done, len(self.layers))
        self.monitor.cancelled()
        self.monitor.progress(self.weights_done, self.weights, name)

    def finish(self, layers: Iterable[LayerPlan]) -> None:
        """Counts layers as done, those of an earlier run once."""
        fresh = [layer for layer in layers if layer.name not in self._before]
        self.weights_done += sum(layer.K * layer.N for layer in fresh)
        self.layers_done += len(fresh)
        self.monitor.layers(self.layers_done, len(self.layers))

    def write_unit(
        self, unit: str, make: Callable[[], tuple[Mapping[str, Tensor], LayerRow | None]]
    ) -> None:
        """Makes and writes a unit's tensors and its row of the report, unless it is written."""
        if unit in self.writer.finished:
            return
        began = time.monotonic()
        tensors, row = make()
        if row is not None:
            row.seconds += time.monotonic() - began
        self.put(unit, tensors, row)

    def put(self, unit: str, tensors: Mapping[str, Tensor], row: LayerRow | None) -> None:
        """Writes a unit that is made, and its row."""
        if row is not None:
            row.bytes_after = sum(tensor.nbytes for tensor in tensors.values())
            row.seconds = round(row.seconds, 3)
        self.writer.write(unit, tensors, vars(row) if row else {})

    def recorded(self, measurement: Measurement, name: str) -> InputStats | None:
        """What was recorded of a layer's inputs. Raises FileRefused for inputs that are not finite,
        naming the tensor that is the cause where one is.
        """
        stats = measurement.statistics(name)
        if stats is not None and not stats.mean_square.isfinite().all():
            for key in self.source.shapes:
                self.source.read(key)  # refuses NaN and infinity
            raise FileRefused(
                f"{self.source.name} overflowed while it was measured: {name} reads NaN or"
                " infinity, and all its weights are finite; measure with fewer or other prompts,"
                " or choose the preset that reads the weights alone."
            )
        return stats

    def _keep_rest(self) -> None:
        kept = {layer.name: layer for layer in self.layers if layer.action == "keep"}
        owned = {f"{layer.name}.{part}" for layer in self.layers for part in ("weight", "bias")}
        for name in [key for key in self.source.shapes if key not in owned]:
            self.monitor.cancelled()
            self.write_unit(name, partial(self._kept_tensor, name))
        for name, layer in kept.items():
            self.start(name)
            self.finish([layer])
            self.write_unit(name, partial(self._kept_layer, layer))

    def _kept_tensor(self, name: str) -> tuple[dict[str, Tensor], None]:
        return {name: self.source.read(name)}, None

    def _kept_layer(self, layer: LayerPlan) -> tuple[dict[str, Tensor], LayerRow]:
        keys = [f"{layer.name}.weight"]
        if layer.bias:
            keys.append(f"{layer.name}.bias")
        row = LayerRow(
            name=layer.name,
            action="keep",
            why=layer.why,
            db=None,
            bytes_before=self.source.nbytes(layer.name),
            bytes_after=0,
        )
        return {key: self.source.read(key) for key in keys}, row
