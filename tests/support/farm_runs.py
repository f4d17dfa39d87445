"""Farms of small models: what they are given, and packs that only pretend to quantize."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from nibble.quant.files.known_shapes import flux1_shapes

QUICK = {"preset": "fast", "rank": 16, "solver": "svd", "memory_cap": 0}
"""A recipe of seconds, from the weights alone."""


def small_model(path: Path, seed: int = 0, hidden: int = 128, single: int = 1) -> Path:
    """A FLUX.1 of random weights: one double block, few single ones."""
    draw = torch.Generator().manual_seed(seed)
    shapes = flux1_shapes(1, single, hidden, 64, 64)
    save_file(
        {name: (torch.randn(s, generator=draw) * 0.05).bfloat16() for name, s in shapes.items()},
        path,
    )
    return path


def farm_of(folder: Path, count: int, recipe: dict | None = None, **sizes: int) -> Path:
    """A jobs file for `count` models in a folder of their own."""
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        small_model(folder / f"m{number}.safetensors", number, **sizes)
    jobs = folder / "jobs.json"
    jobs.write_text(json.dumps({"models": "m*.safetensors", "recipes": {"q": recipe or QUICK}}))
    return jobs


def pretending_pack(folder: Path, code: str) -> Path:
    """A pack whose command line is this Python; `say(event, **facts)` says a line, `words` are what
    it was given.
    """
    folder.mkdir(parents=True, exist_ok=True)
    front = (
        "import json, os, signal, sys, time\n"
        "words = sys.argv[1:]\n"
        "def say(event, **facts): print(json.dumps({'event': event, **facts}), flush=True)\n"
    )
    (folder / "__main__.py").write_text(front + code)
    return folder


def job_of(pack: Path, *words: str, retries: int = 0) -> dict:
    """A job as a runner takes it."""
    needs = {"cpus": 1, "gpus": 0, "memory": 0, "retries": retries, "seconds": 1}
    return {
        "id": "m.safetensors",
        "command": list(words),
        "python": None,
        "pack": str(pack),
        "threads": 1,
        "asked": True,
        "needs": needs,
    }


REPORT = {
    "architecture": "FLUX.1",
    "rows": [],
    "bytes_before": 24_000_000_000,
    "bytes_after": 6_600_000_000,
    "seconds": 790.0,
    "notes": [],
}
for _db in (24.0, 27.0, 31.5):
    REPORT["rows"].append(
        {
            "name": f"layer{_db:g}",
            "action": "w4a4",
            "why": "",
            "db": _db,
            "bytes_before": 4,
            "bytes_after": 1,
            "seconds": 1.0,
            "on": "noise",
        }
    )
