"""nibble farm: what can be typed, and the run with its table and report."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterable
from pathlib import Path


def add_command(commands) -> None:
    """Adds farm to a parser's subcommands."""
    parser = commands.add_parser(
        "farm", help="quantize many models, over the machines of a Ray cluster or one by one"
    )
    parser.add_argument(
        "jobs", type=Path, help="a jobs file (YAML or JSON: docs/farm.md), or a folder of models"
    )
    parser.add_argument(
        "--recipe",
        action="append",
        metavar="NAME=OPTIONS",
        help=(
            "for a folder: options of quantize, such as 'vq3=--method vq --bits 3'; may be repeated"
            " (default: svdq=--preset fast)"
        ),
    )
    parser.add_argument(
        "--target",
        metavar="PATTERN",
        help="for a folder: where files go (default: quantized/{model}-{recipe}.safetensors)",
    )
    parser.add_argument(
        "--watch", action="store_true", help="for a folder: go on, and take models that come later"
    )
    parser.add_argument(
        "--address", help="of a running Ray cluster: HOST:6379, or auto on one of its machines"
    )
    parser.add_argument(
        "--in-order", action="store_true", help="one after another, here, without Ray"
    )
    parser.add_argument(
        "--patience",
        type=float,
        default=10.0,
        metavar="MINUTES",
        help="that a lost cluster has to come back (default: %(default)s)",
    )
    parser.add_argument(
        "--report",
        type=Path,
        metavar="BASE",
        help="write BASE.json and BASE.html (default: JOBS-farm beside a file, farm in a folder)",
    )
    parser.add_argument(
        "--lines",
        action="store_true",
        help=(
            "for a program that runs this one: progress as lines of JSON on stdout, and an end when"
            " standard input ends"
        ),
    )
    parser.set_defaults(run=farm)


def farm(options: argparse.Namespace) -> None:
    """Makes all jobs; prints what goes on; writes the report. Raises ValueError where jobs failed,
    FileRefused for a jobs file that cannot be used.
    """
    from ..quant.cli import driven
    from . import report
    from .ledger import FAILED, Ledger
    from .run import Farm
    from .table import Lines, Table

    if options.lines:
        driven.end_with_input()
    jobs, more = _jobs(options)
    base = options.report or _beside(options.jobs.resolve())
    ledger = Ledger(jobs, report.earlier(base))
    show = (Lines if options.lines else Table)(ledger)
    kept = _Kept(base, ledger)
    kept.write()  # now, and not after hours, where it cannot be
    try:
        if ledger.open or options.watch:
            runner = _runner(options, ledger)
            try:
                Farm(ledger, runner, [show, kept.now_and_then], more).run()
            finally:
                kept.write()
        show()
    except BrokenPipeError as error:
        raise ValueError(
            "nobody reads any more what the farm says, so it has stopped; the same command goes on"
        ) from error
    if not options.lines:
        print(f"{report.headline(ledger)}; {kept.paths[1]} tells all of it")
    if ledger.count(*FAILED):
        raise ValueError(f"{ledger.count(*FAILED)} could not be made; see {kept.paths[1]}")


def _beside(jobs: Path) -> Path:
    """Where the report goes: beside a jobs file, in a folder."""
    return jobs / "farm" if jobs.is_dir() else jobs.with_name(f"{jobs.stem}-farm")


class _Kept:
    """The report on disk, written while the farm works: it is what the next run knows of this."""

    APART = 15.0  # seconds

    def __init__(self, base: Path, ledger) -> None:
        self.base, self.ledger = base, ledger
        self.began = self.at = time.monotonic()
        self.ended = -1

    def now_and_then(self) -> None:
        from ..quant.files.errors import FileRefused

        ended = len(self.ledger.entries) - len(self.ledger.open)
        if ended != self.ended and time.monotonic() - self.at > self.APART:
            self.ended = ended
            try:
                self.write()
            except FileRefused as error:  # the work goes on
                self.ledger.note(f"the report could not be written: {error}")
                self.at = time.monotonic()

    def write(self) -> None:
        from . import report

        self.paths = report.write(self.base, self.ledger, time.monotonic() - self.began)
        self.at = time.monotonic()


def _jobs(options: argparse.Namespace) -> tuple[list, Callable[[], Iterable | None]]:
    """The jobs that there are, and what gives those that come later."""
    from . import jobs, jobs_file, watch

    if not options.jobs.is_dir():
        for name in ("recipe", "target", "watch"):
            if getattr(options, name):
                raise ValueError(f"--{name} is for a folder; a jobs file says it itself")
        return jobs.each_once(jobs_file.read(options.jobs)[1]), lambda: None
    folder = options.jobs.resolve()
    recipes = dict(map(jobs.recipe_typed, options.recipe or ())) or jobs.DEFAULT_RECIPES
    order = jobs.Order(folder, recipes, options.target or jobs.DEFAULT_TARGET)
    if options.watch:
        return [], watch.Watch(order)
    found = [job for model in jobs.models_in(folder) for job in order.jobs_of(model)]
    if not found:
        raise ValueError(f"{folder} holds no model that could be quantized; name another folder")
    return jobs.each_once(found), lambda: None


def _runner(options: argparse.Namespace, ledger):
    from . import in_order, on_ray

    if options.in_order and options.address:
        raise ValueError("--in-order works here, and --address on a cluster; give one of them")
    if options.address and not on_ray.is_installed():
        raise ValueError("--address needs Ray, which is not installed; pip install 'nibble[farm]'")
    if options.in_order or not on_ray.is_installed():
        if not options.in_order:
            ledger.note("Ray is not installed, so jobs are done here, one after another")
        return in_order.InOrder()
    return on_ray.OnRay(options.address or "local", 60 * options.patience)
