"""What every rule of caching speaks of: a step, the steps that may be reused, and the record of a
run.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Step:
    """One evaluation of the model: step `index` of `total`, at noise level `sigma` (the sampler's
    unit, for people) and `time` (see `flow_time.py`, for all that guesses; nan where nothing does).
    """

    index: int
    total: int
    sigma: float
    time: float = math.nan

    @property
    def share(self) -> float:
        """How much of the run lies behind, 0 to just below 1."""
        return self.index / self.total


@dataclass(frozen=True)
class Window:
    """The steps that a rule may reuse: from `start` to `end` as shares of the run, never the
    `first` first nor the `last` last ones.
    """

    start: float = 0.0
    end: float = 1.0
    first: int = 1
    last: int = 1

    def __post_init__(self):
        if not (0 <= self.start <= 1 and 0 <= self.end <= 1 and self.start <= self.end):
            raise ValueError(
                f"start and end are shares of the run, 0 to 1, start before end; not {self.start:g}"
                f" and {self.end:g}."
            )
        if self.first < 0 or self.last < 0:
            raise ValueError(
                "The numbers of first and last steps that are always computed must not be negative."
            )

    def forbids(self, step: Step) -> str | None:
        """Why this step must be computed, or None: "first", "last" or "outside"."""
        if step.index < self.first:
            return "first"
        if step.index >= step.total - self.last:
            return "last"
        return None if self.start <= step.share <= self.end else "outside"


@dataclass(frozen=True)
class Decision:
    """Compute this step or not, why, and the change that a rule had summed up before it decided
    (None: the rule sums nothing up).
    """

    compute: bool
    why: str  # "first" | "last" | "outside" | "new" | "threshold" | "schedule" | "reused"
    change: float | None = None


@dataclass(frozen=True)
class Cell:
    """A step of a run as it was decided."""

    step: int
    sigma: float
    computed: bool
    why: str
    change: float | None


@dataclass
class Record:
    """What happened in one sampling run.

    cells: step → its cell, as decided for the first stream of conditioning. rows: part of the model
        → {step: computed}, for schedules that
    reuse parts. calls and computed_calls count evaluations over all streams; work is what they
    cost, in whole evaluations.
    """

    total: int
    threshold: float | None = None
    kind: str = ""
    cells: dict[int, Cell] = field(default_factory=dict)
    rows: dict[str, dict[int, bool]] = field(default_factory=dict)
    calls: int = 0
    computed_calls: int = 0
    work: float = 0.0
    done: int = 0
    level: str = ""

    def add(self, step: Step, decision: Decision, first_stream: bool) -> None:
        """Counts one evaluation; the first stream's decision is the one that is shown, computed
        where a step has several.
        """
        self.calls += 1
        self.computed_calls += decision.compute
        self.work += decision.compute
        known = self.cells.get(step.index)
        if first_stream and (known is None or decision.compute and not known.computed):
            self.cells[step.index] = Cell(
                step.index, step.sigma, decision.compute, decision.why, decision.change
            )

    def add_rows(self, step: Step, computed: dict[str, bool], shares: dict[str, float]) -> None:
        """One evaluation in which some parts of the model were computed. shares: part → its share
        of the model's work; the rest is always done.
        """
        self.calls += 1
        self.computed_calls += all(computed.values())
        self.work += 1 - sum(shares[name] for name, value in computed.items() if not value)
        for name, value in computed.items():
            self.rows.setdefault(name, {})[step.index] = value
        everything = all(computed.values())
        self.cells.setdefault(
            step.index,
            Cell(step.index, step.sigma, everything, "schedule" if everything else "reused", None),
        )

    @property
    def computed(self) -> int:
        """Steps computed so far."""
        return sum(cell.computed for cell in self.cells.values())

    @property
    def reused(self) -> int:
        return len(self.cells) - self.computed

    def reasons(self) -> Counter:
        """How many steps were decided for which reason."""
        return Counter(cell.why for cell in self.cells.values())
