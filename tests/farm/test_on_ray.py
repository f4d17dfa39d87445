"""The runner over a cluster, with a driver that only pretends to know Ray: what becomes of jobs
when it dies. tests/farm/test_cluster.py has the real one.
"""

import sys

import pytest

from farm_runs import job_of
from nibble.farm import on_ray, ray_driver
from nibble.farm.run import ClusterRefused

FRONT = """
import json, os, sys
def say(event, **facts): print(json.dumps({"event": event, **facts}), flush=True)
"""


@pytest.fixture
def runner(tmp_path, monkeypatch):
    """Makes a runner whose driver is this Python."""
    made = []

    def make(code):
        driver = tmp_path / "driver.py"
        driver.write_text(FRONT + code)
        monkeypatch.setattr(on_ray, "DRIVER", driver)
        made.append(on_ray.OnRay("somewhere:6379", patience=1))
        return made[-1]

    yield make
    for each in made:
        each.close()


def events(runner, last):
    found = []
    for _ in range(100):
        found += runner.poll(0.2)
        if found and found[-1]["event"] == last:
            return found
    raise AssertionError(found)


def test_jobs_go_in_and_events_come_out(runner, tmp_path):
    made = runner(
        "say('cluster', nodes=1)\nfor line in sys.stdin: say('report', job=json.loads(line)['id'])"
    )
    made.submit(job_of(tmp_path))
    assert events(made, "report") == [
        {"event": "cluster", "nodes": 1},
        {"event": "report", "job": "m.safetensors"},
    ]


def test_a_driver_that_died_is_followed_by_one_with_the_jobs_that_are_open(runner, tmp_path):
    flag = tmp_path / "flag"
    code = f"""
say('cluster', nodes=1)
first = not os.path.exists({str(flag)!r})
open({str(flag)!r}, 'w').close()
for line in sys.stdin:
    job = json.loads(line)['id']
    if job == 'last' and first:
        say('report', job='m.safetensors')
        os.abort()
    say('report' if not first else 'started', job=job)
"""
    made = runner(code)
    for name in ("m.safetensors", "other", "last"):
        made.submit(job_of(tmp_path) | {"id": name})
    found = []
    while sum(event["event"] == "report" for event in found) < 3:
        found += made.poll(0.2)
    assert [event["job"] for event in found if event["event"] == "report"] == [
        "m.safetensors",
        "other",
        "last",
    ]
    kinds = [event["event"] for event in found]
    last = len(kinds) - 1 - kinds[::-1].index("report")
    assert kinds.index("report") < kinds.index("again") < kinds.index("note") < last


def test_a_cluster_that_does_not_answer_is_given_up(runner, monkeypatch):
    monkeypatch.setattr(on_ray, "FIRST", 0.1)
    monkeypatch.setattr(on_ray, "CONNECTING", 0.1)
    with pytest.raises(ClusterRefused, match="none that answers"):
        events(runner("sys.stdin.read()"), "never")


def test_a_driver_that_died_in_the_middle_of_a_line_is_followed_by_another(runner, tmp_path):
    flag = tmp_path / "flag"
    code = f"""
say('cluster', nodes=1)
if not os.path.exists({str(flag)!r}):
    open({str(flag)!r}, 'w').close()
    os.write(1, b'{{"event": "rep')
    os.abort()
for line in sys.stdin: say('report', job=json.loads(line)['id'])
"""
    made = runner(code)
    made.submit(job_of(tmp_path))
    assert events(made, "report")[-1]["job"] == "m.safetensors"


def test_more_jobs_than_a_pipe_holds_keep_nobody_waiting(runner, monkeypatch, tmp_path):
    monkeypatch.setattr(on_ray, "FIRST", 0.1)
    monkeypatch.setattr(on_ray, "CONNECTING", 0.1)
    made = runner("import time; time.sleep(600)")  # it reads nothing
    for number in range(2000):
        made.submit(job_of(tmp_path) | {"id": str(number)})
    with pytest.raises(ClusterRefused):
        events(made, "never")


@pytest.mark.parametrize("when", ["at first", "later"])
def test_without_a_cluster_the_farm_says_so(runner, tmp_path, when):
    flag = tmp_path / "flag"
    code = f"""
if {when == "later"} and not os.path.exists({str(flag)!r}):
    open({str(flag)!r}, 'w').close()
    say('cluster', nodes=1)
    os.abort()
sys.stderr.write('no answer'); sys.exit({ray_driver.NO_CLUSTER})
"""
    with pytest.raises(ClusterRefused, match=r"no Ray cluster at somewhere:6379.*\(no answer\)"):
        events(runner(code), "never")


def test_what_no_machine_has_room_for_is_told_in_words(runner):
    needs = {"cpus": 2, "gpus": 1, "memory": 9_000_000_000}
    made = runner(f"say('nowhere', needs={needs})\nsys.stdin.read()")
    (event,) = events(made, "note")
    assert "no machine of the cluster has 2 cores, 9.0 GB of memory, 1 GPU" in event["sentence"]


def test_the_driver_is_not_ray(runner):
    """Importing the runner, or the driver as a module, imports no Ray."""
    assert "ray" not in sys.modules
