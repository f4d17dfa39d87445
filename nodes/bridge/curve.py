"""A training's loss as a chart: drawn while it runs, and as the node's result.

    {"kind": "curve", "title": str, "subtitle": str, "summary": [[label, value], …], "steps": int, "points": [[step, loss], …],
     "smooth": [[step, loss], …], "lowest": [step, loss]}

points are thinned to a few hundred means of neighbours; smooth is the exponential mean over all steps, lowest the least of it.
"""

from __future__ import annotations

from collections.abc import Sequence

MOST = 300  # points that are sent


def smoothed(losses: Sequence[float], memory: float) -> list[float]:
    """Exponential mean that forgets over `memory` steps, without a bias towards its start."""
    keep, total, weight, out = 1 - 1 / max(memory, 1.0), 0.0, 0.0, []
    for loss in losses:
        total, weight = keep * total + (1 - keep) * loss if keep else loss, keep * weight + (1 - keep) if keep else 1.0
        out.append(total / weight)
    return out


def curve_chart(losses: Sequence[float], steps: int, title: str, subtitle: str = "", summary: Sequence[tuple[str, str]] = ()) -> dict:
    """losses of the steps done so far, of `steps` in all. summary: lines besides those about the loss."""
    smooth = smoothed(losses, max(5.0, min(50.0, len(losses) / 10)))
    width = -(-len(losses) // MOST)
    spans = [range(start, min(start + width, len(losses))) for start in range(0, len(losses), width)] if losses else []
    facts = [["step", f"{len(losses)} of {steps}"]]
    lowest = None
    if losses:
        at = min(range(len(smooth)), key=smooth.__getitem__)
        lowest = [at + 1, smooth[at]]
        facts += [["loss", f"{smooth[-1]:.4g}"], ["lowest", f"{smooth[at]:.4g} at step {at + 1}"]]
    return {"kind": "curve", "title": title, "subtitle": subtitle, "summary": [*facts, *map(list, summary)], "steps": steps, "lowest": lowest,
            "points": [[span[-1] + 1, sum(losses[i] for i in span) / len(span)] for span in spans],
            "smooth": [[span[-1] + 1, smooth[span[-1]]] for span in spans]}
