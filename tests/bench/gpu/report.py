"""The JSON file of a GPU run, written after every step: a run that is cut off keeps what it has."""

from __future__ import annotations

import json
import math
import os
import time
from pathlib import Path


class Report:
    """One section of the file. Sections are written by processes that follow one another, never at
    once.
    """

    def __init__(self, path: Path, section: str, seconds: float = math.inf):
        self.path, self.section, self.deadline = path, section, time.perf_counter() + seconds
        self.facts: dict = {"state": "running", "rows": []}
        self.started = time.perf_counter()

    def late(self) -> bool:
        """Whether the section's time is used up: what is left is skipped, and the file says so."""
        if time.perf_counter() > self.deadline:
            self.facts["cut_off"] = True
            return True
        return False

    def add(self, row: dict) -> None:
        """One more measurement, on disk at once and printed in one line."""
        self.facts["rows"].append(row)
        print(
            f"[{self.section}] "
            + "  ".join(
                f"{key}={_short(value)}"
                for key, value in row.items()
                if not isinstance(value, dict)
            ),
            flush=True,
        )
        self.save()

    def set(self, **facts: object) -> None:
        self.facts |= facts
        self.save()

    def save(self) -> None:
        self.facts["seconds"] = round(time.perf_counter() - self.started, 1)
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
