"""What a farm on a real Ray cluster costs, and what it lives through:
python -m nibble bench farm (needs Ray: pip install "nibble[farm]")

Small models (random FLUX.1s of a few million weights) quantized four times: one after another by
`quantize`, by a farm of one worker, by one of two, and by two while workers are killed with signal
9 and the cluster's head dies and comes back. One thread a worker. Compared are bytes, seconds, and
a job's seconds beside those of its command.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "support"))
import checkout  # noqa: F401, I001  (loads this checkout as `nibble`)
from bench.machine import describe_cpu
from farm_runs import QUICK, farm_of

RESULTS = Path(__file__).parent / "results" / "farm.json"
KILLS = 3


class Farm:
    """`nibble farm` as a process, with its lines."""

    def __init__(self, jobs: Path, *words: str):
        from ray_cluster import SETTINGS

        self.began = time.monotonic()
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(
            [sys.executable, str(checkout.ROOT), "farm", str(jobs), "--lines", *words],
            stdin=pipe,
            stdout=pipe,
            env=os.environ | SETTINGS | {"OMP_NUM_THREADS": "1"},
        )
        self.last: dict = {}

    def __iter__(self):
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.last = json.loads(line)
            yield self.last

    def seconds(self) -> float:
        """Until it has ended; raises where it failed."""
        for _ in self:
            pass
        assert self.process.stdin is not None
        self.process.stdin.close()
        assert self.process.wait() == 0, self.last
        return time.monotonic() - self.began


def one_by_one(jobs: Path) -> list[float]:
    """Seconds of each model's own command."""
    seconds = []
    (jobs.parent / "quantized").mkdir()
    for source in sorted(jobs.parent.glob("m*.safetensors")):
        target = jobs.parent / "quantized" / f"{source.stem}-q.safetensors"
        words = ["--rank", str(QUICK["rank"]), "--solver", "svd", "--memory-cap", "0"]
        began = time.monotonic()
        subprocess.run(
            [sys.executable, str(checkout.ROOT), "quantize", str(source), str(target), *words],
            check=True,
            capture_output=True,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )
        seconds.append(round(time.monotonic() - began, 2))
    return seconds


def made(jobs: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(jobs.parent.rglob("*-q.safetensors"))}


def report(jobs: Path) -> dict:
    return json.loads((jobs.parent / "jobs-farm.json").read_text())


def on_workers(jobs: Path, count: int) -> dict:
    """A farm of so many workers: its seconds, those of its commands, and what is between."""
    from ray_cluster import Cluster

    with Cluster((1,) * count) as cluster:
        cluster.wait_for_nodes()
        seconds = Farm(jobs, "--address", cluster.address).seconds()
    found = report(jobs)
    return {
        "seconds": round(seconds, 1),
        "seconds_of_commands": round(sum(job["seconds"] for job in found["jobs"]), 1),
        "between_two_jobs": between(found["jobs"]),
        "workers": found["workers"],
    }


def between(jobs: list[dict]) -> dict[str, float]:
    """Seconds from a worker's job to its next: what scheduling costs."""
    gaps = []
    for worker in {job["workers"][-1] for job in jobs}:
        own = sorted((job for job in jobs if job["workers"][-1] == worker), key=lambda j: j["at"])
        gaps += [
            after["at"] - before["at"] - before["seconds"]
            for before, after in itertools.pairwise(own)
        ]
    return {"median": round(statistics.median(gaps), 3), "worst": round(max(gaps), 3)}


def through_deaths(jobs: Path) -> dict:
    """Two workers; three are killed in the middle of a model, then all of the cluster at once."""
    from ray_cluster import Cluster, tasks

    killed: list[str] = []
    with Cluster() as cluster:
        cluster.wait_for_nodes()
        farm = Farm(jobs, "--address", cluster.address)
        for line in farm:
            for job in line["running"]:
                middle = 0 < job["layers"][0] < job["layers"][1]
                if middle and len(killed) < KILLS and job["job"] not in killed:
                    for process in tasks(job["job"]):
                        os.kill(process, signal.SIGKILL)
                    killed.append(job["job"])
            if len(killed) == KILLS and line["made"] >= KILLS + 2:
                break
        cluster.kill()
        cluster.start()
        seconds = farm.seconds()
    begun = {job["name"]: len(job["workers"]) for job in report(jobs)["jobs"]}
    return {
        "seconds": round(seconds, 1),
        "killed": killed,
        "begun_more_than_once": {name: times for name, times in begun.items() if times > 1},
        "notes": report(jobs)["notes"],
    }


def again(jobs: Path) -> dict:
    """The same file once more: no cluster is even asked for."""
    before = {path: path.stat().st_mtime_ns for path in jobs.parent.rglob("*-q.safetensors")}
    seconds = Farm(jobs, "--address", "nowhere:9").seconds()
    after = {path: path.stat().st_mtime_ns for path in jobs.parent.rglob("*-q.safetensors")}
    touched = sum(before[path] != after[path] for path in after)
    return {"seconds": round(seconds, 1), "files_touched": touched}


def main() -> None:
    plain = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=plain)
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--folder", type=Path, required=True, help="for the models; an empty one")
    parser.add_argument("--models", type=int, default=20)
    parser.add_argument("--hidden", type=int, default=512, help="width of the models")
    options = parser.parse_args()
    runs: dict[str, Callable[[Path], object]] = {
        "one by one": one_by_one,
        "one worker": lambda jobs: on_workers(jobs, 1),
        "two workers": lambda jobs: on_workers(jobs, 2),
        "through deaths": through_deaths,
    }
    found: dict = {"environment": describe_cpu(), "models": options.models}
    files = {}
    for name, run in runs.items():
        jobs = farm_of(
            options.folder / name.replace(" ", "-"), options.models, hidden=options.hidden, single=3
        )
        found[name] = run(jobs)
        files[name] = made(jobs)
        print(name, json.dumps(found[name]), flush=True)
    found["again"] = again(jobs)
    found["equal_bytes"] = {name: files[name] == files["one by one"] for name in runs}
    one, two = found["one worker"]["seconds"], found["two workers"]["seconds"]
    found["efficiency"] = round(one / (2 * two), 3)
    print({key: found[key] for key in ("again", "equal_bytes", "efficiency")})
    options.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
