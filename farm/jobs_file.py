"""A jobs file: YAML or JSON, as docs/farm.md shows it.

Paths in it are in its `folder`, which is the file's own where none is given. All that can be known
without opening the models is checked before any work starts.
"""

from __future__ import annotations

import json
import reprlib
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..kernels.optional import optional
from ..quant.files.errors import FileRefused
from .jobs import AMOUNTS, DEFAULT_RECIPES, DEFAULT_TARGET, WORKER, Job, Order, models_in, recipe

MOST = {"cpus": 4096, "gpus": 64, "memory": 100_000, "retries": 1000}
"""Of `AMOUNTS`; memory in GB."""
_TOP = ("folder", "worker", "recipes", "models", "target", "jobs")
_JOB = ("source", "target", "recipe", "options", "parts", *WORKER)


def read(path: Path) -> tuple[Order, list[Job]]:
    """The jobs that a file asks for. Raises FileRefused, naming the file, the job and what to
    change.
    """
    try:
        return _read(path, _content(path))
    except FileRefused:
        raise
    except ValueError as error:
        raise FileRefused(f"{path.name}: {error}.") from error
    except (RecursionError, MemoryError) as error:
        raise FileRefused(f"{path.name}: it is nested too deep for a list of jobs.") from error


def _content(path: Path) -> dict:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeError) as error:
        raise FileRefused(f"{path} cannot be read ({error}); name a jobs file.") from error
    if path.suffix.lower() == ".json":
        return _mapping(json.loads(text), "the file", _TOP)
    yaml, why = optional("yaml")
    if yaml is None:
        raise FileRefused(
            f"{path.name} is YAML, and {why}; pip install pyyaml, or write the same as JSON."
        )
    try:
        return _mapping(yaml.safe_load(text), "the file", _TOP)
    except yaml.YAMLError as error:
        raise ValueError(" ".join(str(error).split())) from error


def _read(path: Path, content: dict) -> tuple[Order, list[Job]]:
    folder = (path.parent / _text(content, "folder", ".", "the file")).resolve()
    if not folder.is_dir():
        raise ValueError(f"folder {folder} does not exist")
    order = Order(
        folder,
        _recipes(content, folder),
        _text(content, "target", DEFAULT_TARGET, "the file"),
        _worker(content.get("worker", {}), "worker"),
    )
    jobs: list[Job] = []
    for pattern in _list(content, "models"):
        models = models_in(folder, str(pattern))
        if not models:
            raise ValueError(f"models: {_shown(pattern)} matches no model in {folder}")
        jobs += [job for model in models for job in order.jobs_of(model)]
    for number, given in enumerate(_list(content, "jobs"), 1):
        jobs.append(_job(order, given, f"job {number}"))
    if not jobs:
        raise ValueError("it has neither models nor jobs")
    return order, jobs


def _recipes(content: dict, folder: Path) -> dict[str, tuple[str, ...]]:
    given = _mapping(content.get("recipes") or {}, "recipes")
    return {
        str(name): recipe(_mapping(options or {}, f"recipe {name}"), folder, f"recipe {name}")
        for name, options in given.items()
    } or DEFAULT_RECIPES


def _job(order: Order, given: Any, where: str) -> Job:
    given = _mapping(given, where, _JOB)
    source = order.folder / _text(given, "source", "", where)
    if "source" not in given or not source.exists():
        raise ValueError(f"{where}: its source {source} does not exist")
    name = str(given.get("recipe", next(iter(order.recipes))))
    if name not in order.recipes:
        raise ValueError(f"{where}: there is no recipe {name!r}, only {', '.join(order.recipes)}")
    target = order.target_of(source, name)
    if "target" in given:
        target = order.folder / _text(given, "target", "", where)
    job = order.job(source, target, name)
    own = recipe(_mapping(given.get("options") or {}, f"{where}: options"), order.folder, where)
    parts = given.get("parts", 1)
    if not isinstance(parts, int) or isinstance(parts, bool) or parts < 1:
        raise ValueError(
            f"{where}: parts is {_shown(parts)}; give the number of workers that make it"
        )
    worker = _worker({key: given[key] for key in WORKER if key in given}, where)
    return replace(job, options=job.options + own, worker={**order.worker, **worker}, parts=parts)


def _worker(given: Any, where: str) -> dict[str, Any]:
    given = _mapping(given, where, WORKER)
    for name in AMOUNTS:
        value = given.get(name, 0)
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise ValueError(f"{where}: {name} is {_shown(value)}; give a number")
        if not 0 <= value <= MOST[name]:
            raise ValueError(f"{where}: {name} is {value}; give 0 to {MOST[name]}")
    if given.get("gpus", 0) > 1 and given["gpus"] % 1:
        raise ValueError(f"{where}: gpus is {given['gpus']}; above 1 give a whole number")
    for name in given.keys() - set(AMOUNTS):
        _text(given, name, "", where)
    return dict(given)


def _text(given: Mapping, name: str, default: str, where: str) -> str:
    value = given.get(name, default)
    if not isinstance(value, str):
        raise ValueError(f"{where}: {name} is {_shown(value)}; give text")
    if "\0" in value:
        raise ValueError(f"{where}: {name} holds a character that no file has in its name")
    return value


def _shown(value: object) -> str:
    """A value for a sentence; a small file of YAML can stand for gigabytes."""
    return reprlib.repr(value)


def _list(content: Mapping, name: str) -> list:
    value = content.get(name) or []
    return value if isinstance(value, list) else [value]


def _mapping(given: Any, where: str, names: Iterable[str] | None = None) -> dict:
    if not isinstance(given, dict):
        what = "empty" if given is None else f"{_shown(given)}"
        raise ValueError(f"{where} is {what}, and should have names and values")
    for name in given:
        if names is not None and name not in names:
            raise ValueError(f"{where} has no {_shown(name)}; it may have {', '.join(names)}")
    return given
