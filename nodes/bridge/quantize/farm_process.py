"""A farm as a process: the command line of this pack, its lines, and its end.

    python PACK farm JOBS.json --lines [--in-order | --address ADDRESS]

The farm ends where its standard input does, with all that it started. So it does not outlive Stop,
nor ComfyUI; what is done stays in the target's journal, and the next run goes on from there.
"""

from __future__ import annotations

import collections
import json
import queue
import re
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ....farm.ledger import BEFORE, DONE
from ....farm.run import PACK

LAST_WORDS = 200  # lines of what it said that are kept, for a traceback
LOOK = 0.1  # seconds between two looks at Stop
ENDING = 5.0  # seconds that it has to end by itself
_NAME = "nibble: "  # before a sentence for people on stderr
# what the command line calls a way out, and what the node calls it
_WAYS = (
    ("add --overwrite", "switch 'overwrite' on"),
    ("(docs/farm.md)", "(the help of this node says how)"),
    ("leave --address out to work on this machine", "choose 'this machine'"),
    ("add --memory-cap 0 to all of them", "add --memory-cap 0 to 'options'"),
    ("in the jobs file: worker: pack", "in nibble-farm.json as pack"),
    ("in the jobs file (worker: ", "in 'worker' ("),
)
_OPTION = re.compile(r"--(overwrite|method|preset)\b")


def command(jobs: Path, address: str) -> list[str]:
    """The command line of a farm of these jobs. address: of a Ray cluster; "": this machine,
    without one.
    """
    where = ["--address", address] if address else ["--in-order"]
    return [sys.executable, str(PACK), "farm", str(jobs), "--lines", *where]


def report_of(jobs: Path) -> Path:
    """The farm's report on these jobs, without its ending."""
    return jobs.with_name(f"{jobs.stem}-farm")


def run(
    words: list[str], hear: Callable[[Mapping[str, Any]], None], heed: Callable[[], None]
) -> None:
    """Runs a farm of one job until that is made. hear: gets each of its lines; heed: called ten
    times a second, raises where the user pressed Stop. Raises ValueError, which says why the file
    was not made, and what to do.
    """
    process = subprocess.Popen(
        words,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        encoding="utf-8",
        errors="replace",
        start_new_session=True,  # Ctrl-C is for ComfyUI, which ends it
    )
    said: collections.deque[str] = collections.deque(maxlen=LAST_WORDS)
    events: queue.SimpleQueue[dict | None] = queue.SimpleQueue()
    readers = [
        threading.Thread(target=_read, args=(process.stdout, events), daemon=True),
        threading.Thread(target=said.extend, args=(process.stderr,), daemon=True),
    ]
    for reader in readers:
        reader.start()
    last: dict = {}
    try:
        while (event := _next(events, heed)) is not None:
            last = event
            hear(event)
    finally:
        _end(process)
        for reader in readers:
            reader.join(ENDING)
    _check(process.returncode, last, "".join(said))


def in_node(sentence: str) -> str:
    """A sentence of the command line as the node says it: its widgets in place of options."""
    for typed, way in _WAYS:
        sentence = sentence.replace(typed, way)
    return _OPTION.sub(r"'\1'", sentence)


def _read(lines, events: queue.SimpleQueue) -> None:
    for line in lines:
        try:
            event = json.loads(line)
        except ValueError:  # a package that prints
            continue
        if isinstance(event, dict) and event.get("event") == "farm":
            events.put(event)
    events.put(None)


def _next(events: queue.SimpleQueue, heed: Callable[[], None]) -> dict | None:
    """The next line of the farm; None once it has ended."""
    while True:
        heed()
        try:
            return events.get(timeout=LOOK)
        except queue.Empty:
            continue


def _end(process: subprocess.Popen) -> None:
    """Ends it, with all that it started."""
    assert process.stdin is not None
    try:
        process.stdin.close()
        process.wait(ENDING)
    except (OSError, subprocess.TimeoutExpired):
        process.kill()
        process.wait()


def _check(code: int, last: Mapping[str, Any], said: str) -> None:
    """Raises ValueError unless the job was made."""
    if code == 0:
        return
    refused = [text for text in last.get("ended", {}).values() if text not in (DONE, BEFORE)]
    if refused:  # the whole file's before those of its parts
        raise ValueError(in_node(refused[0]))
    _, name, sentence = f"\n{said}".rpartition(f"\n{_NAME}")
    if code == 1 and name:
        raise ValueError(in_node(sentence.strip()))
    end = said.strip().splitlines()
    raise ValueError(
        f"The farm ended with code {code} ({end[-1] if end else 'without a word'}); Run goes on"
        " from its finished layers."
    )
