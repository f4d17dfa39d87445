"""What Train CAF is asked for, and what it shows of it: the curve, and lines about the result."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from comfy.model_patcher import ModelPatcher

from ....accel.caf.adapter import CAFAdapter
from ....accel.caf.couplings import Couplings
from ....quant.training.loop import Options
from ..host.charts import size
from ..training.curve import curve_chart
from ..training.session import Settings
from .student import STEPS

PHASES = ("velocity", "acceleration")
# `Options`, as in tests/bench/results/caf-distilled.json
RECIPE = {"decay": 1.0, "weight_decay": 0.0, "warmup": 30}


@dataclass(frozen=True)
class TrainingJob:
    """What the user asked for. options.steps: of each net; rank 0: whole differences; layers:
    patterns of layer names, none for all linears of the model's blocks; preview_every: steps, 0 for
    none.
    """

    model: ModelPatcher
    couplings: Couplings
    filename: str
    options: Options = field(default_factory=lambda: Options(**RECIPE))
    settings: Settings = field(default_factory=Settings)
    rank: int = 16
    h: float = 1.0
    overwrite: bool = False
    layers: tuple[str, ...] = ()
    preview_every: int = 50
    node_id: str | None = None


def training_chart(
    job: TrainingJob,
    name: str,
    losses: dict[str, list[float]],
    summary: list[tuple[str, str]],
    subtitle: str | None = None,
) -> dict:
    """The curve so far."""
    if subtitle is None:
        rank = f"rank {job.rank}" if job.rank else "whole layers"
        subtitle = f"{rank}, h = {job.h:g}, {job.options.optimizer}, {job.options.lr:g}"
    steps = job.options.steps
    return curve_chart(
        [loss for phase in PHASES for loss in losses[phase]],
        2 * steps,
        name,
        subtitle,
        summary,
        list(zip(PHASES, (0, steps), strict=True)),
    )


def measured_lines(held: dict) -> list[tuple[str, str]]:
    if held["error"] is None:
        return []
    return [
        (
            "held-out error",
            f"{held['error']:.3g} at {STEPS + 1} calls; the model itself {held['euler']:.3g}",
        )
    ]


def summary_lines(adapter: CAFAdapter, target: Path) -> list[tuple[str, str]]:
    about = adapter.facts
    held = about["held_out"]["pairs"]
    pairs = f"{about['pairs'] - held}"
    if held:
        pairs += f" and {held} held out"
    return [
        *measured_lines(about["held_out"]),
        ("pairs", pairs),
        ("layers", str(len(adapter.velocity.names))),
        ("file", size(target.stat().st_size)),
    ]
