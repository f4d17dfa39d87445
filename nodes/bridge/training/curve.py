"""A training's loss as a chart: drawn while it runs, and as the node's result.

    {"kind": "curve", "title": str, "subtitle": str, "summary": [[label, value], …], "steps": int,
    "points": [[step, loss], …],
     "smooth": [[step, loss], …], "lowest": [step, loss], "phases": [[name, steps before it], …]}

points are thinned to a few hundred means of neighbours; smooth is the exponential mean over all
steps, lowest the least of it. phases, where a training has several, are losses of different things
one after the other: each is smoothed on its own, and lowest is that of the last one begun.
"""

from __future__ import annotations

from collections.abc import Sequence

MOST = 300  # points that are sent


def smoothed(losses: Sequence[float], memory: float) -> list[float]:
    """Exponential mean that forgets over `memory` steps, without a bias towards its start."""
    keep, total, weight, out = 1 - 1 / max(memory, 1.0), 0.0, 0.0, []
    for loss in losses:
        total = keep * total + (1 - keep) * loss if keep else loss
        weight = keep * weight + (1 - keep) if keep else 1.0
        out.append(total / weight)
    return out


def curve_chart(
    losses: Sequence[float],
    steps: int,
    title: str,
    subtitle: str = "",
    summary: Sequence[tuple[str, str]] = (),
    phases: Sequence[tuple[str, int]] = (),
) -> dict:
    """losses of the steps done so far, of `steps` in all. summary: lines besides those about the
    loss; phases: (name, steps before it), from 0 on.
    """
    stops = [start for _, start in phases[1:]] + [len(losses)]
    parts = [
        (name, losses[start:stop])
        for (name, start), stop in zip(phases, stops, strict=False)
        if start < len(losses)
    ] or [("loss", losses)]
    smooth = [
        mean for _, part in parts for mean in smoothed(part, max(5.0, min(50.0, len(part) / 10)))
    ]
    spans = _spans([len(part) for _, part in parts])
    facts = [["step", f"{len(losses)} of {steps}"]]
    lowest = None
    last = len(losses) - len(parts[-1][1])
    ends = [sum(len(part) for _, part in parts[: i + 1]) for i in range(len(parts))]
    if losses:
        at = min(range(last, len(smooth)), key=smooth.__getitem__)
        lowest = [at + 1, smooth[at]]
        facts += [
            [f"{name} loss" if phases else name, f"{smooth[end - 1]:.4g}"]
            for (name, _), end in zip(parts, ends, strict=True)
        ]
        facts += [["lowest", f"{smooth[at]:.4g} at step {at + 1}"]]
    found = {
        "kind": "curve",
        "title": title,
        "subtitle": subtitle,
        "summary": [*facts, *map(list, summary)],
        "steps": steps,
        "lowest": lowest,
        "points": [[span[-1] + 1, sum(losses[i] for i in span) / len(span)] for span in spans],
        "smooth": [[span[-1] + 1, smooth[span[-1]]] for span in spans],
    }
    return found | ({"phases": [list(phase) for phase in phases]} if phases else {})


def _spans(lengths: Sequence[int]) -> list[range]:
    """Neighbouring steps that become one point, none of two parts."""
    width, found, begin = max(1, -(-sum(lengths) // MOST)), [], 0
    for length in lengths:
        found += [
            range(start, min(start + width, begin + length))
            for start in range(begin, begin + length, width)
        ]
        begin += length
    return found
