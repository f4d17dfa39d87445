"""What Ray itself takes of a farm's time: tasks a second, one task, one call of an actor, a new
worker process, a task that runs again after its worker was killed; the driver's memory.

    python tests/bench/bench_ray.py --address HOST:6379 [--tasks 10000] [--out FILE]

On a running cluster, and in a Python that has Ray; torch and the pack are not needed.
"""

import argparse
import json
import os
import platform
import signal
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

RESULTS = Path(__file__).resolve().parent / "results"


def seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def median(call: Callable[[], object], times: int = 50) -> float:
    return statistics.median(seconds(call) for _ in range(times))


def resident() -> int:
    """Bytes of this process in memory."""
    fields = Path("/proc/self/statm").read_text().split()
    return int(fields[1]) * os.sysconf("SC_PAGE_SIZE")


def nothing() -> int:
    return os.getpid()


def dies_once(marker: str) -> float:
    """Seconds from its first life's end to its second life."""
    path = Path(marker)
    if not path.exists():
        path.write_text(repr(time.time()))
        os.kill(os.getpid(), signal.SIGKILL)
    return time.time() - float(path.read_text())


class Listener:
    def hears(self, line: str) -> int:
        return len(line)


def many(ray: ModuleType, tasks: int) -> dict:
    task = ray.remote(num_cpus=1)(nothing)
    ray.get([task.remote() for _ in range(10)])
    before, cpu, start = resident(), time.process_time(), time.perf_counter()
    waiting = [task.remote() for _ in range(tasks)]
    submitted = time.perf_counter() - start
    bytes_a_task = (resident() - before) / tasks
    workers = len(set(ray.get(waiting)))
    whole = time.perf_counter() - start
    return {
        "tasks": tasks,
        "workers": workers,
        "submitting_seconds": submitted,
        "seconds": whole,
        "tasks_a_second": tasks / whole,
        "driver_cpu_seconds": time.process_time() - cpu,
        "driver_bytes_a_waiting_task": bytes_a_task,
    }


def single(ray: ModuleType) -> dict:
    task = ray.remote(num_cpus=1)(nothing)
    mortal = ray.remote(num_cpus=1, max_retries=1)(dies_once)

    def fresh(name: str) -> Callable[[], object]:
        environment = {"env_vars": {"NIBBLE_BENCH": name}}  # no process has it: a new one is made
        return lambda: ray.get(task.options(runtime_env=environment).remote())

    listener = ray.remote(num_cpus=0)(Listener).remote()
    line = json.dumps({"layer": 17, "of": 304, "seconds_left": 417.2, "job": "x" * 60})
    ray.get(listener.hears.remote(line))
    with tempfile.TemporaryDirectory() as folder:
        again = ray.get(mortal.remote(str(Path(folder) / "marker")))
    return {
        "task_seconds": median(lambda: ray.get(task.remote())),
        "actor_call_seconds": median(lambda: ray.get(listener.hears.remote(line)), 200),
        "new_worker_seconds": [seconds(fresh(name)) for name in ("a", "b", "c")],
        "again_after_kill_seconds": again,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--address", default="auto")
    parser.add_argument("--tasks", type=int, default=10_000)
    parser.add_argument("--out", type=Path, default=RESULTS / "ray.json")
    args = parser.parse_args()
    import ray

    connected = seconds(lambda: ray.init(address=args.address, log_to_driver=False))
    found = {
        "ray": ray.__version__,
        "python": platform.python_version(),
        "nodes": len(ray.nodes()),
        "cpus": ray.cluster_resources()["CPU"],
        "connecting_seconds": connected,
        **many(ray, args.tasks),
        **single(ray),
        "cores_of_this_machine": os.cpu_count(),
    }
    args.out.write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
