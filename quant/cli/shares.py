"""What a command makes of a target: the whole, one part of it, or the whole of its parts."""

import argparse
import contextlib
from collections.abc import Iterator
from pathlib import Path

from ..files import atomic
from ..files.atomic import Held
from ..files.part_files import PartName
from ..files.report import Report
from ..files.writer import check_path
from ..job import joining, parts
from ..job.checkpoint_run import QuantizeJob
from ..job.measurement import Measurement
from ..job.monitor import Monitor
from ..job.recipe import FromPreset
from . import measure


class Whole:
    """All of it, in one run."""

    def __init__(self, options: argparse.Namespace):
        self.options = options

    @contextlib.contextmanager
    def held(self) -> Iterator[str | Held]:
        """What the job is prepared with: the target, its lock held where that is for longer than
        it is written.
        """
        yield self.options.target

    def check(self, job: QuantizeJob) -> None:
        """Raises ValueError for a model that cannot be made so."""

    def write(self, job: QuantizeJob, measurement: Measurement, monitor: Monitor) -> Report:
        """Makes it; see `QuantizeJob.write`."""
        return job.write(measurement, monitor, self.options.device)


class Joined(Whole):
    """Of `count` parts; nobody else joins them meanwhile."""

    def __init__(self, options: argparse.Namespace, count: int):
        super().__init__(options)
        self.count = count

    @contextlib.contextmanager
    def held(self) -> Iterator[str | Held]:
        check_path(None, self.options.target)
        with atomic.exclusive(self.options.target) as held:
            yield held

    def check(self, job: QuantizeJob) -> None:
        if measure.runs_model(self.options, job):
            way = "add --memory-cap 0 to all of them, to make it from its weights alone"
            if self.options.prompts is not None:
                way = f"leave --prompts out and {way}"
            raise ValueError(
                f"{job.source.name} would be run on noise or prompts in every part, which reads"
                f" all of it; {way}, or leave --part and --parts out"
            )
        parts.ranges(job.layers, self.count)

    def write(self, job: QuantizeJob, measurement: Measurement, monitor: Monitor) -> Report:
        return joining.join(job, self.count, measurement, monitor, self.options.device)


class OnePart(Joined):
    """The number-th of `count` parts, unless the whole is finished."""

    def __init__(self, options: argparse.Namespace, number: int, count: int):
        super().__init__(options, count)
        self.name = PartName(Path(options.target), number, count)

    @contextlib.contextmanager
    def held(self) -> Iterator[str | Held]:
        check_path(None, self.options.target)
        with atomic.exclusive(self.name.path) as self.lock:
            yield self.options.target

    def write(self, job: QuantizeJob, measurement: Measurement, monitor: Monitor) -> Report:
        report = job.existing_report(measurement.provenance)
        if report is not None:
            return report
        part = parts.planned(job, self.count)[self.name.number - 1].under(self.lock)
        options = self.options
        return part.write(measurement, monitor, options.device, options.overwrite)


def asked(options: argparse.Namespace, recipe: FromPreset) -> Whole:
    """What `--part` and `--parts` ask for. Raises ValueError for what they cannot be, and for a
    recipe whose layers cannot be made apart from one another.
    """
    number, count = _numbers(options)
    if count is None:
        return Whole(options)
    if recipe.ties:
        raise ValueError(
            f"--part and --parts make layers apart from one another, and {recipe.ties}; leave that"
            " out, or leave --part and --parts out"
        )
    return Joined(options, count) if number is None else OnePart(options, number, count)


def written(options: argparse.Namespace) -> Path:
    """The file that a command made: its part, or the target, which may have been there."""
    number, count = _numbers(options)
    target = Path(options.target)
    if number is None or count is None:
        return target
    part = PartName(target, number, count).path
    return part if part.exists() else target


def _numbers(options: argparse.Namespace) -> tuple[int | None, int | None]:
    """(K, N) of --part K/N, (None, N) of --parts N, else twice None."""
    if options.part is None:
        if options.parts is not None and not (type(options.parts) is int and options.parts > 0):
            raise ValueError(f"--parts {options.parts!r} is no number of parts, 1 or more")
        return None, options.parts
    if options.parts is not None:
        raise ValueError(
            "--part makes one part and --parts joins all of them; give one of the two, the second"
            " when the parts are made"
        )
    number, slash, count = str(options.part).partition("/")
    if not (number.isdecimal() and slash and count.isdecimal()):
        raise ValueError(f"--part {options.part} is not K/N, such as 2/4 for the second of four")
    if not 1 <= int(number) <= int(count):
        raise ValueError(f"--part {options.part}: the parts are 1/{count} to {count}/{count}")
    return int(number), int(count)
