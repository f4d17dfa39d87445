"""TeaCache polynomials that others have fitted and published, as data: coefficients.json, with
source and date.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from .teacache import Polynomial

DATA = Path(__file__).with_name("coefficients.json")


@dataclass(frozen=True)
class Shipped:
    """One published polynomial. thresholds: careful, balanced, fast. feature: which F it was fitted
    on. first: steps that its authors always compute at the start.
    """

    model: str
    feature: str
    polynomial: Polynomial
    thresholds: tuple[float, ...]
    source: str
    date: str
    first: int = 1


@functools.cache
def _entries() -> tuple[dict, ...]:
    return tuple(json.loads(DATA.read_text(encoding="utf-8")))


def _shipped(entry: dict) -> Shipped:
    return Shipped(
        model=entry["model"],
        feature=entry["feature"],
        polynomial=Polynomial(tuple(entry["coefficients"])),
        thresholds=tuple(entry["thresholds"]),
        source=entry["source"],
        date=entry["date"],
        first=entry.get("first", 1),
    )


def every() -> list[Shipped]:
    """All that are shipped, in the order of the file."""
    return [_shipped(entry) for entry in _entries()]


def lookup(classes: Iterable[str], traits: dict) -> Shipped | None:
    """The first entry for one of a model's class names whose every condition is among the traits.
    traits: name → value, lists compared as lists.
    """
    names = set(classes)
    for entry in _entries():
        if entry["class"] in names and all(
            name in traits and _plain(traits[name]) == value
            for name, value in entry["when"].items()
        ):
            return _shipped(entry)
    return None


def _plain(value: object) -> object:
    return list(value) if isinstance(value, tuple) else value
