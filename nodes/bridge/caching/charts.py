"""Charts of caching: the strip of a sampling run, and what a calibration measured (the schema is in
`host/charts.py`).
"""

from __future__ import annotations

import math

from ....accel.caching.calibration_file import Calibration
from ....accel.caching.steps import Cell, Record

# how deep a model lets caching go
LEVELS = {"sublayer": "blocks and their parts", "blocks": "blocks", "step": "whole steps"}
# of a Record's kind: what its cells' change is; TeaCache's accumulated change otherwise
MEASURES = {"error": "estimated error"}
CURVE_POINTS, DRAWN_POINTS = 64, 400  # of the drawn polynomial, and of the cloud around it


def strip_chart(
    record: Record, title: str, subtitle: str = "", summary: list | None = None
) -> dict:
    """A run's cells so far, and empty ones up to the number of steps that it will have.

    `summary`: [label, value] pairs under the strip. Where several parts of a step are reused there
        are `rows`, and `forwards` says how many whole
    steps the computed parts add up to.
    """
    total = max(record.total, len(record.cells))
    rows = [
        {"name": name, "computed": [states.get(step) for step in range(total)]}
        for name, states in record.rows.items()
    ]
    forwards = round(len(record.cells) * record.work / max(record.calls, 1), 2) if rows else None
    return {
        "kind": "strip",
        "title": title,
        "subtitle": subtitle,
        "summary": summary or [],
        "threshold": record.threshold,
        "measure": MEASURES.get(record.kind),
        "forwards": forwards,
        "cells": [_cell(record.cells.get(step), step) for step in range(total)],
        "rows": rows,
    }


def _cell(cell: Cell | None, step: int) -> dict:
    """A step as JSON, which knows no infinity. None: not reached yet."""
    if cell is None:
        return {"step": step, "sigma": None, "computed": None, "why": "", "change": None}
    finite = cell.change is not None and math.isfinite(cell.change)
    return {
        "step": step,
        "sigma": float(cell.sigma),
        "computed": bool(cell.computed),
        "why": cell.why,
        "change": float(cell.change) if finite else None,
    }


def calibration_chart(calibration: Calibration, title: str, subtitle: str = "") -> dict:
    """TeaCache's points with the polynomial through them, and the error of giving each kind of part
    the result of the step before.
    """
    run, facts, polynomial = calibration.run, calibration.teacache, calibration.polynomial
    summary = [
        ["measured", f"{run['prompts']} prompts, {run['steps']} steps, {run['sampler']}"],
        ["model", f"{calibration.model['name']}, {calibration.model['weights']}"],
    ]
    points, fit = [], []
    if facts is not None:
        summary.append(
            ["TeaCache's fit", f"R² {facts['r2']:.2f}" if facts["r2"] is not None else "R² unknown"]
        )
        points = facts["points"][:: max(1, len(facts["points"]) // DRAWN_POINTS)]
        width = (facts["x_max"] - facts["x_min"]) / (CURVE_POINTS - 1)
        fit = [
            [x, polynomial(x)]
            for x in (facts["x_min"] + width * index for index in range(CURVE_POINTS))
        ]
    series = [
        {
            "name": kind,
            "y": [
                None,
                *(float(value) if math.isfinite(value) else None for value in curve.mean[0]),
            ],
        }
        for kind, curve in sorted(
            calibration.curves.items(), key=lambda item: (item[0] != "step", item[0].count("."))
        )
    ]
    return {
        "kind": "calibration",
        "title": title,
        "subtitle": subtitle,
        "summary": summary,
        "points": points,
        "fit": fit,
        "series": series,
    }
