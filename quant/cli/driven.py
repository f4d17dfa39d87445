"""What `nibble quantize --driven` says to the program that runs it: lines of JSON on stdout.

    {"event": "progress", "layers": [3, 57], "weights": [1207959552, 11901408320], "layer": "..."}
    {"event": "report", "report": {...}, "errors": [["error", "median 27.1 dB, ..."]]}   at the end
    {"event": "refused", "kind": "TargetBusy", "sentence": "..."}                        or this

Layers and weights are those that are done, and all of them. The process ends where its standard
input does: it does not outlive who started it, however that ends, and the next run goes on from the
finished layers.
"""

import json
import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from ..files.report import Report
from ..job.monitor import Monitor

APART = 0.5  # seconds between two lines of progress at least
STOPPED = 130  # as one that was interrupted


def say(event: str, **facts: Any) -> None:
    """A line for the program."""
    print(json.dumps({"event": event, **facts}), flush=True)


@contextmanager
def driven() -> Iterator[Monitor]:
    """The monitor of a driven run. What is refused inside is said before it is raised again."""
    end_with_input()
    lines = _Lines()
    try:
        yield Monitor(progress=lines.progress, layers=lines.layers)
    except (ValueError, OSError) as error:
        say("refused", kind=type(error).__name__, sentence=str(error))
        raise


def say_report(report: Report) -> None:
    """The report, and the errors in it as people read them."""
    say("report", report=json.loads(report.to_json()), errors=report.errors())


def end_with_input() -> None:
    """From now on the process ends where its standard input does."""
    threading.Thread(target=_wait_for_end, daemon=True).start()


def _wait_for_end() -> None:
    # no buffered reader: Python could not end while a thread is in one
    while os.read(sys.stdin.fileno(), 1 << 16):
        pass
    os._exit(STOPPED)


class _Lines:
    """Progress, a line every APART seconds at most."""

    def __init__(self) -> None:
        self._said = 0.0
        self._counted = (0, 0)

    def layers(self, done: int, count: int) -> None:
        self._counted = (done, count)

    def progress(self, done: int, total: int, what: str) -> None:
        now = time.monotonic()
        if now - self._said < APART and done < total:
            return
        self._said = now
        say("progress", layers=self._counted, weights=(done, total), layer=what)
