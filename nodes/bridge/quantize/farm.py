"""A checkpoint quantized by a farm (`farm/`): on a Ray cluster, or on this machine in a process of
its own. The farm reads and writes ComfyUI's folders, which the cluster's machines share.

    request.run()  →  the recipe, source and target are checked here
                      a jobs file in ComfyUI's temp folder, and the farm's process (`farm_process`)
                      the report of the finished file
"""

from __future__ import annotations

import json
import math
import os
import shlex
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import comfy.model_management
import folder_paths

from ....farm import jobs, on_ray
from ....farm import report as farm_report
from ....farm.ledger import BEFORE
from ....quant.cli import by_name
from ....quant.cli import quantize as command_line
from ....quant.files.errors import FileRefused, reading
from ....quant.files.memory.switches import duration
from ....quant.files.report import Report
from ....quant.files.safetensors import read_header
from ....quant.files.source import Source
from ..host import folders
from ..host.progress import Progress
from ..quantized.loading import FOLDER
from . import farm_process, farm_settings, prompts, sources
from .job import QuantizeRequest, new_name, refuse_encoder
from .stock import StockRequest
from .svdquant import SVDQuantRequest
from .vq4dit import VQRequest

METHODS: dict[str, type[QuantizeRequest]] = {
    "svdquant": SVDQuantRequest,
    "vq": VQRequest,
    "stock": StockRequest,
}
PRESETS = {
    "fast": "Data-free, from the weights and noise.",
    "best": "Runs the model without ComfyUI to calibrate, which works for FLUX.1.",
    "vq4dit": "The paper's codebooks, for method vq.",
}
_WIDGETS = ("method", "preset", "overwrite")  # that have an option of the same name
_RECIPE = "node"
HERE, CLUSTER = "this machine", "cluster"
PLACES = (HERE, CLUSTER)
NO_RAY = (
    "where = cluster needs Ray, which the Python of this ComfyUI has not got; install it there (pip"
    " install ray), or choose 'this machine'."
)


@dataclass(frozen=True)
class Made:
    """A finished file. name: in ComfyUI's lists; by: which worker made it, and in how long."""

    name: str
    report: Report
    by: str


@dataclass(kw_only=True)
class FarmRequest:
    """What the user asked for. options: as they are typed behind `quantize`; where: one of PLACES;
    worker: what a job takes there, as NAME=VALUE, of `farm.jobs.AMOUNTS`; parts: on how many
    workers the file is made.
    """

    model_name: str
    method: str = "svdquant"
    preset: str = "fast"
    options: str = ""
    where: str = HERE
    filename: str = ""
    overwrite: bool = False
    worker: str = ""
    parts: int = 1
    node_id: str | None = None

    def run(self) -> Made:
        """Quantizes. Raises ValueError in plain words, before work starts where it can be known."""
        cluster = None
        if self.where == CLUSTER:
            cluster = farm_settings.read()
            if not on_ray.is_installed():
                raise ValueError(NO_RAY)
        options, worker = self.given(), self.resources()
        ending = self.ending(options)
        source = Source(sources.path_of(self.model_name))
        refuse_encoder(source)
        wanted = new_name(sources.origin(self.model_name), self.filename, ending)
        # held for a moment: what another run is writing is refused now, the rest is the worker's
        with folders.new_file(wanted, FOLDER, self.overwrite, beside=source.path) as new:
            target, name = new.path, new.name
        job = {"source": str(source.path), "target": str(target), "parts": self.parts, **worker}
        if cluster is not None:
            job = cluster.worker | job
        file = _jobs_file(target, options, job)
        address = "" if cluster is None else cluster.address
        if not address:  # the farm needs the memory that models of earlier runs have here
            comfy.model_management.unload_all_models()
        watch = _Watch(Progress("quantizing", self.node_id, unit="layer", resumes=True), address)
        farm_process.run(farm_process.command(file, address), watch.hear, watch.progress.heed)
        folders.refresh(FOLDER)
        (entry,) = farm_report.earlier(farm_process.report_of(file)).values()
        by = f"{', '.join(dict.fromkeys(entry['workers']))}, "
        by += "in an earlier run" if entry["state"] == BEFORE else duration(entry["seconds"])
        return Made(name, _report_of(target, entry), by)

    def given(self) -> dict[str, Any]:
        """Options of `quantize` by their names. Raises ValueError for those that there are not, or
        that do not go together.
        """
        words = _words(self.options, "options")
        for name in _WIDGETS:
            if any(word.partition("=")[0] == f"--{name}" for word in words):
                raise ValueError(
                    f"options: --{name} is a widget of this node, '{name}'; set it there"
                )
        home = Path(folder_paths.get_folder_paths(prompts.FOLDER)[0])
        values = vars(by_name.parsed(jobs.recipe(words, home, "options")))
        file = values["prompts"]
        if file is not None and not file.is_relative_to(home.resolve()):  # a workflow names it
            raise ValueError(f"options: --prompts {file.name} is not in models/{prompts.FOLDER}")
        plain = vars(by_name.parsed([]))
        given = {name: value for name, value in values.items() if value != plain[name]}
        return given | {"method": self.method, "preset": self.preset, "overwrite": self.overwrite}

    def ending(self, options: Mapping[str, Any]) -> str:
        """What the new file's name ends with: as those of the other quantize nodes. Raises
        ValueError for options that are no recipe.
        """
        recipe = command_line.recipe_of(by_name.parsed(by_name.as_typed(options)))
        return METHODS[self.method](model_name=self.model_name, recipe=recipe).ending

    def resources(self) -> dict[str, Any]:
        """What a job takes of a machine, as jobs files have it. Raises ValueError."""
        found: dict[str, Any] = {}
        for word in _words(self.worker, "worker"):
            name, equals, value = word.partition("=")
            if name not in jobs.AMOUNTS or not equals:
                raise ValueError(
                    f"worker: {word!r} cannot be read; give NAME=VALUE with"
                    f" {', '.join(jobs.AMOUNTS)}, such as gpus=1"
                )
            found[name] = _amount(name, value)
        return found


class _Watch:
    """The farm's lines, as the node's progress."""

    def __init__(self, progress: Progress, address: str):
        self.progress = progress
        self.layers: dict[str, list[int]] = {}  # job, or part of it → done, of
        progress(0, 1, f"looking for the cluster at {address}" if address else "starting")

    def hear(self, event: Mapping[str, Any]) -> None:
        """Layers, and which workers make them, or what is waited for."""
        running = event["running"]
        self.layers |= {each["job"]: each["layers"] for each in running}
        done, count = (sum(each[i] for each in self.layers.values()) for i in (0, 1))
        self.progress.count(done, count)
        what = ", ".join(dict.fromkeys(each["worker"] for each in running))
        if not running and not event["made"]:
            what = _waits(event["notes"])
        elif running and not count:
            what += ": reading and measuring"
        done, of = event["weights"]
        self.progress(done, of, what)


def _waits(notes: list[str]) -> str:
    """What a job that no worker has taken waits for."""
    return farm_process.in_node(notes[-1]) if notes else "waiting for a worker"


def _words(text: str, widget: str) -> list[str]:
    """What was typed, word by word. Raises ValueError."""
    try:
        return shlex.split(text)
    except ValueError as error:
        raise ValueError(
            f"{widget}: {text!r} cannot be read ({error}); close the quotes"
        ) from error


def _amount(name: str, value: str) -> float:
    try:
        amount = float(value)
    except ValueError:
        amount = math.nan
    if not 0 <= amount < math.inf:
        raise ValueError(f"worker: {name} is {value!r}; give a number, 0 or more")
    return amount


def _jobs_file(target: Path, options: Mapping[str, Any], job: Mapping[str, Any]) -> Path:
    """Writes what the farm is to do, under a name of the target's own: its last report, which the
    farm looks for, lies beside it.
    """
    folder = Path(folder_paths.get_temp_directory())
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"nibble-farm-{zlib.crc32(os.fsencode(target)):08x}.json"
    content = {"recipes": {_RECIPE: options}, "jobs": [{**job, "recipe": _RECIPE}]}
    file.write_text(json.dumps(content, default=str), encoding="utf-8")
    return file


def _report_of(target: Path, entry: Mapping[str, Any]) -> Report:
    """The finished file's own, with the seconds that a file does not keep. Raises FileRefused where
    the cluster wrote it elsewhere.
    """
    if not target.exists():
        raise FileRefused(
            f"{entry['workers'][-1]} has made {target.name}, but it is not in {target.parent} here;"
            " let the cluster's machines share ComfyUI's models folder, at the same path."
        )
    with reading(target):
        report = Report.from_json(read_header(target).metadata.get("report", ""))
    report.seconds = entry["result"].get("seconds", 0.0)
    return report
