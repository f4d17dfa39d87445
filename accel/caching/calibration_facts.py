"""What the JSON of a calibration must be: read strictly, and checked field by field, before it is
used.

Numbers are finite and in range, lists as long as the run has steps; keys that are not known are
left alone, so that a newer Nibble may write more.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence

import numpy as np

from .flow_time import FlowTime

STEPS = 10_000  # at most, and prompts, and layers' kinds
COEFFICIENTS = 9


class Malformed(ValueError):
    """What is wrong, as the end of a sentence that begins with the file."""


def parsed(content: bytes) -> dict:
    """A JSON object whose keys are there once and whose numbers are finite. Raises Malformed."""
    try:
        facts = json.loads(content, object_pairs_hook=_once, parse_constant=_refuse_constant)
    except RecursionError as error:
        raise Malformed("is nested too deeply") from error
    except UnicodeDecodeError as error:
        raise Malformed("is not text") from error
    except Malformed:
        raise
    except ValueError as error:  # no JSON, or a number of thousands of digits
        raise Malformed("is not JSON") from error
    if not isinstance(facts, dict):
        raise Malformed("is not a JSON object")
    return facts


def _once(pairs: list[tuple[str, object]]) -> dict:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise Malformed("has a key twice")
    return found


def _refuse_constant(name: str) -> None:
    raise Malformed(f"holds {name}")


def validate(facts: dict) -> None:
    """Raises Malformed for anything that a calibration of version 1 cannot hold."""
    _model(_dict(facts, "model"))
    run = _dict(facts, "run")
    steps = _run(run)
    if facts.get("teacache") is not None:
        _teacache(_dict(facts, "teacache"))
    elif "teacache" not in facts:
        raise Malformed("has no teacache")
    curves = _dict(facts, "smoothcache")
    for kind in curves:
        _curve(_dict(curves, kind), kind, steps)
    _grams(facts.get("grams"), run["prompts"], steps)


def _model(model: dict) -> None:
    for name in ("class", "name", "weights"):
        _text(model, name)
    if not re.fullmatch("[0-9a-f]{32}", _text(model, "fingerprint")):
        raise Malformed("has a fingerprint that is none")


def _run(run: dict) -> int:
    """Returns the number of steps."""
    _text(run, "sampler")
    steps = _whole(run, "steps", 1)
    _whole(run, "prompts", 1)
    _whole(run, "seed", 0, most=2**64)
    sigmas = _numbers(run.get("sigmas"), "sigmas", steps + 1)
    if max(sigmas) <= 0:
        raise Malformed("has sigmas of nothing but 0")
    _number(run, "cfg", least=-1e6)
    if run.get("shift") is not None:
        _number(run, "shift", least=-1e6)
    _numbers(run.get("latent"), "latent")
    if "flow" in run:
        _flow(_dict(run, "flow"))
    return steps


def _flow(flow: dict) -> None:
    if not isinstance(flow.get("mixes"), bool) or set(flow) != set(FlowTime().to_json()):
        raise Malformed("has a flow that is none")
    for name in ("noise", "data"):
        if _number(flow, name) == 0:
            raise Malformed(f"has a {name} of 0")


def _teacache(fitted: dict) -> None:
    _text(fitted, "feature")
    coefficients = _numbers(fitted.get("coefficients"), "coefficients", least=-math.inf)
    if not 1 <= len(coefficients) <= COEFFICIENTS:
        raise Malformed(f"has {len(coefficients)} coefficients")
    if _number(fitted, "x_min") > _number(fitted, "x_max"):
        raise Malformed("has an x_min above its x_max")
    if fitted.get("r2") is not None:
        _number(fitted, "r2", least=-math.inf)
    elif "r2" not in fitted:
        raise Malformed("has no r2")
    points = fitted.get("points")
    if not isinstance(points, list):
        raise Malformed("has no points")
    for point in points:
        _numbers(point, "points", 2)


def _curve(curve: dict, kind: str, steps: int) -> None:
    _whole(curve, "samples", 1)
    for name in ("mean", "half"):
        rows = curve.get(name)
        if not isinstance(rows, list) or not 1 <= len(rows) < steps:
            raise Malformed(f"has no rows of {name} for {kind[:50]}")
        for k, row in enumerate(rows, 1):
            _numbers(row, f"{name} of {kind[:50]}", steps - k)
    if len(curve["mean"]) != len(curve["half"]):
        raise Malformed(f"has intervals for other rows of {kind[:50]}")


def _grams(grams: object, prompts: int, steps: int) -> None:
    if not isinstance(grams, list) or len(grams) != prompts:
        raise Malformed("has not as many grams as prompts")
    for gram in grams:
        if not isinstance(gram, list) or len(gram) != steps:
            raise Malformed(f"has grams that are not of {steps} steps")
        for row in gram:
            _numbers(row, "grams", steps, least=-math.inf)
    products = np.asarray(grams, dtype=np.float64)
    lengths = np.sqrt(np.maximum(np.diagonal(products, axis1=1, axis2=2), 0))
    bound = lengths[:, :, None] * lengths[:, None, :]
    symmetric = np.allclose(products, products.transpose(0, 2, 1), rtol=1e-5, atol=1e-6)
    if not symmetric or (np.abs(products) > bound * (1 + 1e-5) + 1e-6).any():
        raise Malformed("has grams that are no inner products")


def _dict(facts: dict, name: str) -> dict:
    value = facts.get(name)
    if not isinstance(value, dict) or len(value) > STEPS:
        raise Malformed(f"has no {name[:50]}")
    return value


def _text(facts: dict, name: str) -> str:
    value = facts.get(name)
    if not isinstance(value, str) or len(value) > 1000:
        raise Malformed(f"has no {name}")
    return value


def _whole(facts: dict, name: str, least: int, most: int = STEPS**2) -> int:
    value = facts.get(name)
    if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
        raise Malformed(f"has no {name}")
    return value


def _number(facts: dict, name: str, least: float = 0.0) -> float:
    return _numbers([facts.get(name)], name, 1, least)[0]


def _numbers(
    values: object, name: str, count: int | None = None, least: float = 0.0
) -> Sequence[float]:
    """Finite numbers from `least` on."""
    if not isinstance(values, list) or count not in (None, len(values)):
        raise Malformed(f"has not the {name} that it needs")
    for value in values:
        if not isinstance(value, (int, float)) or isinstance(value, bool):
            raise Malformed(f"has something else than numbers in {name}")
        if not abs(value) <= 1e30 or value < least:
            raise Malformed(f"has numbers out of range in {name}")
    return values
