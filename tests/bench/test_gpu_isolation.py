"""A job that hangs or dies costs the others nothing, and what it told before is kept."""

import os
import signal
import time

import pytest

if not hasattr(os, "fork"):
    pytest.skip("jobs are forked", allow_module_level=True)

from bench.gpu import isolate
from bench.gpu.isolate import Job


def hangs(remote):
    remote.add({"told": "before"})
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    time.sleep(60)


def dies(remote):
    remote.add({"told": "before"})
    os.kill(os.getpid(), signal.SIGKILL)


def raises(remote):
    raise ValueError("no such route\nand more")


def works(remote):
    remote.add({"told": 1})
    remote.set(sum=2)


@pytest.mark.parametrize("at_once", [1, 3])
def test_a_job_that_hangs_or_dies_is_told_and_the_rest_goes_on(at_once):
    heard = []
    jobs = [Job("hangs", hangs, 1), Job("dies", dies, 20)]
    jobs += [Job("raises", raises, 20), Job("works", works, 20)]
    start = time.perf_counter()
    states = isolate.run(jobs, lambda *told: heard.append(told), at_once)
    assert states == {
        "hangs": "took longer than 1 s and was ended",
        "dies": "ended by SIGKILL",
        "raises": "ValueError: no such route",
        "works": "finished",
    }
    before = {"told": "before"}
    assert sorted(heard, key=str) == sorted(
        [("hangs", "row", before), ("dies", "row", before), ("works", "row", {"told": 1}),
         ("works", "facts", {"sum": 2})], key=str,
    )  # fmt: skip
    assert time.perf_counter() - start < 15


def test_programs_that_a_job_starts_are_ended_with_it(tmp_path):
    def starts(remote):
        import subprocess

        child = subprocess.Popen(["sleep", "60"])
        remote.add({"pid": child.pid})
        child.wait()

    heard = []
    isolate.run([Job("starts", starts, 1)], lambda *told: heard.append(told))
    pid = heard[0][2]["pid"]
    for _ in range(50):
        try:
            with open(f"/proc/{pid}/stat") as file:
                if file.read().rpartition(")")[2].split()[0] == "Z":
                    break  # ended, and waits for whoever reaps it
        except FileNotFoundError:
            break
        time.sleep(0.1)
    else:
        pytest.fail("it still runs")
