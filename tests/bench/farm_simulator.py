"""A farm of many machines, event by event: workers that take the next checkpoint of a list, read
and write one shared storage, die and come back, under a head that may be started again.

What a checkpoint costs: the program's start, what is read before any layer (the fingerprint's
samples; the whole source where it is measured on noise), then part by part a read, the computing
and a write. The storage gives every transfer the same share of what it
has, and none more than a machine's link takes (egalitarian processor sharing; Kleinrock, Queueing
Systems II, 1976, section 4.4). It is exact: nothing moves in steps of time.

A death takes the layer that was being worked on or written; the journal has the ones before it.
Whoever goes on starts the program and reads once more what comes before the layers.
"""

from __future__ import annotations

import heapq
import itertools
import math
import random
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Job:
    """A checkpoint: bytes of the source, bytes of the target, seconds of computing, layers; first:
    bytes read before the layers.
    """

    read: float
    write: float
    compute: float
    layers: int = 1
    first: float = 0.0

    @property
    def bytes(self) -> float:
        return self.first + self.read + self.write


@dataclass(frozen=True)
class Farm:
    """workers: machines; storage, link: bytes a second of the shared storage, and of one machine;
    start: seconds until the program reads; dispatch: seconds of the driver for each job, one after
    another; parts: pieces in which a job alternates between reading, computing and writing.

    mtbf: mean seconds until a worker dies (exponential, from its joining on); deaths: (second,
    worker), for known answers; rejoin: seconds until it is back. heads: seconds at which the head
    is started again, away: until its workers are back.
    """

    workers: int
    storage: float = math.inf
    link: float = math.inf
    start: float = 0.0
    dispatch: float = 0.0
    parts: int = 8
    mtbf: float = math.inf
    deaths: tuple[tuple[float, int], ...] = ()
    rejoin: float = 0.0
    heads: tuple[float, ...] = ()
    away: float = 0.0
    seed: int = 0


@dataclass
class Outcome:
    """makespan: seconds; moved: bytes; peak: most bytes a second; full: seconds in which the
    storage gave all it had; starts: of the program; deaths: of workers with a job.
    """

    makespan: float
    moved: float
    peak: float
    full: float
    starts: int
    deaths: int


class Storage:
    """Transfers that share a bandwidth equally."""

    def __init__(self, capacity: float, link: float):
        self.capacity, self.link = capacity, link
        self.now = self.served = self.moved = self.peak = self.full = 0.0
        self._ends: dict[int, float] = {}  # key → what `served` is when its transfer is through
        self._heap: list[tuple[float, int]] = []

    def rate(self) -> float:
        """Bytes a second of each transfer."""
        return min(self.link, self.capacity / len(self._ends)) if self._ends else 0.0

    def advance(self, now: float) -> None:
        """Lets the transfers go on until then."""
        seconds, rate, count = now - self.now, self.rate(), len(self._ends)
        if seconds > 0 and count:
            self.served += rate * seconds
            self.peak = max(self.peak, count * rate)
            self.full += seconds * (count * self.link >= self.capacity)
        self.now = now

    def add(self, key: int, amount: float) -> None:
        self._ends[key] = self.served + amount
        self.moved += amount
        heapq.heappush(self._heap, (self._ends[key], key))

    def drop(self, key: int) -> None:
        """Ends a transfer, through or not."""
        self.moved -= max(0.0, self._ends.pop(key, 0.0) - self.served)

    def next_end(self) -> tuple[float, int]:
        """When the first transfer is through, and whose it is; infinity where there is none."""
        while self._heap and self._ends.get(self._heap[0][1]) != self._heap[0][0]:
            heapq.heappop(self._heap)
        if not self._heap:
            return math.inf, -1
        end, key = self._heap[0]
        return self.now + max(0.0, end - self.served) / self.rate(), key


@dataclass
class _Running:
    job: Job
    done: int = 0  # layers in the journal, those of the part in work not counted
    steps: Iterator[tuple[str, float]] = field(default_factory=lambda: iter(()))
    kind: str = ""  # of the step: read, compute, write
    since: float = 0.0  # when it began
    layers: int = 0  # of the part

    def kept(self, now: float) -> int:
        """Layers of the part that a death leaves in the journal."""
        if self.kind == "write":
            return self.layers - 1
        if self.kind != "compute" or not self.job.compute:
            return 0
        each = self.job.compute / self.job.layers
        return min(self.layers - 1, int((now - self.since) / each))


class Simulation:
    """One run of a list of jobs; `run` gives its Outcome."""

    def __init__(self, farm: Farm, jobs: list[Job]):
        self.farm, self.storage = farm, Storage(farm.storage, farm.link)
        self.queue = deque(map(_Running, jobs))
        self.left = len(jobs)
        self.now = self.driver_free = 0.0
        self.starts = self.deaths = 0
        self._count = itertools.count()
        self._random = random.Random(farm.seed)
        self._timers: list[tuple[float, int, str, int, int]] = []
        self._running: list[_Running | None] = [None] * farm.workers
        self._idle: list[int] = []
        self._life = [0] * farm.workers  # timers of an earlier life, or step, are void
        self._step = [0] * farm.workers

    def run(self) -> Outcome:
        for worker in range(self.farm.workers):
            self._join(worker)
        for when, worker in self.farm.deaths:
            self._timer(when, "dies", worker, -1)
        for when in self.farm.heads:
            self._timer(when, "head", -1, -1)
        while self.left:
            end, key = self.storage.next_end()
            if self._timers and self._timers[0][0] <= end:
                when, _, kind, worker, mark = heapq.heappop(self._timers)
                self._advance(when)
                self._on_timer(kind, worker, mark)
            else:
                self._advance(end)
                self._next_step(key)
        storage = self.storage
        return Outcome(
            self.now, storage.moved, storage.peak, storage.full, self.starts, self.deaths
        )

    def _advance(self, when: float) -> None:
        if when == math.inf:
            raise ValueError("nothing is left to happen, and jobs are not done")
        self.storage.advance(when)
        self.now = when

    def _timer(self, when: float, kind: str, worker: int, mark: int) -> None:
        heapq.heappush(self._timers, (when, next(self._count), kind, worker, mark))

    def _on_timer(self, kind: str, worker: int, mark: int) -> None:
        if kind == "head":
            for each in range(self.farm.workers):
                self._leave(each, self.farm.away)
            return
        if kind == "dies" and mark in (-1, self._life[worker]):
            self.deaths += self._running[worker] is not None
            self._leave(worker, self.farm.rejoin)
            if self.queue and self._idle:
                self._take(self._idle.pop(0))
        elif kind == "joins" and mark == self._life[worker]:
            self._join(worker)
        elif kind == "step" and mark == self._step[worker]:
            self._next_step(worker)

    def _join(self, worker: int) -> None:
        if self.farm.mtbf < math.inf:
            after = self._random.expovariate(1 / self.farm.mtbf)
            self._timer(self.now + after, "dies", worker, self._life[worker])
        self._take(worker)

    def _leave(self, worker: int, away: float) -> None:
        """The worker dies; its job is the next that anyone takes."""
        running = self._running[worker]
        self.storage.drop(worker)
        self._life[worker] += 1
        self._step[worker] += 1
        self._running[worker] = None
        if worker in self._idle:
            self._idle.remove(worker)
        if running is not None:
            running.done += running.kept(self.now)
            self.queue.appendleft(running)
        self._timer(self.now + away, "joins", worker, self._life[worker])

    def _take(self, worker: int) -> None:
        """The next job of the list, or idle."""
        if not self.queue:
            self._idle.append(worker)
            return
        running = self._running[worker] = self.queue.popleft()
        running.steps = self._steps(running)
        running.kind = "start"
        self.starts += 1
        self.driver_free = max(self.driver_free, self.now) + self.farm.dispatch
        self._wait(worker, self.driver_free - self.now + self.farm.start)

    def _steps(self, running: _Running) -> Iterator[tuple[str, float]]:
        job = running.job
        yield "read", job.first
        size = math.ceil(job.layers / self.farm.parts)
        while running.done < job.layers:
            running.layers = min(size, job.layers - running.done)
            share = running.layers / job.layers
            yield "read", job.read * share
            yield "compute", job.compute * share
            yield "write", job.write * share
            running.done += running.layers

    def _wait(self, worker: int, seconds: float) -> None:
        self._step[worker] += 1
        self._timer(self.now + seconds, "step", worker, self._step[worker])

    def _next_step(self, worker: int) -> None:
        running = self._running[worker]
        assert running is not None
        self.storage.drop(worker)
        running.kind, amount = next(running.steps, ("done", 0.0))
        running.since = self.now
        if running.kind == "done":
            self._running[worker] = None
            self.left -= 1
            self._take(worker)
        elif running.kind == "compute":
            self._wait(worker, amount)
        else:
            self.storage.add(worker, amount)
