"""What a farm shows while it works: a live table in a terminal, lines where it is written to a
file, JSON for a program.
"""

from __future__ import annotations

import json
import shutil
import sys
import time
import unicodedata
from typing import Any, TextIO

from ..quant.files.memory.switches import duration, gigabytes
from .ledger import BEFORE, BUSY, DONE, ENDED, FAILED, RUNNING, Entry, Ledger
from .report import headline

NAME, WORKER = 40, 24  # characters of a column at most
APART = 1.0  # seconds between two tables at least


class Table:
    """Jobs at work, each with its worker, layer and time left; and the count of all."""

    def __init__(self, ledger: Ledger, out: TextIO | None = None):
        self.ledger, self.out = ledger, out or sys.stdout
        self._drawn = 0  # lines
        self._at = 0.0
        self._told: set[str] = set()
        self._noted = 0

    def __call__(self) -> None:
        """Shows what has changed."""
        lines = self._news()
        live = self.out.isatty()
        due = time.monotonic() - self._at >= APART
        if not lines and not (live and due):
            return
        if live and self._drawn:
            self.out.write(f"\x1b[{self._drawn}F\x1b[J")  # up to its first line, all below erased
        for line in lines:
            print(plain(line), file=self.out)
        if live:
            columns, height = shutil.get_terminal_size()
            table = [cut(plain(line), columns - 1) for line in self.lines()]
            if len(table) > height - 2:  # the last line counts all of them
                left = len(table) - (height - 3)
                table = [*table[: height - 4], f"and {left} more", table[-1]]
            self.out.write("".join(line + "\n" for line in table))
            self._drawn, self._at = len(table), time.monotonic()
        self.out.flush()

    def lines(self) -> list[str]:
        """The table."""
        at_work = [each for each in self.ledger.entries.values() if each.state in (RUNNING, BUSY)]
        rows = [_cells(entry) for entry in at_work]
        widths = [max((len(row[column]) for row in rows), default=0) for column in (0, 1)]
        lines = [f"{a:<{widths[0]}}  {b:<{widths[1]}}  {c}" for a, b, c in rows]
        return [*lines, f"{headline(self.ledger)}{_left(self.ledger)}"]

    def _news(self) -> list[str]:
        """Notes that are new, and jobs that have ended since the last look."""
        notes, self._noted = self.ledger.notes[self._noted :], len(self.ledger.notes)
        lines = [f"note: {note}" for note in notes]
        for name, entry in self.ledger.entries.items():
            if entry.state in ENDED and name not in self._told:
                self._told.add(name)
                if entry.state != BEFORE and not entry.job.number:
                    lines.append(ended(entry))
        return lines


class Lines:
    """The same for a program: a line of JSON a second, {"event": "farm", ...}."""

    def __init__(self, ledger: Ledger, out: TextIO | None = None):
        self.ledger, self.out = ledger, out or sys.stdout
        self._last: dict[str, Any] = {}
        self._at = 0.0

    def __call__(self) -> None:
        """Says where the farm stands, where that has changed."""
        now, state = time.monotonic(), self.state()
        if state == self._last or (now - self._at < APART and self.ledger.open):
            return
        self._last, self._at = state, now
        print(json.dumps(state), file=self.out, flush=True)

    def state(self) -> dict[str, Any]:
        """Counts, jobs at work, notes, and of each job that ended, how."""
        entries = self.ledger.entries.values()
        return {
            "event": "farm",
            "jobs": len(self.ledger.wholes),
            "made": self.ledger.count(DONE, BEFORE),
            "failed": self.ledger.count(*FAILED),
            "running": [
                {"job": each.job.name, "worker": each.workers[-1], "layers": list(each.layers)}
                for each in entries
                if each.state == RUNNING
            ],
            "weights": [sum(each.weights[i] for each in entries) for i in (0, 1)],
            "notes": list(self.ledger.notes),  # of now: it is compared with the next state
            "ended": {
                each.job.name: each.sentence or each.state
                for each in entries
                if each.state in ENDED
            },
        }


def plain(line: str) -> str:
    """A line without what a terminal would obey: file names may hold anything."""
    return "".join(letter if letter.isprintable() else "?" for letter in line)


def cut(line: str, columns: int) -> str:
    """As much of a line as a terminal shows in so many columns; letters of Chinese take two."""
    for place, letter in enumerate(line):
        columns -= 2 if unicodedata.east_asian_width(letter) in "WF" else 1
        if columns < 0:
            return line[:place]
    return line


def ended(entry: Entry) -> str:
    """'made  a-svdq.safetensors  23.8 GB → 6.59 GB  27.1 dB  13 minutes  node1-ab12'."""
    if entry.state in FAILED:
        return f"{entry.state}  {entry.job.name}: {entry.sentence}"
    result = entry.result
    sizes = " → ".join(gigabytes(result[key]) for key in ("bytes_before", "bytes_after"))
    db = "" if result["db"] is None else f"  {result['db']:.1f} dB"
    return f"made  {entry.job.name}  {sizes}{db}  {duration(entry.seconds)}  {entry.workers[-1]}"


def _cells(entry: Entry) -> tuple[str, str, str]:
    name = entry.job.name
    name = name if len(name) <= NAME else "…" + name[1 - NAME :]
    worker = entry.workers[-1] if entry.workers else ""
    if entry.state == BUSY:
        what = "another run is writing it; looked at again soon"
    elif entry.layers[1]:
        what = f"layer {entry.layers[0]} of {entry.layers[1]}"
        if entry.left is not None:
            what += f", {duration(entry.left)} left"
    else:
        what = "reading and measuring"
    return name, worker[:WORKER], what


def _left(ledger: Ledger) -> str:
    """How long all will take, by what was made so far, once something was."""
    made = [entry.seconds for entry in ledger.entries.values() if entry.state == DONE]
    running = sum(entry.state == RUNNING for entry in ledger.entries.values())
    if not made or not running or not ledger.open:
        return ""
    seconds = sum(made) / len(made) * len(ledger.open) / running
    return f"; about {duration(seconds)} left"
