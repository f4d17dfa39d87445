"""Several layers at once on a CPU, one thread each.

A layer is many small operations. Two threads inside each of them wait for one another at every
end, and where another program keeps a core busy they wait most of the time; layers side by side
share nothing and wait for nothing. A layer's bytes do not depend on how many are made beside it.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from typing import TypeVar

import torch

from ...kernels.optional import optional

BYTES_PER_WEIGHT = 48
"""What a layer's work takes in memory, float32 matrices and their like: 43 in FLUX.1's largest."""
SHARE = 0.6
"""Of the free memory, for all of them."""
WITHOUT_A_FIGURE = 2
"""Layers at once where free memory is not known."""
HEED = 0.2
"""Seconds between two looks at whether the user pressed Stop; a layer may take a minute."""

T = TypeVar("T")
R = TypeVar("R")


def at_once(largest: int) -> int:
    """How many layers of up to `largest` weights this machine works on at once."""
    threads = torch.get_num_threads()
    psutil, _ = optional("psutil")
    if psutil is None:
        return min(threads, WITHOUT_A_FIGURE)
    room = SHARE * psutil.virtual_memory().available
    return max(1, min(threads, int(room // (BYTES_PER_WEIGHT * max(1, largest)))))


def side_by_side(
    work: Callable[[T], R], items: Iterable[T], count: int, heed: Callable[[], None] = lambda: None
) -> Iterator[R]:
    """The results of `work`, as they come, with `count` items at once and the next one at hand, so
    that none waits for its bytes; no more are held. heed: called every HEED seconds while items are
    under way; raises to stop. Whatever ends the loop waits for those under way.
    """
    threads = torch.get_num_threads()
    inference = torch.is_inference_mode_enabled()

    def alone() -> None:
        torch.set_num_threads(1)  # of this thread

    def run(item: T) -> R:
        with torch.inference_mode(inference):
            return work(item)

    waiting = iter(items)
    pool = ThreadPoolExecutor(count, "nibble", initializer=alone)
    try:
        running: set[Future[R]] = set()
        while True:
            for item in itertools.islice(waiting, count + 1 - len(running)):
                running.add(pool.submit(run, item))
            if not running:
                return
            done, running = wait(running, HEED, FIRST_COMPLETED)
            if not done:
                heed()
            for future in done:
                yield future.result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
        torch.set_num_threads(threads)  # also what threads that start later get
