"""A whole checkpoint to codewords, a few layers in memory at a time: plan, read, fit, calibrate,
write.

Every layer and every block draw their random numbers from the recipe's seed and their own name, and
a block is calibrated from its start or not at all: an interrupted run that goes on ends in the same
file as one that was not, byte for byte (on one machine with one number of threads, given a
trajectory that repeats itself).
"""

import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from ...kernels.reference import hadamard64
from ..calibration.statistics import InputStats
from ..calibration.teacher import Teacher
from ..files.architectures import LayerPlan
from ..files.report import LayerRow, Report
from ..files.safetensors import TensorSpec
from ..files.source import Source, StateDictSource
from ..files.writer import Writer
from ..job.checkpoint_run import NOT_MEASURED, UNWATCHED, LayerQuantizer, QuantizeJob
from ..job.measurement import Measurement, measured_on
from ..job.monitor import BlockError, Monitor
from ..job.run_metadata import padded
from ..job.whole_groups import with_zeros
from ..training.recompute import allowing_writes
from ..weights.vq import VQWeight
from . import calibrate, sensitivity
from . import fit as fitting
from .calibrate import BlockCalibrator
from .layout import Layouts, bias_dtype, file_specs, layer_layouts, plan
from .recipe import Recipe
from .student import HardVQLinear, SoftVQLinear

__all__ = ["VQJob", "plan", "predict", "quantize_checkpoint"]


@dataclass
class VQJob(QuantizeJob):
    """A checkpoint's quantization to codewords."""

    method = "vq"
    plan = staticmethod(plan)
    layouts: Layouts | None = None  # known once the file is laid out
    calibrator: BlockCalibrator | None = None  # made before it, where bits depend on the model
    sensitivities: Mapping[str, float] | None = None

    def layout(self) -> list[TensorSpec]:
        self.layouts = layer_layouts(self.source, self.layers, self.recipe, self.sensitivities)
        return file_specs(
            self.source.shapes, self.layers, self.layouts, self.recipe, self.source.kept_dtype
        )

    def check_measurement(self, measurement: Measurement) -> None:
        if self.recipe.calibrated and measurement.teacher is None:
            raise ValueError(
                f"the preset {self.recipe.preset!r} watches the 16-bit model at work, and none was"
                " given; use the preset 'fast'"
            )

    def before_layout(
        self, measurement: Measurement, monitor: Monitor, device: torch.device
    ) -> None:
        if measurement.teacher is None or not self.recipe.measures_sensitivity:
            return
        layers = [layer for layer in self.layers if layer.action != "keep"]
        weights, seen = sum(layer.K * layer.N for layer in self.layers), 0

        def watch(layer: LayerPlan) -> None:
            nonlocal seen
            monitor.progress(seen, weights, f"how much {layer.name} matters")
            monitor.cancelled()
            seen += layer.K * layer.N

        with torch.inference_mode(False):
            self.calibrator = BlockCalibrator(measurement.teacher, self.quantized_names)
            read = partial(read_layer, self.source, device)
            self.sensitivities = sensitivity.measure(
                self.calibrator, layers, read, self.recipe, watch
            )

    def quantizer(
        self, writer: Writer, measurement: Measurement, monitor: Monitor, device: torch.device
    ) -> "_VQQuantizer":
        if measurement.teacher is not None and self.recipe.calibrated:
            return _CalibratedQuantizer(self, writer, measurement.teacher, monitor, device)
        return _ClosedFormQuantizer(self, writer, measurement, monitor, device)


predict = VQJob.predict


def read_layer(
    source: Source | StateDictSource, device: torch.device, name: str
) -> tuple[Tensor, Tensor | None]:
    """A layer's weight and bias, float32, on the device."""
    bias = source.bias(name)
    return with_zeros(source.weight(name)).to(device), None if bias is None else bias.to(device)


def quantize_checkpoint(
    source: str | Path | Source | StateDictSource,
    target: str | Path,
    recipe: Recipe,
    measurement: Measurement = NOT_MEASURED,
    monitor: Monitor = UNWATCHED,
    device: str | torch.device = "cpu",
) -> Report:
    """Writes a model's file of codewords; returns at once when the target was made from the same
    model with the same options and measurement.

    source       path of a .safetensors file, or an opened source (a live model: StateDictSource)
    measurement  for recipes without calibration (fast): recorded inputs, where there are some; with
                 calibration (vq4dit, best): the 16-bit model at work
    Raises FileRefused and ValueError for input that cannot be used, before anything is written
    where that is possible.
    """
    return VQJob.prepare(source, target, recipe).write(measurement, monitor, device)


class _VQQuantizer(LayerQuantizer):
    """What both ways to codewords share: reading, seeds, and a fitted layer's tensors and row."""

    def __init__(self, job: VQJob, writer: Writer, monitor: Monitor, device: torch.device):
        super().__init__(job, writer, monitor, device)
        self.layouts = job.layouts or {}

    def read(self, layer: LayerPlan) -> tuple[Tensor, Tensor | None]:
        """The layer's weight and bias, float32, on the device."""
        return read_layer(self.source, self.device, layer.name)

    def generator(self, name: str) -> torch.Generator:
        """A layer's or block's own random numbers."""
        return torch.Generator().manual_seed(self.recipe.seed_of(name))

    def pack(self, layer: LayerPlan, fitted: fitting.Fitted) -> VQWeight:
        """A fitted layer as it is stored."""
        return fitted.pack(bias_dtype(layer, self.source.kept_dtype))

    def unit(
        self, layer: LayerPlan, fitted: fitting.Fitted, stats: InputStats | None
    ) -> tuple[dict[str, Tensor], LayerRow]:
        """A fitted layer's tensors and its row of the report."""
        packed = self.pack(layer, fitted)
        weight, bias = self.read(layer)
        rows = fitting.sample_rows(stats, layer.columns, self.generator(layer.name)).to(self.device)
        db = fitting.sqnr(weight, bias, packed, rows)
        tensors = {key: tensor.cpu() for key, tensor in packed.tensors(layer.name).items()}
        tensors[f"{layer.name}.comfy_quant"] = padded(tensors[f"{layer.name}.comfy_quant"])
        codewords, vector = packed.codebook.shape
        why = f"{layer.why}; {codewords} codewords of {vector}, {packed.bits_per_weight:.2f} bits"
        row = LayerRow(
            name=layer.name,
            action=layer.action,
            why=why,
            db=round(db, 2),
            bytes_before=self.source.nbytes(layer.name),
            bytes_after=0,
            on=measured_on(stats),
        )
        return tensors, row


class _ClosedFormQuantizer(_VQQuantizer):
    """Layer by layer, on recorded inputs where there are some."""

    def __init__(
        self,
        job: VQJob,
        writer: Writer,
        measurement: Measurement,
        monitor: Monitor,
        device: torch.device,
    ):
        super().__init__(job, writer, monitor, device)
        self.statistics = partial(self.recorded, measurement)

    def quantize(self, layers: list[LayerPlan]) -> None:
        for layer in layers:
            self.start(layer.name)
            stats = self.statistics(layer.name)
            self.write_unit(layer.name, partial(self._made, layer, stats))
            self.finish([layer])

    def _made(
        self, layer: LayerPlan, stats: InputStats | None
    ) -> tuple[dict[str, Tensor], LayerRow]:
        weight, bias = self.read(layer)
        options = self.recipe.layer_options(self.layouts[layer.name])
        fitted = fitting.fit(weight, bias, stats, options, self.generator(layer.name))
        return self.unit(layer, fitted, stats)


class _CalibratedQuantizer(_VQQuantizer):
    """Block by block, in the order of the model, beside the 16-bit model at work."""

    def __init__(
        self, job: VQJob, writer: Writer, teacher: Teacher, monitor: Monitor, device: torch.device
    ):
        super().__init__(job, writer, monitor, device)
        self.teacher = teacher
        self.calibrator = job.calibrator

    def quantize(self, layers: list[LayerPlan]) -> None:
        planned = {layer.name: layer for layer in layers}
        if all(name in self.writer.finished for name in planned):
            return
        with torch.inference_mode(False):
            calibrator = self.calibrator or BlockCalibrator(self.teacher, planned)
            for block, names in calibrator.blocks.items():
                self.start(block)
                members = [planned[name] for name in names]
                if all(name in self.writer.finished for name in names):
                    self._install_stored(calibrator, names)
                else:
                    self._calibrate(calibrator, block, members)
                self.finish(members)

    def _install_stored(self, calibrator: BlockCalibrator, names: list[str]) -> None:
        """A block that an earlier run wrote, read back for the student."""
        for name in names:
            stored = {key: self.writer.read(key) for key in self.writer.names(name)}
            weight = VQWeight.from_tensors(stored, name).to(self.device)
            calibrator.install(name, HardVQLinear(fitting.Fitted.unpack(weight)))

    def _calibrate(self, calibrator: BlockCalibrator, block: str, layers: list[LayerPlan]) -> None:
        began = time.monotonic()
        inputs, stats = calibrator.inputs(block, seed=self.recipe.seed)
        students = {layer.name: self._student(layer, stats.get(layer.name)) for layer in layers}
        gain = ""
        if inputs:
            targets = calibrator.targets(block, inputs)
            for name, student in students.items():
                calibrator.install(name, student)
            before, after = self._train(calibrator, block, students, targets)
            gain = f"; block {before:.1f} → {after:.1f} dB"
        seconds = (time.monotonic() - began) / len(layers)
        for layer in layers:
            fitted = students[layer.name].fitted()
            make = partial(self._trained_unit, layer, fitted, stats.get(layer.name))
            self.write_unit(layer.name, partial(make, gain, seconds))
            # what goes on in the student is what was stored, so that a resumed run sees the same
            stored = fitting.Fitted.unpack(self.pack(layer, fitted))
            calibrator.install(layer.name, HardVQLinear(stored).requires_grad_(False))

    def _trained_unit(
        self,
        layer: LayerPlan,
        fitted: fitting.Fitted,
        stats: InputStats | None,
        gain: str,
        seconds: float,
    ) -> tuple[dict[str, Tensor], LayerRow]:
        """The layer with its block's gain and share of the time in its row."""
        tensors, row = self.unit(layer, fitted, stats)
        row.why += gain
        row.seconds = seconds
        return tensors, row

    def _train(
        self,
        calibrator: BlockCalibrator,
        block: str,
        students: dict[str, HardVQLinear],
        targets: calibrate.BlockTargets,
    ) -> tuple[float, float]:
        """The block's error before and after, in dB."""
        blocks = list(calibrator.blocks)
        number = blocks.index(block)

        def watch(step: int, steps: int, db: float) -> None:
            self.monitor.cancelled()
            self.monitor.block_error(BlockError(number, len(blocks), block, step, steps, db))

        module = calibrator.student.get_submodule(block)
        with allowing_writes([module]):  # ComfyUI's blocks add to their inputs in place
            return calibrate.learn(
                module, students, targets, self.recipe, self.recipe.seed_of(block), watch
            )

    def _student(self, layer: LayerPlan, stats: InputStats | None) -> HardVQLinear:
        """A layer at the start of calibration."""
        options = self.recipe.layer_options(self.layouts[layer.name])
        weight, bias = self.read(layer)
        fitted = fitting.fit(
            weight, bias, stats if options.turns else None, options, self.generator(layer.name)
        )
        if self.recipe.preset != "vq4dit":
            return HardVQLinear(fitted)
        rotated = hadamard64(weight) if options.rotation else weight
        return SoftVQLinear(fitted, rotated, self.recipe.candidates)
