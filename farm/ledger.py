"""Where each job of a farm stands, and what an earlier run did of it.

The report that a farm writes (report.py) is its memory: a job whose entry there has the same
options, and whose source and target have been touched by nobody since, is done, and nothing is
started for it. Whatever else lies at the target is for `quantize` to judge.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from ..quant.files.report import Report
from .jobs import Job, stamp

WAITING, RUNNING, DONE, BEFORE = "waiting", "running", "done", "done before"
BUSY, REFUSED, LOST = "written elsewhere", "refused", "lost"
ENDED = (DONE, BEFORE, REFUSED, LOST)
FAILED = (REFUSED, LOST)
SILENT = 20.0  # seconds without a sign of life: the worker is gone, or cut off


@dataclass
class Entry:
    """A job's state. workers: those that worked on it, in order; layers, weights: (done, of);
    at, seconds: when its last try began (since 1970) and what it took; result: what `result_of`
    takes from the report.
    """

    job: Job
    state: str = WAITING
    workers: list[str] = field(default_factory=list)
    layers: tuple[int, int] = (0, 0)
    weights: tuple[int, int] = (0, 0)
    began: float = 0.0
    at: float = 0.0
    seconds: float = 0.0
    sentence: str = ""
    result: Mapping[str, Any] = field(default_factory=dict)
    first_weights: int = 0  # that were done when its worker began
    seen: float | None = None  # the last sign of life, of a runner that gives signs
    stamps: list[list[int]] = field(default_factory=list)
    parts: list[Entry] = field(default_factory=list)

    @property
    def took(self) -> float:
        """Seconds from the beginning of its last try, or of its first part, to its end."""
        return self.at + self.seconds - min([self.at, *(part.at for part in self.parts if part.at)])

    @property
    def left(self) -> float | None:
        """Seconds that it will still take, by its own speed; None: not known yet."""
        done, of = self.weights
        made, passed = done - self.first_weights, time.monotonic() - self.began
        return passed * (of - done) / made if made > 0 else None


class Ledger:
    """All jobs of a farm, by name. earlier: entries of the last report, by name."""

    def __init__(self, jobs: Iterable[Job] = (), earlier: Mapping[str, Mapping] | None = None):
        self.entries: dict[str, Entry] = {}
        self.notes: list[str] = []
        self.cluster: dict[str, Any] = {}
        self.earlier = dict(earlier or {})
        for job in jobs:
            self.add(job)

    def add(self, job: Job) -> None:
        """A new job, and the parts that it is joined of; done before where the last report says so
        of what lies there still.
        """
        entry = self.entries[job.name] = Entry(job)
        known = self.earlier.get(job.name)
        if not (known and _is_done(entry, known)):
            for part in job.pieces():
                self.entries[part.name] = Entry(part)
                entry.parts.append(self.entries[part.name])

    @property
    def wholes(self) -> list[Entry]:
        """Those that are checkpoints, and not parts of one."""
        return [entry for entry in self.entries.values() if not entry.job.number]

    def ready(self) -> list[Job]:
        """Those that wait, and for no part. What joins the parts makes one itself that was lost; a
        refusal is its own, too.
        """
        found = []
        for entry in self.open:
            refused = next((part for part in entry.parts if part.state == REFUSED), None)
            if refused is not None:
                self.end(entry.job, REFUSED, refused.sentence)
            elif entry.state == WAITING and all(part.state in ENDED for part in entry.parts):
                found.append(entry.job)
        return found

    @property
    def open(self) -> list[Entry]:
        """Those that have not ended."""
        return [entry for entry in self.entries.values() if entry.state not in ENDED]

    def count(self, *states: str) -> int:
        """How many checkpoints are in these states."""
        return sum(entry.state in states for entry in self.wholes)

    def take(self, event: Mapping[str, Any]) -> None:
        """An event of a runner."""
        kind = event["event"]
        if kind == "cluster":
            self.cluster = dict(event)
        elif kind == "note":
            self.note(event["sentence"])
        elif kind == "again":  # its driver is gone: all that were running wait once more
            for entry in self.open:
                if entry.state == RUNNING:
                    entry.state = WAITING
        else:
            job = self.entries.get(event.get("job", ""))
            if job is not None and job.state in (WAITING, RUNNING):  # else it comes late
                self._take_of(job, event)

    def _take_of(self, entry: Entry, event: Mapping[str, Any]) -> None:
        """What a worker says of its job. One that cannot be understood ends that job alone."""
        kind, worker = event["event"], event.get("worker")
        if worker and not entry.workers and kind != "started":
            entry.workers.append(worker)  # told sooner than that it began
        try:
            _TAKE[kind](entry, event)
        except (LookupError, TypeError, ValueError) as error:
            entry.state = LOST
            entry.sentence = (
                f"{worker or 'a worker'} says what this Nibble does not understand"
                f" ({type(error).__name__}: {error}); put the same version on all machines"
            )
        entry.seen = time.monotonic() if kind == "alive" or entry.seen else None
        if entry.state == BUSY:
            self.note(f"{entry.sentence} It is looked at again.")

    def miss(self) -> None:
        """Jobs of which nothing was heard for long wait for another worker."""
        for entry in self.open:
            if entry.state == RUNNING and entry.seen is not None:
                if time.monotonic() - entry.seen > SILENT:
                    entry.state, entry.seen = WAITING, None

    def note(self, sentence: str) -> None:
        """Something that the user should know, once."""
        if sentence not in self.notes:
            self.notes.append(sentence)

    def end(self, job: Job, state: str, sentence: str) -> None:
        """A job that cannot be done."""
        entry = self.entries[job.name]
        entry.state, entry.sentence = state, sentence


def stamps(job: Job) -> list[list[int]]:
    """Of a job's source and target."""
    return [stamp(job.source), stamp(job.target)]


def result_of(report: Mapping[str, Any]) -> dict[str, Any]:
    """What a farm keeps of a run's report (`Report` as JSON): sizes in bytes, the median and the
    worst layer's error in dB and what it was measured on (None: no layer has one), seconds of the
    work, notes.
    """
    known = Report.from_json(json.dumps(report))
    db = known.decibels()
    return {
        "architecture": known.architecture,
        "bytes_before": known.bytes_before,
        "bytes_after": known.bytes_after,
        "db": round(statistics.median(db), 2) if db else None,
        "worst_db": db[0] if db else None,
        "errors": [text for _, text in known.errors()],
        "seconds": round(known.seconds, 1),
        "notes": known.notes,
    }


def _is_done(entry: Entry, known: Mapping[str, Any]) -> bool:
    """Fills an entry with that of an earlier report, where it is done and nobody touched it."""
    now, options = stamps(entry.job), list(entry.job.options)
    try:
        if known["state"] not in (DONE, BEFORE) or not all(now):
            return False
        if [known["options"], known["stamps"]] != [options, now]:
            return False
        sizes = [float(known["result"][key]) for key in ("bytes_before", "bytes_after")]
        entry.workers, entry.result = [str(name) for name in known["workers"]], known["result"]
        entry.at, entry.seconds = float(known["at"]), float(known["seconds"])
    except (LookupError, TypeError, ValueError):  # somebody wrote into it
        return False
    entry.state, entry.stamps = BEFORE, now
    return all(sizes)


def _started(entry: Entry, event: Mapping[str, Any]) -> None:
    entry.state, entry.began = RUNNING, time.monotonic()
    entry.workers.append(event["worker"])
    entry.weights, entry.layers, entry.first_weights = (0, 0), (0, 0), 0


def _progress(entry: Entry, event: Mapping[str, Any]) -> None:
    if entry.weights == (0, 0):
        entry.first_weights, entry.began = event["weights"][0], time.monotonic()
    entry.state = RUNNING
    entry.layers, entry.weights = tuple(event["layers"]), tuple(event["weights"])


def _alive(entry: Entry, event: Mapping[str, Any]) -> None:
    entry.state = RUNNING


def _report(entry: Entry, event: Mapping[str, Any]) -> None:
    entry.result = result_of(event["report"])
    entry.at, entry.seconds = event["at"], event["seconds"]
    entry.stamps = stamps(entry.job)
    entry.state = DONE


def _refused(entry: Entry, event: Mapping[str, Any]) -> None:
    busy = event["kind"] == "TargetBusy"
    entry.state, entry.sentence = BUSY if busy else REFUSED, event["sentence"]


def _lost(entry: Entry, event: Mapping[str, Any]) -> None:
    entry.state, entry.sentence = LOST, event["sentence"]


_TAKE = {
    "started": _started,
    "progress": _progress,
    "alive": _alive,
    "report": _report,
    "refused": _refused,
    "lost": _lost,
}
