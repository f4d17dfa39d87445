"""What a node tells of its work: units, share, time left, and what is done when the user stops."""

import comfy.model_management
import pytest

from nibble.nodes.bridge.host import progress
from nibble.nodes.bridge.host.progress import Progress, TimeLeft


@pytest.fixture
def clock(monkeypatch):
    """A clock that the test sets: clock.now, in seconds."""

    class Clock:
        now = 100.0

        def monotonic(self):
            return self.now

    made = Clock()
    monkeypatch.setattr(progress, "time", made)
    return made


@pytest.fixture
def told(monkeypatch, clock):
    """What the page is told."""
    events = []

    class Server:
        client_id = "client"

        def send_sync(self, event, data, client):
            events.append((event, data))

    monkeypatch.setattr(progress, "PromptServer", type("P", (), {"instance": Server()}))
    return events


def test_time_left_is_the_rest_at_the_speed_so_far(clock):
    """A tenth in 10 s: nine tenths take 90 s more."""
    left = TimeLeft()
    assert left.see(0.2) is None
    clock.now += 10
    assert left.see(0.3) == pytest.approx(70.0)
    clock.now += 10
    assert left.see(0.4) == pytest.approx(60.0)


def test_time_left_follows_the_speed_of_the_last_calls(clock):
    """A hundred quick calls are forgotten after as many slow ones as the window holds."""
    left = TimeLeft()
    for call in range(100):
        clock.now += 0.01
        left.see(0.001 * call)
    for call in range(TimeLeft.WINDOW):
        clock.now += 10
        told = left.see(0.1 + 0.01 * call)
    assert told == pytest.approx((1 - 0.41) * 10 / 0.01)


def test_no_time_is_told_before_there_is_a_speed(clock):
    left = TimeLeft()
    left.see(0.0)
    clock.now += 1
    assert left.see(0.5) is None  # too soon
    clock.now += 10
    assert TimeLeft().see(0.5) is None  # one call has no speed


def test_layers_are_told_with_their_number_and_the_time(told, clock):
    bar = Progress("quantizing", "7", unit="layer", resumes=True)
    bar.count(11, 42)
    bar(10, 100, "blocks.3")
    clock.now += 20
    bar.count(12, 42)
    bar(20, 100, "blocks.4")
    assert [name for name, _ in told] == [progress.PROGRESS_EVENT] * 2
    assert told[-1][1] == {
        "node": "7",
        "title": "quantizing",
        "name": "blocks.4",
        "unit": "layer",
        "done": 12,
        "count": 42,
        "share": 0.2,
        "seconds": pytest.approx(160.0),
        "stopped": False,
        "resumes": True,
    }


def test_steps_count_themselves(told):
    Progress("training", "7", unit="step", resumes=True)(12, 200, "loss 0.1")
    assert (told[-1][1]["done"], told[-1][1]["count"]) == (12, 200)


def test_events_do_not_flood_the_page(told, clock):
    bar = Progress("training", "7", unit="step")
    for step in range(1000):
        clock.now += 0.001
        bar(step, 1000)
    assert 5 <= len(told) <= 12


def test_stop_tells_what_is_done(told):
    bar = Progress("quantizing", "7", unit="layer", resumes=True)
    bar.count(35, 42)
    comfy.model_management.interrupt_current_processing()
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        bar.heed()
    _, last = told[-1]
    assert last["stopped"]
    assert last["resumes"]
    assert (last["done"], last["count"], last["unit"]) == (35, 42, "layer")
