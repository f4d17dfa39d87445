"""A farm's run: jobs are looked at and handed to a runner, events come back, until all have ended.

Large models go first: one that starts last is what everybody waits for at the end.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from ..quant.cli import by_name
from ..quant.files.errors import FileRefused
from ..quant.files.source import Source
from .jobs import Job, stamp
from .ledger import BUSY, ENDED, REFUSED, WAITING, Ledger
from .needs import needs_of

PACK = Path(__file__).resolve().parent.parent
LOOK = 0.5  # seconds between two looks
AGAIN = 30.0  # seconds until a target that another farm is writing is looked at again


class ClusterRefused(ValueError):
    """There is no cluster to work on; the sentence says what to do."""


class Runner(Protocol):
    """What works on jobs."""

    def submit(self, job: Mapping[str, Any]) -> None: ...

    def poll(self, seconds: float) -> list[dict]: ...

    def close(self) -> None: ...


@dataclass
class Farm:
    """A ledger's jobs on a runner. more: gives jobs that have come since it was last asked, or None
    where none will come; heard: called twice a second.
    """

    ledger: Ledger
    runner: Runner
    heard: Iterable[Callable[[], None]] = ()
    more: Callable[[], Iterable[Job] | None] = lambda: None
    _submitted: set[str] = field(default_factory=set)
    _due: dict[str, float] = field(default_factory=dict)

    def run(self) -> None:
        """Until all jobs have ended. Raises ClusterRefused."""
        try:
            while (coming := self.more()) is not None or self.ledger.open:
                for job in coming or ():
                    self._add(job)
                self._look_at_busy()
                self._submit(
                    [job for job in self.ledger.ready() if job.name not in self._submitted]
                )
                self._hear(LOOK)
        finally:
            self.runner.close()

    def _add(self, job: Job) -> None:
        """A job that has come: a new model, or one that has changed since it was done."""
        known = self.ledger.entries.get(job.name)
        if known is not None and known.job.source != job.source:
            self.ledger.note(
                f"{job.source} was left out: {known.job.source} has the same target, {job.name}"
            )
        elif known is None or known.state in ENDED:
            self._submitted.discard(job.name)
            self.ledger.add(job)

    def _submit(self, jobs: list[Job]) -> None:
        began = time.monotonic()
        for job in sorted(jobs, key=lambda job: -sum(stamp(job.source)[:1])):
            self._submitted.add(job.name)
            try:
                self.runner.submit(message(job))
            except ValueError as error:
                self.ledger.end(job, REFUSED, str(error))
            if time.monotonic() - began > LOOK:  # of thousands of jobs the first are at work
                self._hear(0)
                began = time.monotonic()

    def _hear(self, seconds: float) -> None:
        for event in self.runner.poll(seconds):
            self.ledger.take(event)
        self.ledger.miss()
        for each in self.heard:
            each()

    def _look_at_busy(self) -> None:
        """What another farm was writing: once it has ended, ours is done, or goes on from there."""
        now = time.monotonic()
        for entry in self.ledger.open:
            if entry.state != BUSY:
                self._due.pop(entry.job.name, None)
            elif now > self._due.setdefault(entry.job.name, now + AGAIN):
                entry.state = WAITING
                self._submitted.discard(entry.job.name)


def message(job: Job) -> dict[str, Any]:
    """A job as a runner takes it. Raises FileRefused for a source or target that cannot be."""
    needs = needs_of(Source(job.source), by_name.parsed(job.options), job)
    try:
        job.target.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise FileRefused(
            f"The folder {job.target.parent} cannot be made ({error.strerror}); choose another."
        ) from error
    return {
        "id": job.name,
        "command": ["quantize", *job.words, "--driven"],
        "python": job.worker.get("python"),
        "pack": job.worker.get("pack", str(PACK)),
        "threads": max(1, int(needs.cpus)),
        "asked": "cpus" in job.worker,
        "needs": needs.facts(),
    }
