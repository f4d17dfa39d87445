"""TeaCache polynomials that others have fitted and published, as data: coefficients.json.

An entry names its source (repository, commit, file), the class and the facts of the model that it
was fitted on, and which input F of the model its changes are measured on (nodes/bridge/caching/
models.py). `fitted` is the range of d that the fit has seen, where its authors tell it; `unfitted`
names models that are built alike and were not measured.
"""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass
from pathlib import Path

from .steps import Window
from .teacache import Polynomial

LARGE_LATENT = 7000  # latent pixels above which a video counts as 720p
DATA = Path(__file__).with_name("coefficients.json")


@dataclass(frozen=True)
class Shipped:
    """One published polynomial. thresholds: careful, balanced, fast. feature: which F it was fitted
    on. first, last: steps that its authors always compute at the ends; start, end: shares of the
    run outside of which they compute all. unfitted: what else has this shape, "" for nothing.
    plain: of the two that Wan 2.1 has, the one with one step computed at each end.
    """

    model: str
    feature: str
    polynomial: Polynomial
    thresholds: tuple[float, ...]
    source: str
    date: str
    first: int = 1
    last: int = 1
    start: float = 0.0
    end: float = 1.0
    unfitted: str = ""
    plain: bool = False

    def window(self, asked: Window) -> Window:
        """The steps that may be reused by what was asked for and by the authors. No first or last
        steps at all, where somebody asks for that, are none here either.
        """
        start = max(asked.start, self.start)
        return Window(
            start,
            max(start, min(asked.end, self.end)),
            max(asked.first, self.first) if asked.first else 0,
            max(asked.last, self.last) if asked.last else 0,
        )


@functools.cache
def _entries() -> tuple[dict, ...]:
    return tuple(json.loads(DATA.read_text(encoding="utf-8")))


def _shipped(entry: dict) -> Shipped:
    return Shipped(
        model=entry["model"],
        feature=entry["feature"],
        polynomial=Polynomial(tuple(entry["coefficients"]), *entry.get("fitted", (None, None))),
        thresholds=tuple(entry["thresholds"]),
        source=entry["source"],
        date=entry["date"],
        first=entry.get("first", 1),
        last=entry.get("last", 1),
        start=entry.get("start", 0.0),
        end=entry.get("end", 1.0),
        unfitted=entry.get("unfitted", ""),
        plain=entry.get("plain", False),
    )


def every() -> list[Shipped]:
    """All that are shipped, in the order of the file."""
    return [_shipped(entry) for entry in _entries()]


def lookup(name: str, traits: dict, plain: bool = False) -> Shipped | None:
    """The entry for a model's own class, not one that it is derived from (VACE and S2V derive from
    Wan), whose every condition is among the traits: name → value, lists compared as lists. plain:
    the plain one where there are two.
    """
    found = [
        _shipped(entry)
        for entry in _entries()
        if entry["class"] == name
        and all(
            fact in traits and _listed(traits[fact]) == value
            for fact, value in entry["when"].items()
        )
    ]
    if plain:
        found.sort(key=lambda entry: not entry.plain)
    return found[0] if found else None


def _listed(value: object) -> object:
    return list(value) if isinstance(value, tuple) else value
