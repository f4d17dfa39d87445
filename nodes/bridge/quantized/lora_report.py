"""What the LoRAs on a MODEL do to each of its layers when it runs, told without running it: the
same reading of patches as `lora` computes with.

    {"kind": "lora", "title": str, "subtitle": str, "summary": [[label, value], …],
     "rows": [{"name", "how": a key of HOW, "why", "rank": int, "lost": share of the change's
     energy, "bytes"}, …]}
"""

from __future__ import annotations

from collections import Counter

import torch
from comfy.model_patcher import ModelPatcher

from ....quant.weights.delta import round_rank
from ..host import charts
from . import layouts, lora, patches

HOW = {
    "branch": "in the 16-bit branch",
    "rows": "in the branch's side, rows scaled",
    "dense": "dense, beside the layer",
    "comfyui": "merged by ComfyUI (a 16-bit layer)",
    "refused": "does not fit",
}
_PREFIX = "diffusion_model."


def lora_chart(model: ModelPatcher) -> dict:
    """The chart of all patches on a model."""
    rows = [_row(model, key, entries) for key, entries in model.patches.items()]
    quantized = sum(
        layouts.is_ours(getattr(module, "weight", None)) for module in model.model.modules()
    )
    return {
        "kind": "lora",
        "title": "LoRAs on this model",
        "subtitle": f"{len(rows)} patched weights and biases; {quantized} layers in 4 bits",
        "summary": [list(pair) for pair in _summary(rows)],
        "rows": rows,
    }


def _row(model: ModelPatcher, key: str, entries: list[tuple]) -> dict:
    name, layer = key.removeprefix(_PREFIX).removesuffix(".weight"), lora.layer_of(model, key)
    row = {
        "name": name,
        "how": "comfyui",
        "why": f"{len(entries)} patches, as on any model",
        "rank": 0,
        "lost": 0.0,
        "bytes": 0,
    }
    if layer is None:
        return row
    try:
        patches.check(entries, tuple(layer.weight.shape), name)
        patches.check_finite(entries, name)
    except patches.DoesNotFit as refusal:
        return row | {"how": "refused", "why": str(refusal)}
    return row | _of_4bit(layer.weight, name, entries)


def _of_4bit(weight, name: str, entries: list[tuple]) -> dict:
    """How one 4-bit layer computes its patches. Ranks and losses do not depend on the weight, so a
    stand-in does for a DoRA's norms.
    """
    n, k = weight.shape
    effect = patches.effect_of(entries, (n, k), lambda: torch.ones(1, 1).expand(n, k), name)
    size = weight.params.branch_dtype.itemsize
    if effect is None:
        return {
            "how": "dense",
            "why": (
                f"{_kinds(entries)}: ComfyUI computes the new weight, its difference is kept; no"
                " loss"
            ),
            "bytes": n * k * size,
        }
    delta = effect.delta
    how, added = "branch", (n + k) * round_rank(delta.rank) * size
    if delta.dense is not None:
        how, added = "dense", added + n * k * size
    if delta.row_scale is not None:
        how, added = "rows", added + 4 * n
    loss = "exact to 16 bits"
    if effect.lost:
        loss = f"factors leave out {effect.lost:.1g} of its energy"
    return {
        "how": how,
        "why": f"{' + '.join(effect.kinds) or 'strength 0'}: rank {delta.rank}, {loss}",
        "rank": delta.rank,
        "lost": effect.lost,
        "bytes": added,
    }


def _kinds(entries: list[tuple]) -> str:
    return " + ".join(getattr(patch, "name", None) or "difference" for _, patch, *_ in entries)


def _summary(rows: list[dict]) -> list[tuple[str, str]]:
    if not rows:
        return [
            (
                "result",
                (
                    "No LoRA reaches this model. If one was loaded before this node, none of its"
                    " keys fit: it was made for another model. The console lists them (lora key not"
                    " loaded). If they end in lora_down and lora_up, it is in Nunchaku's own form:"
                    " python ComfyUI-Nibble convert nunchaku.safetensors ordinary.safetensors"
                ),
            )
        ]
    counts = Counter(row["how"] for row in rows)
    reached = [row for row in rows if row["how"] not in ("comfyui", "refused")]
    summary = [
        (HOW[how], f"{counts[how]} {'layer' if counts[how] == 1 else 'layers'}")
        for how in HOW
        if counts[how]
    ]
    refused = [("refused", row["why"]) for row in rows if row["how"] == "refused"][:1]
    if not reached:
        return [*summary, ("result", "No 4-bit layer is changed."), *refused]
    worst = max(row["lost"] for row in reached)
    return [
        *summary,
        ("rank added", _span(sorted({row["rank"] for row in reached if row["rank"]}))),
        ("memory added", charts.size(sum(row["bytes"] for row in reached))),
        (
            "left out",
            f"at most {patches.decibels(worst):.0f} dB below the change" if worst else "nothing",
        ),
        *refused,
    ]


def _span(ranks: list[int]) -> str:
    """Ascending ranks, in words."""
    if not ranks:
        return "none"
    return str(ranks[0]) if len(ranks) == 1 else f"{ranks[0]} to {ranks[-1]}"
