"""Several layers at once: every result, one more held than are worked on, threads put back."""

import threading
import time

import pytest
import torch

from nibble.quant.job import side_by_side
from nibble.quant.job.side_by_side import at_once


class Memory:
    """A stand-in for psutil."""

    def __init__(self, available: int):
        self.available = available

    def virtual_memory(self) -> "Memory":
        return self


def run(work, items, count):
    return list(side_by_side.side_by_side(work, items, count))


def test_every_item_comes_back_once():
    assert sorted(run(lambda item: item * item, range(20), 3)) == [i * i for i in range(20)]
    assert run(lambda item: item, [], 2) == []


def test_one_item_is_at_hand_beside_those_worked_on():
    asked, done = [], []

    def items():
        for item in range(6):
            asked.append(item)
            assert len(asked) - len(done) <= 3
            yield item

    def work(item):
        time.sleep(0.01)
        return item

    for item in side_by_side.side_by_side(work, items(), 2):
        done.append(item)
    assert len(done) == 6


def test_each_works_in_one_thread_of_its_own_and_the_others_keep_theirs():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with torch.inference_mode():
            seen = run(
                lambda item: (
                    torch.get_num_threads(),
                    torch.is_inference_mode_enabled(),
                    threading.current_thread() is threading.main_thread(),
                ),
                range(4),
                2,
            )
        assert set(seen) == {(1, True, False)}
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_a_failure_ends_the_work_and_nothing_runs_on():
    running = []

    def work(item):
        running.append(item)
        if item == 1:
            raise ValueError("no")
        time.sleep(0.05)
        running.remove(item)

    with pytest.raises(ValueError, match="no"):
        run(work, range(10), 2)
    assert running == [1]


def test_a_stop_is_heeded_while_an_item_is_worked_on():
    """An item of a large model takes a minute: it is not waited for before Stop is told."""
    begun, told = threading.Event(), threading.Event()
    late = []

    def heed():
        if begun.is_set():
            told.set()
            raise KeyboardInterrupt

    def work(item):
        begun.set()
        late.append(not told.wait(20))

    with pytest.raises(KeyboardInterrupt):
        list(side_by_side.side_by_side(work, range(5), 1, heed))
    assert late == [False]


@pytest.mark.parametrize(
    ("gigabytes", "largest", "count"),
    [(64, 40_000_000, 8), (10, 40_000_000, 3), (1, 40_000_000, 1), (64, 1, 8)],
)
def test_how_many_is_a_question_of_memory(monkeypatch, gigabytes, largest, count):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 8)
    monkeypatch.setattr(side_by_side, "optional", lambda name: (Memory(gigabytes * 10**9), ""))
    assert at_once(largest) == count
    monkeypatch.setattr(side_by_side, "optional", lambda name: (None, "not installed"))
    assert at_once(largest) == side_by_side.WITHOUT_A_FIGURE
