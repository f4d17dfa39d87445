"""A folder that is watched: models are taken when they have come, and lie still."""

from __future__ import annotations

import time
from pathlib import Path

from .jobs import Job, Order, models_in, stamp

EVERY = 10.0  # seconds between two looks into the folder


class Watch:
    """Gives jobs for models that were not there, or not whole, at the last look. A file is whole
    when two looks find it unchanged; one that changes later, as a copy that had stalled, is given
    again.
    """

    def __init__(self, order: Order, every: float = EVERY):
        self.order, self.every = order, every
        self._seen: dict[Path, list[int]] = {}
        self._taken: dict[Path, list[int]] = {}
        self._next = 0.0

    def __call__(self) -> list[Job]:
        """Jobs that have come."""
        if time.monotonic() < self._next:
            return []
        self._next = time.monotonic() + self.every
        found = {path: stamp(path) for path in models_in(self.order.folder)}
        still = [
            path
            for path, now in found.items()
            if now and self._seen.get(path) == now != self._taken.get(path)
        ]
        self._seen = found
        self._taken |= {path: found[path] for path in still}
        return [job for path in still for job in self.order.jobs_of(path)]
