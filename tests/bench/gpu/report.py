"""The JSON file of a GPU run, written as it grows: a run that is cut off keeps what it has."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path


class Report:
    """One section of the file. Sections are written one after another, by one process."""

    def __init__(self, path: Path, section: str):
        self.path, self.section, self.started = path, section, time.perf_counter()
        self.facts: dict = {"state": "running", "rows": []}
        self.written = 0.0
        self.save(at_once=True)

    def receive(self, job: str, kind: str, value: dict) -> None:
        """What `isolate.run` hands on from a job."""
        if kind == "row":
            self.add(value)
        else:
            self.set(**value)

    def add(self, row: dict) -> None:
        """One more measurement, printed in one line."""
        self.facts["rows"].append(row)
        words = [f"{k}={_short(v)}" for k, v in row.items() if not isinstance(v, dict)]
        print(f"[{self.section}]", "  ".join(words), flush=True)
        self.save()

    def set(self, **facts: object) -> None:
        self.facts |= facts
        self.save(at_once="state" in facts)

    def save(self, at_once: bool = False) -> None:
        """Writes the file, twice a second at most: it grows, and is written whole."""
        now = time.perf_counter()
        if at_once or now > self.written + 0.5:
            self.written = now
            self.facts["seconds"] = round(now - self.started, 1)
            write(self.path, self.section, self.facts)


def write(path: Path, section: str, facts: object) -> None:
    """Replaces one section of the file; the old file stays whole until the new one is."""
    whole = read(path) | {section: facts}
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(whole, indent=1) + "\n", encoding="utf-8")
    os.replace(partial, path)


def read(path: Path) -> dict:
    """The file, or nothing."""
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def _short(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
