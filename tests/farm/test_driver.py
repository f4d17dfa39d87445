"""What the driver asks of Ray, with a Ray that only pretends: how many jobs at once, in what order,
and what becomes of those that Ray does not take.
"""

import pytest

from nibble.farm import ray_driver


class Task(Exception):
    """Also stands for an error of Ray's."""


class Ray:
    """Knows machines, and which tasks were started with what."""

    class exceptions:
        RayTaskError = WorkerCrashedError = OutOfMemoryError = Task

    def __init__(self, *machines: dict):
        self.machines, self.started, self.asked = machines, [], None

    def nodes(self):
        return [{"Alive": True, "Resources": machine} for machine in self.machines]

    def options(self, **asked):
        if asked["num_gpus"] == 1.5:
            raise ValueError("no half cards")
        self.asked = asked
        return self

    def remote(self, job, board):
        self.started.append((job["id"], self.asked))
        return job["id"]

    def wait(self, references, num_returns, timeout):
        return references, []

    def get(self, reference):
        raise Task("gone")


@pytest.fixture
def said(monkeypatch):
    events = []
    monkeypatch.setattr(ray_driver, "say", events.append)
    return events


def driver(ray) -> ray_driver.Driver:
    made = ray_driver.Driver.__new__(ray_driver.Driver)
    made.ray, made.task, made.board = ray, ray, None
    made.waiting, made.running, made.rooms, made.told = [], {}, {}, set()
    made.cluster, made.look = {}, 0.0
    made._look_at_nodes()
    return made


def job(name: str, cpus=1, gpus=0, memory=0, retries=3) -> dict:
    needs = {"cpus": cpus, "gpus": gpus, "memory": memory, "retries": retries, "seconds": len(name)}
    return {"id": name, "needs": needs}


MACHINE = {"CPU": 2.0, "memory": 8e9}


def test_as_many_at_once_as_there_is_room_for_and_a_few_in_their_order(said):
    ray = Ray(MACHINE, MACHINE)
    made = driver(ray)
    # each asks for other memory, as models of different sizes do
    made.waiting = [job(f"m{i}", memory=1e9 + i) for i in range(20)]
    made._submit()
    assert [name for name, _ in ray.started] == [f"m{i}" for i in range(4 + ray_driver.ASIDE)]
    assert ray.started[0][1] == {
        "name": "m0",
        "num_cpus": 1,
        "num_gpus": 0,
        "memory": 1e9,
        "max_retries": 3,
        "retry_exceptions": [ChildProcessError],
    }
    made._submit()
    assert len(ray.started) == 8 and len(made.waiting) == 12


def test_jobs_for_a_card_and_jobs_too_large_do_not_stop_the_others(said):
    ray = Ray(MACHINE)
    made = driver(ray)
    made.waiting = [job(f"g{i}", gpus=1) for i in range(9)] + [job("large", cpus=64), job("small")]
    made._submit()
    assert [name for name, _ in ray.started] == ["g0", "g1", "g2", "g3", "small"]
    assert [event["needs"]["gpus"] for event in said if event["event"] == "nowhere"] == [1, 0]
    made._submit()
    assert sum(event["event"] == "nowhere" for event in said) == 2  # said once


def test_a_job_that_asks_for_nothing_runs(said):
    ray = Ray(MACHINE)
    made = driver(ray)
    made.waiting = [job("free", cpus=0)]
    made._submit()
    assert [name for name, _ in ray.started] == ["free"]


def test_what_ray_does_not_take_costs_that_job_alone(said):
    ray = Ray(MACHINE | {"GPU": 2.0})
    made = driver(ray)
    made.waiting = [job("odd", gpus=1.5), job("plain")]
    made._submit()
    assert [name for name, _ in ray.started] == ["plain"]
    (lost,) = [event for event in said if event["event"] == "lost"]
    assert lost["job"] == "odd" and "no half cards" in lost["sentence"]


def test_a_task_that_ray_gave_up_is_lost_in_words(said):
    made = driver(Ray(MACHINE))
    made.running = {"m": ("cpu", job("m"))}
    (ended,) = made._finish()
    assert (ended["event"], ended["job"]) == ("lost", "m")
    assert ended["sentence"].startswith("given up after 4 tries: gone")


def test_ten_thousand_waiting_jobs_are_looked_at_no_further_than_there_is_room(said):
    made = driver(Ray(*[MACHINE] * 200))
    made.waiting = [job(f"m{i}", memory=1e9 + i) for i in range(10_000)]
    made._submit()
    assert len(made.running) == 400 + ray_driver.ASIDE
    assert len(made.rooms) <= len(made.running) + 1
