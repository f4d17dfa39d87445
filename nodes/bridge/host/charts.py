"""A node's chart as JSON: the one schema that web/ reads, under the UI key `nibble_chart`.

{"kind": "layers", "title": str, "subtitle": str, "summary": [[label, value], …],
"bytes_before": int, "bytes_after": int,
 "rows": [{"name", "action": one of `quant/files/report.py`, "why", "db": float | null,
 "bytes_before", "bytes_after", "seconds"}, …]}
{"kind": "facts", "title": str, "summary": [[label, value], …]}
{"kind": "kept", "title": str, "subtitle": str, "summary": [[label, value], …],
 "rows": [{"name", "action", "kept": 0…1, "nearest": 0…1 | null, "why", "bytes"}, …]}
   (kept: the share of a LoRA that a layer keeps)
{"kind": "patches", "title", "subtitle", "summary", "tokens": [int of each layer, …], "flops":
[before, after], "stages": int,
 "pictures": [{"rows": int, "columns": int, "url": data URL of a JPEG, "stage": [how many stages
 each patch lasted, in raster order, …]}, …]}
{"kind": "strip", "title": str, "subtitle": str, "summary": [[label, value], …], "threshold":
float | null, "measure": str | null,
 "forwards": float | null, "cells": [{"step", "sigma": float | null, "computed": bool | null,
 "why": str, "change": float | null}, …],
 "rows": [{"name": str, "computed": [bool | null, …]}, …]}    (a cell a sampling step, null:
   still to come; rows: parts of a step, if any)
{"kind": "calibration", "title": str, "subtitle": str, "summary": [[label, value], …], "points":
[[x, y], …], "fit": [[x, y], …],
 "series": [{"name": str, "y": [float | null, …]}, …]}        (what entered and left the model,
   the curve through it; errors step by step)
"""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections import Counter

import torch

from .... import kernels
from ....quant.files.checkpoint import QuantizedFile
from ....quant.files.report import Report

KEY = "nibble_chart"


def ui(chart: dict) -> dict:
    """A chart as a node's `ui` result."""
    return {KEY: [chart]}


def size(count: int) -> str:
    """Bytes for people: 6.52 GB, 11.4 MB."""
    for unit, name in ((1e9, "GB"), (1e6, "MB")):
        if count >= unit:
            return f"{count / unit:.3g} {name}"
    return f"{count / 1e3:.3g} kB"


def layers_chart(report: Report, title: str, subtitle: str) -> dict:
    """A quantization's report: the error of each layer, what was kept and why."""
    rows = [dataclasses.asdict(row) for row in report.rows]
    for row in rows:
        row["db"] = row["db"] if row["db"] is not None and math.isfinite(row["db"]) else None
    return {
        "kind": "layers",
        "title": title,
        "subtitle": subtitle,
        "summary": [list(pair) for pair in report.summary()],
        "bytes_before": report.bytes_before,
        "bytes_after": report.bytes_after,
        "rows": rows,
    }


def model_chart(
    file: QuantizedFile, needed: tuple[int, int], device: torch.device, in_ram: int = 0
) -> dict:
    """Facts about a loaded model: VRAM, size, layers, error and what computes it."""
    formats = Counter(layer["format"] for layer in file.layers.values())
    ranks = sorted({layer["rank"] for layer in file.layers.values() if "rank" in layer})
    floats = formats["svdquant_nvfp4"]
    backend, reason = kernels.which("linear_nvfp4" if floats else "linear_w4a4", device)
    errors = [
        row["db"]
        for row in file.fact("report").get("rows", [])
        if row.get("db") is not None and row["action"] in ("w4a4", "nvfp4")
    ]
    whole = (
        f" of {size(torch.cuda.get_device_properties(device).total_memory)}"
        if device.type == "cuda"
        else ""
    )
    summary = [
        [
            "VRAM",
            (
                f"about {size(sum(needed))}{whole}: {size(needed[0])} of weights, {size(needed[1])}"
                " that ComfyUI estimates for 1024 × 1024"
            ),
        ],
        ["file", f"{size(file.size)}, {file.kind}"],
        [
            "layers",
            (
                f"{formats['svdquant_w4a4'] + floats} W4A4{' in 4-bit floats' if floats else ''},"
                f" rank {', '.join(map(str, ranks))};"
                f" {formats['awq_w4a16']} 4-bit weights only"
            ),
        ],
        ["computed by", f"{backend} ({reason})"],
    ]
    if in_ram:
        summary.insert(1, ["RAM", f"{size(in_ram)} of modulation layers, computed on the CPU"])
    if errors:
        summary.insert(
            -1, ["error", f"median {statistics.median(errors):.1f} dB, worst {min(errors):.1f} dB"]
        )
    return {"kind": "facts", "title": file.path.name, "summary": summary}
