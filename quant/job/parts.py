"""One checkpoint made by several workers: ranges of its layers, each in a file of its own, and
joined into the bytes of one quiet run.

    part = planned(job, 4)[1]
    part.write(measurement)          the second of four ranges, beside the target; resumable
    join(job, 4, measurement)        the target, of what the parts hold (joining.py)

Layers of a recipe without `ties` know nothing of one another: each draws its random numbers from
its own name, so where and in what company it is made leaves no trace. A part reads its own layers
of the source and the header; what stays in 16 bit belongs to the join. That all parts are of one
source is told by samples of what each of them reads; the join samples them all.
"""

import json
import logging
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from ..files import atomic, part_files
from ..files.architectures import LayerPlan, by_input
from ..files.atomic import Held
from ..files.checkpoint import FORMAT_VERSION
from ..files.errors import FileRefused
from ..files.part_files import PartFile
from ..files.report import LayerRow, Report
from ..files.safetensors import TensorSpec
from ..files.writer import Writer
from .checkpoint_run import NOT_MEASURED, UNWATCHED, QuantizeJob
from .measurement import Measurement
from .monitor import Monitor
from .run_metadata import reserved_bytes

log = logging.getLogger("nibble")


def ranges(layers: Iterable[LayerPlan], count: int) -> list[list[LayerPlan]]:
    """The layers that are quantized, in `count` runs of about equal numbers of weights (N K):
    what a layer takes to read is its weights, and to make about as much for each of them. Layers
    that read one input stay together. Raises ValueError for more runs than there are such groups.
    """
    layers = [layer for layer in layers if layer.action != "keep"]
    place = {layer.name: index for index, layer in enumerate(layers)}
    groups = by_input(layer for layer in layers if layer.action != "rows8")
    groups += [[layer] for layer in layers if layer.action == "rows8"]
    groups.sort(key=lambda group: place[group[0].name])
    if not 1 <= count <= len(groups):
        raise ValueError(
            f"{count} parts cannot be made of {len(groups)} groups of layers; give 1 to"
            f" {len(groups)}"
        )
    sizes = [sum(layer.K * layer.N for layer in group) for group in groups]
    middles, before = [], 0
    for size in sizes:
        middles.append(2 * before + size)  # twice, so that it is whole
        before += size
    cuts = [0]
    for number in range(1, count):
        cut = sum(middle * count < 2 * before * number for middle in middles)
        cuts.append(min(max(cut, cuts[-1] + 1), len(groups) - (count - number)))
    return [
        sorted(sum(groups[start:stop], []), key=lambda layer: place[layer.name])
        for start, stop in zip(cuts, [*cuts[1:], len(groups)], strict=True)
    ]


@dataclass(frozen=True)
class Part:
    """A range of a job's layers. job: of them alone, its target their file; specs: every tensor of
    it; names: layer → its tensors.
    """

    job: QuantizeJob
    name: part_files.PartName
    specs: Sequence[TensorSpec]
    names: Mapping[str, list[str]]

    @property
    def path(self) -> Path:
        """The part's file."""
        return self.job.target

    def write(
        self,
        measurement: Measurement = NOT_MEASURED,
        monitor: Monitor = UNWATCHED,
        device: str | torch.device = "cpu",
        overwrite: bool = False,
    ) -> Report:
        """Makes the part's file; returns at once where it is finished. overwrite: replaces one of
        another source or other options. Raises FileRefused and ValueError as `QuantizeJob.write`.
        """
        identity = self.identity(measurement)
        began = time.monotonic()
        with atomic.exclusive(self.job.held or self.path) as held:
            found = self.finished(identity, overwrite)
            if found is not None:
                return self.report(list(found.rows.values()), found.size)
            self.job.check_measurement(measurement)
            with self.writer(held, identity) as writer:
                made = self.job.quantizer(writer, measurement, monitor, torch.device(device))
                made.quantize(self.job.layers)
                monitor.progress(made.weights, made.weights, "")
                rows = [LayerRow(**writer.finished[layer.name]) for layer in self.job.layers]
                report = self.report(rows, writer.size)
                report.seconds = writer.seconds_before + time.monotonic() - began
                writer.finish([identity | {"report": report.to_json(seconds=False)}])
        return report

    def identity(self, measurement: Measurement) -> dict[str, str]:
        """The metadata of the part's file but the report: what makes two parts the same."""
        source = self.job.source
        stamp = source.stamp(layer.name for layer in self.job.layers)
        return {
            "format": part_files.FORMAT,
            "nibble_version": str(FORMAT_VERSION),
            "method": self.job.method,
            "part": f"{self.name.number}/{self.name.of}",
            "source": json.dumps({"name": source.name, "bytes": source.bytes, "stamp": stamp}),
            "recipe": self.job.recipe.to_json(),
            "calibration": json.dumps(measurement.provenance),
        }

    def finished(self, identity: Mapping[str, str], overwrite: bool = False) -> PartFile | None:
        """The part's file; None where it must be made. Raises FileRefused for one of another
        source or other options, unless it may be overwritten, and for another program's.
        """
        if not self.path.exists():
            return None
        try:
            found = PartFile(self.path)
        except FileRefused as error:
            log.warning("%s", error)
            return None
        if not found.is_ours:
            raise FileRefused(
                f"{self.path.name} exists and is no part file of Nibble's; move it, or choose"
                " another name for the target."
            )
        other = found.difference(identity, self.specs)
        if other and not overwrite:
            raise FileRefused(
                f"{self.path.name} was made {other}; give every part and the joining run the same"
                " source and options, or remove that file."
            )
        return None if other else found

    def writer(self, held: Held, identity: Mapping[str, str]) -> Writer:
        """What makes the part's file, or goes on with it."""
        room = reserved_bytes(identity, self.report([]), self.job.layers)
        return Writer(held, self.specs, json.dumps(identity), room)

    def under(self, held: Held) -> "Part":
        """The same where the lock of its file is held already."""
        return replace(self, job=replace(self.job, held=held))

    def report(self, rows: list[LayerRow], size: int = 0) -> Report:
        """Of a part with these rows; size: bytes of its file."""
        before = sum(row.bytes_before for row in rows)
        return Report(self.job.architecture, rows, before, size)


def planned(job: QuantizeJob, count: int) -> list[Part]:
    """The job's parts. Raises ValueError for a recipe that ties layers to one another, and for
    more parts than there are groups of layers.
    """
    if job.recipe.ties:
        raise ValueError(f"layers cannot be made apart from one another: {job.recipe.ties}")
    runs, specs = ranges(job.layers, count), job.layout()
    parts = []
    for number, layers in enumerate(runs, 1):
        names: dict[str, list[str]] = {layer.name: [] for layer in layers}
        own = [spec for spec in specs if spec.name.rpartition(".")[0] in names]
        for spec in own:
            names[spec.name.rpartition(".")[0]].append(spec.name)
        name = part_files.PartName(job.target, number, count)
        of_them = replace(job, target=name.path, layers=layers, existing=None, held=None)
        parts.append(Part(of_them, name, own, names))
    return parts
