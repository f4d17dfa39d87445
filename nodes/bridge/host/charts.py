"""A node's chart as JSON: the one schema that web/ reads, under the UI key `nibble_chart`.

{"kind": "layers", "title": str, "subtitle": str, "summary": [[label, value], …],
"bytes_before": int, "bytes_after": int,
 "rows": [{"name", "action": one of `quant/files/report.py`, "why", "db": float | null,
 "bytes_before", "bytes_after", "seconds", "on": "pictures" | "noise" | "synthetic" | ""}, …]}
   (on: what db was measured on; "": nothing, or not told)
{"kind": "facts", "title": str, "summary": [[label, value], …], "details": the same, folded away}
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
{"kind": "memory", "title": str, "subtitle": str, "summary": [[label, value], …], "verdict": str,
 "card": bytes that a card has for ComfyUI | null (a CPU), "ram": bytes,
 "stages": [{"name", "card": [part, …], "ram": [part, …], "streamed": bytes, "before": bytes}, …],
 "switches": [{"name", "stage", "saves": bytes, "costs", "how", "on": bool}, …]}
   (a part: {"label", "bytes", "kind": of `quant/files/memory/stages.py`}; before: the stage's peak
   without the switches)
{"kind": "calibration", "title": str, "subtitle": str, "summary": [[label, value], …], "points":
[[x, y], …], "fit": [[x, y], …],
 "series": [{"name": str, "y": [float | null, …]}, …]}        (what entered and left the model,
   the curve through it; errors step by step)
"""

from __future__ import annotations

import dataclasses
import math
from collections import Counter

import comfy.model_management
import torch

from .... import kernels
from ....quant.files.checkpoint import QuantizedFile
from ....quant.files.errors import reading
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


def vram_line(needed: tuple[int, int], device: torch.device) -> list[str]:
    """What a loaded model needs (`loading.vram_needed`), of this card's memory and what of that is
    left, as a line of a summary.
    """
    most = sum(needed)
    whole = f"about {size(most)} on a graphics card"
    if device.type != "cpu":
        card = comfy.model_management.get_total_memory(device)
        whole = f"about {size(most)} of {size(card)}, "
        if most <= card:
            whole += f"{size(card - most)} are left"
        else:
            whole += f"{size(most - card)} too many: ComfyUI keeps those in RAM, which is slower"
    text = (
        f"{whole}: {size(needed[0])} of weights, {size(needed[1])} that ComfyUI sets aside for"
        " 1024 × 1024 (VRAM Plan tells more)"
    )
    return ["VRAM", text]


def kernels_lines(op: str, device: torch.device) -> tuple[list[str], list[str]]:
    """Whether an op of `kernels` is computed by compiled code here, as a line of a summary, and
    what computes it, as one of the details.
    """
    backend, reason = kernels.which(op, device)
    fast = f"off: {reason}" if backend == "reference" else "on"
    return ["fast kernels", fast], ["computed by", f"{backend} ({reason})"]


def error_lines(file: QuantizedFile) -> list[list[str]]:
    """What a file's report tells of its layers' errors, as lines of a summary."""
    text = file.metadata.get("report")
    with reading(file.path, file.remedy):
        report = Report.from_json(text) if text else Report("")
    return [list(pair) for pair in report.errors()]


def _main_layers(formats: Counter) -> tuple[str, str]:
    """How many layers of low-bit activations a file has, in words, and the op that computes
    them.
    """
    if table := formats["svdquant_w4a8"]:
        return f"{table} W4A8", "linear_w4a8"
    if floats := formats["svdquant_nvfp4"]:
        return f"{floats} W4A4 in 4-bit floats", "linear_nvfp4"
    return f"{formats['svdquant_w4a4']} W4A4", "linear_w4a4"


def model_chart(
    file: QuantizedFile, needed: tuple[int, int], device: torch.device, in_ram: int = 0
) -> dict:
    """Facts about a loaded model: VRAM, size, layers, error and what computes it."""
    formats = Counter(layer["format"] for layer in file.layers.values())
    ranks = sorted({layer["rank"] for layer in file.layers.values() if "rank" in layer})
    w4a4, op = _main_layers(formats)
    fast, computed = kernels_lines(op, device)
    summary = [vram_line(needed, device), fast, *error_lines(file)]
    if in_ram:
        summary.insert(1, ["RAM", f"{size(in_ram)} of modulation layers, computed on the CPU"])
    details = [
        ["file", f"{size(file.size)}, {file.kind}"],
        [
            "layers",
            (
                f"{w4a4}, rank {', '.join(map(str, ranks or [0]))};"
                f" {formats['awq_w4a16']} 4-bit weights only"
            ),
        ],
        computed,
    ]
    return {"kind": "facts", "title": file.path.name, "summary": summary, "details": details}
