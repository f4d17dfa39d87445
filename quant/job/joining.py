"""Parts of a checkpoint joined into their target: what they hold is copied layer by layer, checked
by its checksums; what is missing is made here; then the part files go.
"""

import contextlib
import logging
from collections.abc import Callable, Iterator, Mapping
from functools import partial

import torch
from torch import Tensor

from ..files import atomic, unfinished
from ..files.atomic import Held
from ..files.errors import FileRefused
from ..files.part_files import PartFile
from ..files.report import Report
from ..files.writer import Writer
from .checkpoint_run import NOT_MEASURED, UNWATCHED, QuantizeJob
from .measurement import Measurement
from .monitor import Monitor
from .parts import Part, planned

log = logging.getLogger("nibble")
# a layer's name and those of its tensors → them and its row of the report; None: not there
Units = Callable[[str, list[str]], tuple[Mapping[str, Tensor], dict] | None]


def join(
    job: QuantizeJob,
    count: int,
    measurement: Measurement = NOT_MEASURED,
    monitor: Monitor = UNWATCHED,
    device: str | torch.device = "cpu",
) -> Report:
    """The target, byte for byte as `QuantizeJob.write` makes it, of its `count` parts: finished
    ones, and as far as unfinished ones got. Holds the parts' locks, and one layer in memory.
    Raises FileRefused for a part that another run is making, and for one of another source or
    other options, before anything is written.
    """
    parts = planned(job, count)
    with contextlib.ExitStack() as opened:
        taken = []
        for part in parts:
            held = opened.enter_context(atomic.exclusive(part.path))
            identity = part.identity(measurement)
            taken.append((part, held, identity, part.finished(identity)))

        def adopt(writer: Writer) -> None:
            layers, weights = 0, 0
            total = sum(layer.K * layer.N for layer in job.layers)
            for part, held, identity, found in taken:
                with _units(part, held, identity, found) as units:
                    for layer in part.job.layers:
                        monitor.layers(layers, len(job.layers))
                        monitor.cancelled()
                        monitor.progress(weights, total, layer.name)
                        if _adopted(writer, layer.name, part.names[layer.name], units):
                            layers, weights = layers + 1, weights + layer.K * layer.N

        report = job.write(measurement, monitor, device, adopt)
        for part in parts:
            unfinished.unlink(part.path)
    return report


def _adopted(writer: Writer, layer: str, names: list[str], units: Units) -> bool:
    """Whether a layer is written now."""
    if layer not in writer.finished:
        unit = units(layer, names)
        if unit is None:
            return False
        writer.write(layer, *unit)
    return True


@contextlib.contextmanager
def _units(
    part: Part, held: Held, identity: Mapping[str, str], found: PartFile | None
) -> Iterator[Units]:
    """A part's layers: of its file, or of what a run that was stopped left of it."""
    if found is not None:
        with found:
            yield partial(_of_file, found)
        return
    begun = part.writer(held, identity)
    if not begun.is_begun():
        yield lambda layer, names: None
        return
    with begun:
        yield partial(_of_unfinished, begun)


def _of_file(
    found: PartFile, layer: str, names: list[str]
) -> tuple[Mapping[str, Tensor], dict] | None:
    if layer not in found.rows:
        return None
    try:
        return found.tensors(names), vars(found.rows[layer])
    except FileRefused as error:
        log.warning("%s", error)
        return None


def _of_unfinished(
    begun: Writer, layer: str, names: list[str]
) -> tuple[Mapping[str, Tensor], dict] | None:
    if layer not in begun.finished:
        return None
    return {name: begun.read(name) for name in names}, begun.finished[layer]
