"""A runner without a cluster: one job after another, on this machine, by the same command line."""

from __future__ import annotations

import queue
import subprocess
import threading
from collections.abc import Mapping
from typing import Any

from . import work


class InOrder:
    """Runs jobs as they are submitted. Events are those of `ray_driver.py`."""

    def __init__(self) -> None:
        self._jobs: queue.SimpleQueue[dict | None] = queue.SimpleQueue()
        self._events: queue.SimpleQueue[dict] = queue.SimpleQueue()
        self._process: subprocess.Popen | None = None
        self._stopped = False
        self._thread = threading.Thread(target=self._work, daemon=True)
        self._thread.start()

    def submit(self, job: Mapping[str, Any]) -> None:
        """job: as `work.run` takes it, and its `id`. It may have all threads of this machine where
        the user did not say how many.
        """
        self._jobs.put({**job, "threads": job["threads"] if job["asked"] else None})

    def poll(self, seconds: float) -> list[dict]:
        """What has happened, waiting for the first of it."""
        events = []
        try:
            events.append(self._events.get(timeout=seconds))
            while True:
                events.append(self._events.get_nowait())
        except queue.Empty:
            return events

    def close(self) -> None:
        """Ends, with the job that is under way: the next run goes on from its layers."""
        self._stopped = True
        self._jobs.put(None)
        if self._process is not None:
            self._process.kill()
        self._thread.join()

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None and not self._stopped:
            self._try(job, {"job": job["id"], "worker": work.name()})

    def _try(self, job: dict, facts: dict) -> None:
        self._events.put({"event": "started", **facts})
        for tries_left in range(job["needs"]["retries"], -1, -1):
            try:
                ended = work.run(job, lambda event: self._events.put(event | facts), self._hold)
                self._events.put(ended | facts)
                return
            except ChildProcessError as error:
                if self._stopped:
                    return
                if not tries_left:
                    self._events.put({"event": "lost", "sentence": str(error), **facts})
            except Exception as error:  # whatever it is, the next job is worked on
                said = f"{type(error).__name__}: {error}"
                self._events.put({"event": "lost", "sentence": said, **facts})
                return

    def _hold(self, process: subprocess.Popen) -> None:
        self._process = process
        if self._stopped:
            process.kill()
