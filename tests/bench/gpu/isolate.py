"""Work in processes of its own, with time limits: an error on a GPU spoils the process that it
happens in, and a kernel that never ends can only be killed with it.

Processes are forked from one that has imported everything and has not touched the GPU, so that each
starts in a moment. What a job finds it sends at once: a job that is ended keeps what it told.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
import traceback
from collections.abc import Callable, Iterable
from multiprocessing import connection
from typing import NamedTuple

FORK = multiprocessing.get_context("fork")
Receive = Callable[[str, str, object], None]


class Job(NamedTuple):
    """work: called with a `Remote`; seconds: after so many the process is killed."""

    name: str
    work: Callable[[Remote], None]
    seconds: float


class Remote:
    """Where a job tells what it found: rows, and facts."""

    def __init__(self, pipe: connection.Connection, seconds: float):
        self.pipe, self.deadline = pipe, time.perf_counter() + seconds
        self.rows: list[dict] = []

    def add(self, row: dict) -> None:
        self.rows.append(row)
        self.pipe.send(("row", row))

    def set(self, **facts: object) -> None:
        self.pipe.send(("facts", facts))

    def left(self) -> float:
        return self.deadline - time.perf_counter()

    def late(self) -> bool:
        """Whether the time is nearly used up: what is left is skipped, and the file says so."""
        if self.left() > 1:
            return False
        self.set(cut_off=True)
        return True


class _Running(NamedTuple):
    job: Job
    process: multiprocessing.process.BaseProcess
    pipe: connection.Connection
    deadline: float


def _inside(job: Job, pipe: connection.Connection) -> None:
    os.setsid()  # programs that it starts are ended with it
    try:
        job.work(Remote(pipe, job.seconds))
        pipe.send(("state", "finished"))
    except BaseException as error:
        traceback.print_exc()
        pipe.send(("state", f"{type(error).__name__}: {error}".splitlines()[0]))
    finally:
        pipe.close()
    os._exit(0)  # a spoiled context makes leaving in order take long, or fail


def _start(job: Job) -> _Running:
    receiving, sending = FORK.Pipe(duplex=False)
    process = FORK.Process(target=_inside, args=(job, sending), daemon=True)
    process.start()
    sending.close()
    return _Running(job, process, receiving, time.perf_counter() + job.seconds)


def _heard(running: _Running, receive: Receive) -> str | None:
    """Hands on what a job has sent so far; its state, once it has told one."""
    try:
        while running.pipe.poll():
            kind, value = running.pipe.recv()
            if kind == "state":
                return value
            receive(running.job.name, kind, value)
    except (EOFError, OSError):
        pass
    return None


def _end(running: _Running) -> None:
    try:
        os.killpg(running.process.pid, signal.SIGKILL)
    except ProcessLookupError:
        running.process.kill()
    running.process.join(5)


def _state(running: _Running, receive: Receive) -> str | None:
    """How a job ended; None while it runs."""
    alive = running.process.is_alive()  # asked first: what it sent before it ended is heard
    told = _heard(running, receive)
    if told is not None:
        running.process.join(5)
        return told
    if not alive:
        code = running.process.exitcode
        return f"ended by {signal.Signals(-code).name}" if code < 0 else f"ended with code {code}"
    if time.perf_counter() > running.deadline:
        _end(running)
        _heard(running, receive)
        return f"took longer than {running.job.seconds:.0f} s and was ended"
    return None


def run(jobs: Iterable[Job], receive: Receive, at_once: int = 1) -> dict[str, str]:
    """Runs the jobs, so many side by side, and returns how each ended: "finished", or in words.
    receive: called with a job's name, "row" or "facts", and what was told.
    """
    waiting, running, states = list(jobs), [], {}
    while waiting or running:
        while waiting and len(running) < at_once:
            running.append(_start(waiting.pop(0)))
        connection.wait([here.pipe for here in running], timeout=0.05)
        for here in list(running):
            state = _state(here, receive)
            if state is not None:
                states[here.job.name] = state
                here.pipe.close()
                running.remove(here)
    return states
