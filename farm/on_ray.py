"""A runner over a Ray cluster, by a driver (ray_driver.py) that is a process of its own.

Ray ends a driver whose cluster's head is gone. Then another driver is started, which looks for the
cluster until `patience` is over, and gets all jobs that had not ended; each goes on from the layers
that are in its target's journal.
"""

from __future__ import annotations

import collections
import contextlib
import importlib.util
import json
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .ray_driver import LOST_CLUSTER, NO_CLUSTER
from .run import ClusterRefused

DRIVER = Path(__file__).with_name("ray_driver.py")
FIRST = 20.0  # seconds that a cluster has to answer at first
CONNECTING = 60.0  # seconds that a driver may take beside its patience, Ray's start included
ENDS = ("report", "refused", "lost")
DRIVERS = 20  # that may die one after the other without a job that ends


def is_installed() -> bool:
    """Whether there is a Ray here; it is not imported."""
    return importlib.util.find_spec("ray") is not None


class OnRay:
    """Jobs to a cluster, events back. address: as `ray.init` takes it, or "local"."""

    def __init__(self, address: str = "local", patience: float = 600.0):
        self.address, self.patience = address, patience
        self._open: dict[str, dict] = {}
        self._events: queue.SimpleQueue[dict | None] = queue.SimpleQueue()
        self._said: collections.deque[str]
        self._connected = False
        self._died = 0  # drivers since a job ended
        self._lines: queue.SimpleQueue[str | None]
        self._until: float | None = None  # when a driver must have a cluster
        self._start(FIRST)

    def submit(self, job: Mapping[str, Any]) -> None:
        """job: as `work.run` takes it, with its `id` and `needs`."""
        self._open[job["id"]] = dict(job)
        self._send(self._open[job["id"]])

    def poll(self, seconds: float) -> list[dict]:
        """What has happened, waiting for the first of it. Raises ClusterRefused where there is no
        cluster at the address, or none has come back.
        """
        events: list[dict] = []
        if self._until is not None and time.monotonic() > self._until:
            self._process.kill()
        try:
            while True:
                event = self._events.get(timeout=0 if events else seconds)
                events += self._again() if event is None else self._known(event)
        except queue.Empty:
            return events

    def close(self) -> None:
        """Ends the driver; what its workers were at goes on from its layers the next time."""
        self._lines.put(None)
        try:
            self._process.wait(30)
        except subprocess.TimeoutExpired:
            self._process.kill()
        self._process.wait()

    def _known(self, event: dict) -> list[dict]:
        if event["event"] == "cluster":
            self._connected, self._until = True, None
        if event["event"] in ENDS:
            self._died = 0
            self._open.pop(event["job"], None)
        if event["event"] == "nowhere":
            return [{"event": "note", "sentence": _nowhere(event["needs"])}]
        return [event]

    def _again(self) -> list[dict]:
        """The driver has ended: another one, with all jobs that are open."""
        code = self._process.wait()
        self._hearing.join(1)
        said = next((line.strip() for line in reversed(self._said) if line.strip()), "")
        gone = self._until is not None and time.monotonic() > self._until
        self._died += 1
        if not self._connected or gone or code == NO_CLUSTER or self._died > DRIVERS:
            raise ClusterRefused(
                f"There is no Ray cluster at {self.address}, or none that answers ({said}); start"
                " one (docs/farm.md), or leave --address out to work on this machine."
            )
        self._start(self.patience)
        for job in self._open.values():
            self._send(job)
        why = f" ({said})" if said and code != LOST_CLUSTER else ""
        note = f"the cluster was lost{why} and is looked for again; jobs go on where they were"
        return [{"event": "again"}, {"event": "note", "sentence": note}]

    def _start(self, patience: float) -> None:
        self._until = time.monotonic() + patience + CONNECTING
        self._process = subprocess.Popen(
            [sys.executable, str(DRIVER), self.address, str(patience)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            encoding="utf-8",
            errors="replace",
            start_new_session=True,  # Ctrl-C is for the farm, which ends it
        )
        self._lines = queue.SimpleQueue()
        pair = (self._process, self._lines)
        threading.Thread(target=_write, args=pair, daemon=True).start()
        threading.Thread(target=self._listen, args=(self._process,), daemon=True).start()
        self._said = collections.deque(maxlen=20)
        extend = self._said.extend
        self._hearing = threading.Thread(target=extend, args=(self._process.stderr,), daemon=True)
        self._hearing.start()

    def _listen(self, process: subprocess.Popen) -> None:
        assert process.stdout is not None
        for line in process.stdout:
            with contextlib.suppress(ValueError):  # half a line: it was killed
                self._events.put(json.loads(line))
        self._events.put(None)

    def _send(self, job: dict) -> None:
        self._lines.put(json.dumps(job) + "\n")


def _write(process: subprocess.Popen, lines: queue.SimpleQueue) -> None:
    """Lines to a driver's input, until None, which closes it: a thread of its own, for a driver
    that looks for its cluster reads nothing.
    """
    assert process.stdin is not None
    with contextlib.suppress(OSError), process.stdin:  # it is gone, which `poll` will find
        for line in iter(lines.get, None):
            process.stdin.write(line)
            process.stdin.flush()


def _nowhere(needs: Mapping[str, Any]) -> str:
    cores = "1 core" if needs["cpus"] == 1 else f"{needs['cpus']:g} cores"
    wants = [cores, f"{needs['memory'] / 1e9:.1f} GB of memory"]
    if needs["gpus"]:
        wants.append(f"{needs['gpus']:g} GPU")
    return (
        f"no machine of the cluster has {', '.join(wants)}; such jobs wait for one, or say less in"
        " the jobs file (worker: cpus, gpus, memory)"
    )
