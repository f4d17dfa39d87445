"""A real Ray, where it is installed (pip install "nibble[farm]"): the same files as without it,
whatever is killed meanwhile.
"""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from checkout import ROOT
from farm_runs import farm_of

pytest.importorskip("ray", reason="Ray is not installed: pip install 'nibble[farm]'")

from ray_cluster import SETTINGS, Cluster, tasks  # noqa: E402

SIZES = {"hidden": 384, "single": 3}


class Running:
    """A farm as a process, its lines heard."""

    def __init__(self, jobs, *words):
        command = [sys.executable, str(ROOT), "farm", str(jobs), "--lines", *words]
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(
            command, stdin=pipe, stdout=pipe, env=os.environ | SETTINGS | {"OMP_NUM_THREADS": "1"}
        )
        self.last = {}

    def until(self, seen):
        """Its first line that `seen` is true of."""
        for line in self.process.stdout:
            self.last = json.loads(line)
            if seen(self.last):
                return self.last
        raise AssertionError(f"ended with {self.process.wait()}: {self.last}")

    def end(self):
        for line in self.process.stdout:
            self.last = json.loads(line)
        self.process.stdin.close()
        self.process.stdout.close()
        return self.process.wait()


def made(jobs):
    return {path.name: path.read_bytes() for path in jobs.parent.rglob("*-q.safetensors")}


def at_work(line, but=""):
    """The name of a job that is in the middle of its layers."""
    return next(
        (
            job["job"]
            for job in line["running"]
            if 0 < job["layers"][0] < job["layers"][1] and job["job"] != but
        ),
        None,
    )


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """What one machine gives."""
    jobs = farm_of(tmp_path_factory.mktemp("alone"), 3, **SIZES)
    assert Running(jobs, "--in-order").end() == 0
    return made(jobs)


def test_on_this_machine_alone(tmp_path, alone):
    jobs = farm_of(tmp_path, 3, **SIZES)
    farm = Running(jobs)
    assert farm.end() == 0 and farm.last["made"] == 3
    assert made(jobs) == alone
    again = Running(jobs)
    assert again.end() == 0
    assert again.last["running"] == [] and again.last["made"] == 3


def test_killed_workers_and_a_head_that_comes_back(tmp_path, alone):
    jobs = farm_of(tmp_path, 3, **SIZES)
    with Cluster() as cluster:
        farm = Running(jobs, "--address", cluster.address)
        job = at_work(farm.until(at_work))
        os.kill(tasks(job)[0], signal.SIGKILL)
        farm.until(lambda line: at_work(line, but=job))
        cluster.kill()
        time.sleep(2)
        cluster.start()
        farm.until(lambda line: line["notes"] and line["running"])
        assert farm.end() == 0
    assert made(jobs) == alone
    report = json.loads((tmp_path / "jobs-farm.json").read_text())
    assert max(len(each["workers"]) for each in report["jobs"]) > 1
    assert not list(tmp_path.rglob("*.partial*"))


def test_an_address_without_a_cluster_is_told(tmp_path):
    jobs = farm_of(tmp_path, 1)
    command = [sys.executable, str(ROOT), "farm", str(jobs), "--address", "127.0.0.1:9"]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert ended.returncode == 1
    assert "There is no Ray cluster at 127.0.0.1:9" in ended.stderr
    assert "Traceback" not in ended.stderr
