"""A whole checkpoint to codewords, a few layers in memory at a time: plan, read, fit, calibrate,
write.

Every layer and every block draw their random numbers from the recipe's seed and their own name, and
a block is calibrated from its start or not at all: an interrupted run that goes on ends in the same
file as one that was not, byte for byte (on one machine with one number of threads, given a
trajectory that repeats itself).
"""

import json
import math
import time
import zlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path

import torch
from torch import Tensor

from ...kernels.reference import hadamard64
from .. import architectures
from ..architectures import LayerPlan, recognise
from ..calibration.statistics import InputStats
from ..checkpoint_run import (
    JSON_BYTES,
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
from ..files.source import Source, StateDictSource
from ..files.writer import TensorSpec, Writer, check_target
from ..report import LayerRow, Report
from ..training.recompute import allowing_writes
from ..weights.vq import VQWeight
from . import bit_allocation, calibrate
from . import fit as fitting
from .calibrate import Classroom, Teacher
from .recipe import Recipe
from .student import Hard, Soft

__all__ = [
    "BlockError",
    "Teacher",
    "calibrated_on",
    "layout",
    "plan",
    "predict",
    "quantize_checkpoint",
]

# outside the blocks: the paper leaves embedders and the final layer alone too
_OUTSIDE = ("final_layer.*", "*_in.*", "*embed*")
Layouts = Mapping[str, tuple[int, int]]


@dataclass(frozen=True)
class BlockError:
    """How a block is doing: its number among `blocks`, its name, step and steps, error of its
    outputs in dB.
    """

    number: int
    blocks: int
    name: str
    step: int
    steps: int
    db: float


def plan(shapes: Mapping[str, tuple[int, ...]], recipe: Recipe, name: str) -> list[LayerPlan]:
    """What becomes of each linear: action "vq" or "keep", and why. Raises FileRefused for models
    that Nibble does not know.
    """
    layers = []
    for layer in architectures.plan(shapes, recognise(shapes, name), recipe, name):
        vector = recipe.layout((layer.N, layer.K))[1]
        action, why = ("keep", layer.why) if layer.action == "keep" else ("vq", layer.why)
        if (
            action == "vq"
            and calibrate.block_of(layer.name) == layer.name
            and any(fnmatchcase(layer.name, pattern) for pattern in _OUTSIDE)
        ):
            action, why = "keep", "16 bit: small, and every block or pixel depends on it"
        if action == "vq" and layer.K % vector:
            action, why = "keep", f"K={layer.K} is not a multiple of the sub-vector length {vector}"
        layers.append(replace(layer, action=action, why=why, group=None, post_gelu=False))
    return layers


def quantize_checkpoint(
    source: str | Path | Source | StateDictSource,
    target: str | Path,
    recipe: Recipe,
    statistics: Callable[[str], InputStats | None] | None = None,
    teacher: Teacher | None = None,
    progress: Callable[[int, int, str], None] | None = None,
    watch: Callable[[BlockError], None] | None = None,
    cancelled: Callable[[], None] | None = None,
    device: str | torch.device = "cpu",
    calibration: dict | None = None,
) -> Report:
    """Writes a model's file of codewords; returns at once when the target was made from the same
    model with the same options.

    source       path of a .safetensors file, or an opened source (a live model: StateDictSource)
    statistics   for recipes without calibration (fast): recorded inputs by a layer's name, or None
      where there are none
    teacher      for recipes with calibration (vq4dit, best): the 16-bit model at work
    progress     called before each layer or block with (weights done, weights in all, its name)
    watch        called every few steps of calibration
    cancelled    called before each layer and every few steps; raises to stop. Finished blocks stay
      and the next run goes on from there
    calibration  what statistics or trajectory come from, as JSON: part of the file, and of what
      "the same options" means
    Raises FileRefused and ValueError for input that cannot be used, before anything is written
    where that is possible.
    """
    source = source if isinstance(source, (Source, StateDictSource)) else Source(source)
    check_target(source.path, target)
    if recipe.calibrated and teacher is None:
        raise ValueError(
            f"the preset {recipe.preset!r} watches the 16-bit model at work, and none was given;"
            " use the preset 'fast'"
        )
    architecture, layers = (
        recognise(source.shapes, source.name),
        plan(source.shapes, recipe, source.name),
    )
    facts = facts_of(source, recipe, calibration)
    if done := finished(target, facts):
        return done
    report = Report(
        architecture.name,
        bytes_before=source.bytes,
        notes=[*source.notes, *unmatched(recipe.keep, layers)],
    )
    layouts = _layouts(source.shapes, layers, recipe, source.kept_dtype, source.weight)
    specs = layout(source.shapes, layers, layouts, recipe, source.kept_dtype)
    metadata = metadata_of("vq", facts, source.metadata)
    began = time.monotonic()
    with Writer(target, specs, json.dumps(facts), room(metadata, report, layers)) as writer:
        run = _Run(
            source,
            writer,
            recipe,
            layouts,
            torch.device(device),
            progress or (lambda *_: None),
            watch or (lambda _: None),
            cancelled or (lambda: None),
        )
        run.all(layers, statistics or (lambda name: None), teacher)
        report.rows = [LayerRow(**writer.finished[layer.name]) for layer in layers]
        report.bytes_after, report.seconds = writer.size, time.monotonic() - began
        writer.finish(choices(metadata, report))
    return report


class _Run(Run):
    """One run's work."""

    def __init__(
        self,
        source,
        writer: Writer,
        recipe: Recipe,
        layouts: Layouts,
        device: torch.device,
        progress: Callable,
        watch: Callable,
        cancelled: Callable,
    ):
        super().__init__(source, writer)
        self.recipe, self.layouts, self.device = recipe, layouts, device
        self.progress, self.watch, self.cancelled = progress, watch, cancelled

    def all(self, layers: list[LayerPlan], statistics: Callable, teacher: Teacher | None) -> None:
        """Kept tensors first, then layer by layer or block by block."""
        total = sum(layer.K * layer.N for layer in layers)
        done = self.keep_rest(layers, self.progress, self.cancelled, total)
        work = {layer.name: layer for layer in layers if layer.action != "keep"}
        if self.recipe.calibrated and any(name not in self.writer.finished for name in work):
            self._taught(work, teacher, done, total)
        for name, layer in work.items():
            if not self.recipe.calibrated:
                self.cancelled()
                self.progress(done, total, name)
                self.step(name, lambda layer=layer: self._alone(layer, statistics(layer.name)))
                done += layer.K * layer.N
        self.progress(total, total, "")

    def _taught(self, work: dict[str, LayerPlan], teacher: Teacher, done: int, total: int) -> None:
        """Block by block, in the order of the model; finished blocks are read back for the
        student.
        """
        with torch.inference_mode(False):
            room = self.checked(lambda: Classroom(teacher, work))
            for number, (block, names) in enumerate(room.blocks.items()):
                self.cancelled()
                self.progress(done, total, block)
                if all(name in self.writer.finished for name in names):
                    for name in names:
                        stored = {key: self.writer.read(key) for key in self.writer.names(name)}
                        room.install(
                            name,
                            Hard(
                                fitting.Fitted.unpack(
                                    VQWeight.from_tensors(stored, name).to(self.device)
                                )
                            ),
                        )
                else:
                    self._block(room, number, block, [work[name] for name in names])
                done += sum(work[name].K * work[name].N for name in names)

    def _block(self, room: Classroom, number: int, block: str, layers: list[LayerPlan]) -> None:
        began = time.monotonic()
        inputs, stats = room.inputs(block, seed=self.recipe.seed)
        students = {
            layer.name: self.checked(
                lambda layer=layer: self._student(layer, stats.get(layer.name))
            )
            for layer in layers
        }
        error = ""
        if inputs:
            lesson = room.lesson(block, inputs)
            for name, student in students.items():
                room.install(name, student)

            def watch(step: int, steps: int, db: float) -> None:
                self.cancelled()
                self.watch(BlockError(number, len(room.blocks), block, step, steps, db))

            module = room.student.get_submodule(block)
            with allowing_writes([module]):  # ComfyUI's blocks add to their inputs in place
                before, after = self.checked(
                    lambda: calibrate.learn(
                        module, students, lesson, self.recipe, self._seed(block), watch
                    )
                )
            error = f"; block {before:.1f} → {after:.1f} dB"
        seconds = (time.monotonic() - began) / len(layers)
        for layer in layers:
            self.step(
                layer.name,
                lambda layer=layer: self._finished(
                    layer, students[layer.name].fitted(), stats.get(layer.name), error, seconds
                ),
            )
            # what goes on in the student is what was stored, so that a resumed run sees the same
            room.install(
                layer.name,
                Hard(
                    fitting.Fitted.unpack(self._packed(layer, students[layer.name].fitted()))
                ).requires_grad_(False),
            )

    def _student(self, layer: LayerPlan, stats: InputStats | None) -> Hard:
        """A layer at the start of calibration."""
        how = self.recipe.how(self.layouts[layer.name])
        weight, bias = self._read(layer)
        generator = torch.Generator().manual_seed(self._seed(layer.name))
        fitted = fitting.fit(weight, bias, stats if how.turns else None, how, generator)
        if self.recipe.preset != "vq4dit":
            return Hard(fitted)
        return Soft(fitted, hadamard64(weight) if how.rotation else weight, self.recipe.candidates)

    def _alone(
        self, layer: LayerPlan, stats: InputStats | None
    ) -> tuple[dict[str, Tensor], LayerRow]:
        weight, bias = self._read(layer)
        generator = torch.Generator().manual_seed(self._seed(layer.name))
        fitted = fitting.fit(
            weight, bias, stats, self.recipe.how(self.layouts[layer.name]), generator
        )
        return self._finished(layer, fitted, stats, "", 0.0)

    def _finished(
        self,
        layer: LayerPlan,
        fitted: fitting.Fitted,
        stats: InputStats | None,
        error: str,
        seconds: float,
    ) -> tuple[dict[str, Tensor], LayerRow]:
        packed = self._packed(layer, fitted)
        weight, bias = self._read(layer)
        rows = fitting.sample_rows(
            stats, layer.K, torch.Generator().manual_seed(self._seed(layer.name))
        ).to(self.device)
        db = fitting.sqnr(weight, bias, packed, rows)
        tensors = {key: tensor.cpu() for key, tensor in packed.tensors(layer.name).items()}
        tensors[f"{layer.name}.comfy_quant"] = padded(tensors[f"{layer.name}.comfy_quant"])
        codewords, vector = packed.codebook.shape
        why = (
            f"{layer.why}; {codewords} codewords of {vector}, {packed.bits_per_weight:.2f}"
            f" bits{error}"
        )
        return tensors, LayerRow(
            layer.name, layer.action, why, round(db, 2), self.source.nbytes(layer.name), 0, seconds
        )

    def _packed(self, layer: LayerPlan, fitted: fitting.Fitted) -> VQWeight:
        return fitted.pack(
            _bias_dtype(f"{layer.name}.bias", self.source.kept_dtype)
            if layer.bias
            else torch.bfloat16
        )

    def _read(self, layer: LayerPlan) -> tuple[Tensor, Tensor | None]:
        weight, bias = self.source.weight(layer.name).to(self.device), self.source.bias(layer.name)
        return weight, None if bias is None else bias.to(self.device)

    def _seed(self, name: str) -> int:
        return zlib.crc32(f"{self.recipe.seed} {name}".encode())


def _bias_dtype(name: str, kept_dtype: Callable[[str], torch.dtype]) -> torch.dtype:
    dtype = kept_dtype(name)
    return dtype if dtype in (torch.float16, torch.bfloat16, torch.float32) else torch.bfloat16


def layer_specs(
    layer: LayerPlan,
    layout: tuple[int, int],
    recipe: Recipe,
    bias_dtype: torch.dtype = torch.bfloat16,
) -> list[TensorSpec]:
    """The tensors of one layer of codewords."""
    (codewords, vector), name = layout, layer.name
    width = layer.K // vector * (codewords.bit_length() - 1) // 8
    specs = [
        TensorSpec(f"{name}.weight", torch.uint8, (layer.N, width)),
        TensorSpec(f"{name}.weight_codebook", torch.float16, (codewords, vector)),
    ]
    if recipe.scaled:
        specs.append(TensorSpec(f"{name}.weight_scale", torch.float16, (layer.N,)))
    if layer.bias:
        specs.append(TensorSpec(f"{name}.bias", bias_dtype, (layer.N,)))
    return [*specs, TensorSpec(f"{name}.comfy_quant", torch.uint8, (JSON_BYTES,))]


def layout(
    shapes: Mapping[str, tuple[int, ...]],
    layers: Iterable[LayerPlan],
    layouts: Layouts,
    recipe: Recipe,
    kept_dtype: Callable[[str], torch.dtype] = lambda name: torch.bfloat16,
) -> list[TensorSpec]:
    """Every tensor of the file, from shapes alone. layouts: layer → (codewords, weights each)."""
    quantized = [layer for layer in layers if layer.action != "keep"]
    specs = [
        spec
        for layer in quantized
        for spec in layer_specs(
            layer,
            layouts[layer.name],
            recipe,
            _bias_dtype(f"{layer.name}.bias", kept_dtype) if layer.bias else torch.bfloat16,
        )
    ]
    owned = {f"{layer.name}.{part}" for layer in quantized for part in ("weight", "bias")}
    return specs + [
        TensorSpec(key, kept_dtype(key), tuple(shape))
        for key, shape in shapes.items()
        if key not in owned
    ]


def _layouts(
    shapes: Mapping[str, tuple[int, ...]],
    layers: Iterable[LayerPlan],
    recipe: Recipe,
    kept_dtype: Callable,
    weight: Callable[[str], Tensor],
) -> dict[str, tuple[int, int]]:
    """Codewords and sub-vector length of each layer: the recipe's, or what a budget allows."""
    work = [layer for layer in layers if layer.action != "keep"]
    if recipe.budget_gb is None:
        return {layer.name: recipe.layout((layer.N, layer.K)) for layer in work}

    def size(layer: LayerPlan, bits: int) -> int:
        return sum(
            spec.nbytes
            for spec in layer_specs(layer, recipe.layout((layer.N, layer.K), bits), recipe)
        )

    quantized = {f"{layer.name}.{part}" for layer in work for part in ("weight", "bias")}
    rest = sum(
        math.prod(shape) * kept_dtype(key).itemsize
        for key, shape in shapes.items()
        if key not in quantized
    )
    # a generous guess at the header, its checksums and the report
    header = 400 * (len(shapes) + 4 * len(work))
    bits = bit_allocation.choose(
        work, recipe, weight, size, int(recipe.budget_gb * 1e9) - rest - header
    )
    return {layer.name: recipe.layout((layer.N, layer.K), bits[layer.name]) for layer in work}


def predict(
    shapes: Mapping[str, tuple[int, ...]],
    recipe: Recipe,
    name: str,
    bytes_before: int | None = None,
    kept_dtype: Callable[[str], torch.dtype] = lambda name: torch.bfloat16,
) -> Report:
    """The report that a run would give, without errors and seconds: sizes to the byte.
    bytes_before: of the source; by default as bf16.

    Raises ValueError for a recipe with a budget, for which the weights must be seen.
    """
    if recipe.budget_gb is not None:
        raise ValueError(
            "which layer gets how many bits under a budget depends on the weights; leave budget_gb"
            " out of a plan"
        )
    layers = plan(shapes, recipe, name)
    specs = layout(
        shapes, layers, _layouts(shapes, layers, recipe, kept_dtype, None), recipe, kept_dtype
    )
    sizes: dict[str, int] = {}
    for spec in specs:
        owner = spec.name.rpartition(".")[0]
        sizes[owner] = sizes.get(owner, 0) + spec.nbytes
    bytes_before = bytes_before or 2 * sum(math.prod(shape) for shape in shapes.values())
    report = Report(
        recognise(shapes, name).name,
        bytes_before=bytes_before,
        notes=unmatched(recipe.keep, layers),
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
    metadata = metadata_of("vq", predicted_facts(name, recipe))
    report.bytes_after = Writer("plan.safetensors", specs, "", room(metadata, report, layers)).size
    return report
