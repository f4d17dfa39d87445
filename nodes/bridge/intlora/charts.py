"""Charts of retention: how much of a LoRA each layer keeps, once it is converted or merged.

{"kind": "kept", "title": str, "subtitle": str, "summary": [[label, value], …],
 "rows": [{"name", "action", "kept": the retention, "nearest": that of rounding alone or None,
 "bytes", "why"}, …]}
"""

from __future__ import annotations

import statistics

from ..host.charts import size
from .convert import Converted
from .fold import MergeReport


def conversion_chart(done: Converted, lora_name: str) -> dict:
    """A LoRA's conversion, beside what rounding to the base's own 4 bits would keep of it."""
    conversion = done.conversion
    layers = conversion.adapter.layers
    rows = [
        {
            "name": row.layer,
            "action": done.actions[row.layer],
            "kept": row.retention,
            "nearest": row.nearest,
            "bytes": layers[row.layer].nbytes,
            "why": f"k = {row.k}, rank {row.rank}" + (f"; {row.note}" if row.note else ""),
        }
        for row in conversion.rows
    ]
    ks = sorted({row.k for row in conversion.rows})
    summary = [
        ["kept", _retention(rows)],
        [
            "rounding alone would keep",
            f"{statistics.mean(row.nearest for row in conversion.rows):.1%}",
        ],
        ["k", f"{ks[0]}" if len(ks) == 1 else f"{ks[0]} to {ks[-1]}"],
        ["file", f"{size(done.nbytes)}, of a LoRA of {size(sum(done.bytes_before.values()))}"],
    ]
    if done.left_out:
        summary.append(
            [
                "left out",
                (
                    f"{len(done.left_out)} tensors of the LoRA, for parts that are not in 4 bits,"
                    f" {done.left_out[0]} first"
                ),
            ]
        )
    return {
        "kind": "kept",
        "title": done.name,
        "subtitle": f"{lora_name} as SHIFT-ADD",
        "summary": summary,
        "rows": rows,
    }


def merge_chart(done: MergeReport) -> dict:
    """A merge, in memory or into a file."""
    rows = [
        {
            "name": row.name,
            "action": row.action,
            "kept": row.retention,
            "nearest": None,
            "bytes": row.bytes_after,
            "why": (
                f"rank {row.rank}" + (f"; {row.note}" if row.note else "")
                if row.rank
                else "written with the change"
            ),
        }
        for row in done.layers
    ]
    ranks = sorted({row.rank for row in done.layers if row.action == "w4a4"})
    summary = [
        ["kept", _retention(rows)],
        ["merged", done.sources],
        ["in all", f"{size(done.bytes_before)} → {size(done.bytes_after)}"],
    ]
    if ranks:
        summary.append(["rank", ", ".join(map(str, ranks))])
    if done.left_out:
        summary.append(
            [
                "left out",
                (
                    f"{len(done.left_out)} patches for tensors that the file does not have by that"
                    f" name, {done.left_out[0]} first"
                ),
            ]
        )
    return {
        "kind": "kept",
        "title": done.name,
        "subtitle": f"branch: {done.branch}",
        "summary": summary,
        "rows": rows,
    }


def _retention(rows: list[dict]) -> str:
    """Mean and least, in words."""
    shares = [row["kept"] for row in rows]
    if not shares:
        return "nothing was asked for"
    return f"{statistics.mean(shares):.2%}, least {min(shares):.2%}"
