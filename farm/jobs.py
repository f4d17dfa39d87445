"""What a farm is to make: models × recipes, each a job.

A job is a source, a target and options of `quantize`, all of them words that a command line takes.
"""

from __future__ import annotations

import functools
import glob
import os
import re
import shlex
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ..quant.cli import by_name
from ..quant.files import source_files
from ..quant.files.errors import FileRefused
from ..quant.files.safetensors import read_header

DEFAULT_RECIPES: dict[str, tuple[str, ...]] = {"svdq": ("--preset=fast",)}
DEFAULT_TARGET = "quantized/{model}-{recipe}.safetensors"
AMOUNTS = ("cpus", "gpus", "memory", "retries")
"""What the user may say that a job takes of a machine: cores, GPUs, GB; and how often it may be
begun again.
"""
WORKER = ("python", "pack", *AMOUNTS)
_ENDINGS = (".safetensors", ".gguf", ".sft")
_PIPELINE = "model_index.json"  # in a folder that diffusers saved
_OURS = ("driven", "help", "part", "parts")  # options of quantize that are the farm's business


@dataclass(frozen=True)
class Job:
    """A checkpoint to make. name: for people, unique; options: of `quantize`, as they are typed;
    worker: what the user said of `WORKER`; parts: on how many workers it is made, for which it is
    the job that joins them; number: of a part, from 1, else 0.
    """

    name: str
    source: Path
    target: Path
    recipe: str
    options: tuple[str, ...] = ()
    worker: Mapping[str, Any] = field(default_factory=dict)
    parts: int = 1
    number: int = 0

    def pieces(self) -> list[Job]:
        """The parts that it is joined of."""
        if self.parts == 1 or self.number:
            return []
        return [
            replace(self, name=f"{self.name}, part {number} of {self.parts}", number=number)
            for number in range(1, self.parts + 1)
        ]

    @property
    def words(self) -> list[str]:
        """What is typed behind `quantize`."""
        share = []
        if self.number:
            share = [f"--part={self.number}/{self.parts}"]
        elif self.parts > 1:
            share = [f"--parts={self.parts}"]
        return [str(self.source), str(self.target), *self.options, *share]


@dataclass(frozen=True)
class Order:
    """Models × recipes. folder: what names are told in; recipes: options as they are typed, by
    name; target: a pattern of paths in the folder.
    """

    folder: Path
    recipes: Mapping[str, tuple[str, ...]] = field(default_factory=lambda: DEFAULT_RECIPES)
    target: str = DEFAULT_TARGET
    worker: Mapping[str, Any] = field(default_factory=dict)

    def jobs_of(self, source: Path) -> list[Job]:
        """A job for each recipe. Raises ValueError for a pattern that cannot be read."""
        return [self.job(source, self.target_of(source, name), name) for name in self.recipes]

    def job(self, source: Path, target: Path, recipe: str) -> Job:
        """One of them."""
        inside = target.is_relative_to(self.folder)
        name = target.relative_to(self.folder) if inside else target
        return Job(name.as_posix(), source, target, recipe, self.recipes[recipe], self.worker)

    def target_of(self, source: Path, recipe: str) -> Path:
        """Where the pattern puts a model's file."""
        stem = source.stem if source.suffix.lower() in _ENDINGS else source.name
        found = source_files.SHARD.fullmatch(source.name)
        names = {"model": found[1] if found else stem, "recipe": recipe}
        strange = set(re.findall(r"\{(.*?)\}", self.target)) - names.keys()
        if strange:
            raise ValueError(
                f"target {self.target!r} may hold {{model}} and {{recipe}}, and no"
                f" {{{strange.pop()}}}"
            )
        return self.folder / re.sub(r"\{(\w+)\}", lambda found: names[found[1]], self.target)


def models_in(folder: Path, pattern: str = "**/*") -> list[Path]:
    """The models in a folder that could be quantized: files, of several the first, and folders that
    diffusers saved. What Nibble made is none.
    """
    typed = os.path.join(glob.escape(str(folder)), pattern)  # which may be a whole path
    found = sorted(map(Path, glob.glob(typed, recursive=True)))
    pipelines = [path for path in found if (path / _PIPELINE).is_file()]
    files = [
        path
        for path in found
        if path.suffix.lower() in _ENDINGS
        and path.is_file()
        and not source_files.is_later_shard(path.name)
        and not any(pipeline in path.parents for pipeline in pipelines)
        and not _is_ours(path, *stamp(path))
    ]
    return pipelines + files


def each_once(jobs: Iterable[Job]) -> list[Job]:
    """The same jobs. Raises ValueError where two write one target."""
    by_target: dict[str, Job] = {}
    for job in jobs:
        other = by_target.setdefault(os.path.realpath(job.target), job)
        if other != job:
            raise ValueError(
                f"{job.name} would be made of {other.source.name} ({other.recipe}) and of"
                f" {job.source.name} ({job.recipe}); give them targets of their own"
            )
    return list(by_target.values())


def recipe_typed(text: str) -> tuple[str, tuple[str, ...]]:
    """'NAME=OPTIONS' → both, options as `quantize` has them: 'vq3=--method vq --bits 3'. Raises
    ValueError.
    """
    name, _, words = text.partition("=")
    if not name or name.startswith("-"):
        raise ValueError(f"--recipe {text!r} has no name; give 'NAME=OPTIONS'")
    return name, recipe(shlex.split(words), Path(), f"--recipe {name}")


def recipe(options: Mapping[str, Any] | list[str], folder: Path, where: str) -> tuple[str, ...]:
    """Options of `quantize` by their names, or typed, as every worker can take them: paths in the
    folder are whole. Raises ValueError, which begins with `where`.
    """
    try:
        words = by_name.as_typed(options) if isinstance(options, Mapping) else list(options)
        values = by_name.parsed(words)
        plain = by_name.parsed([])
        ours = [name for name in _OURS if getattr(values, name, None) != getattr(plain, name, None)]
        if ours:
            raise ValueError(f"{ours[0]} is the farm's own business; leave it out")
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
    if values.prompts is not None:
        words.append(f"--prompts={(folder / values.prompts).resolve()}")
    return tuple(words)


def stamp(path: Path) -> list[int]:
    """What tells that nobody touched a file, or a folder's files: bytes and time of the last
    change, in ns. [] where there is none.
    """
    try:
        if not path.is_dir():
            return [path.stat().st_size, path.stat().st_mtime_ns]
        facts = [file.stat() for file in path.rglob("*") if file.is_file()]
        return [sum(fact.st_size for fact in facts), max(fact.st_mtime_ns for fact in facts)]
    except (OSError, ValueError):
        return []


@functools.lru_cache(maxsize=1 << 16)  # a folder that is watched is looked through again and again
def _is_ours(path: Path, *stamp: int) -> bool:
    try:
        return path.suffix != ".gguf" and read_header(path).metadata.get("format") == "nibble"
    except FileRefused:
        return False
