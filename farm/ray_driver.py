"""The farm's only file that imports Ray: a program of its own, run by path beside the farm.

    python ray_driver.py ADDRESS PATIENCE      ADDRESS: of a running cluster, or "local"

In, on stdin: a job a line (work.py says what is in it, and `id`, `needs`). Out, on stdout: lines of
JSON, each an event with the `job` that it is of: started, progress, report, refused, lost. The farm
itself never imports Ray: a driver that has lost its cluster is ended by Ray, which the farm lives
through, and starts another; and nothing is pickled but the few lines here, of strings and numbers.
"""

import contextlib
import json
import os
import queue
import socket
import sys
import threading
import time
from collections import Counter

NO_CLUSTER, LOST_CLUSTER = 3, 4  # exit codes; Ray's own end is another
ASIDE = 4  # jobs of one kind that wait in Ray behind those that its cores can run
LOOK = 0.25  # seconds between two looks
# the cluster's head has this long to come back before Ray ends a driver; nothing is sent home
SETTINGS = {"RAY_gcs_rpc_server_reconnect_timeout_s": "15", "RAY_USAGE_STATS_ENABLED": "0"}


class Board:
    """Where workers put what their jobs tell: an actor, read by the driver."""

    def __init__(self) -> None:
        self.events: list[dict] = []

    def tell(self, event: dict) -> None:
        self.events.append(event)

    def take(self) -> list[dict]:
        taken, self.events = self.events, []
        return taken


def work(job: dict, board) -> dict:
    """A task: the job by the pack of the machine that it came to."""
    import runpy

    import ray

    node = ray.get_runtime_context().get_node_id()[:4]
    path = os.path.join(job["pack"], "farm", "work.py")
    try:
        code = runpy.run_path(path)
    except OSError as error:
        where = f"{socket.gethostname()} has no Nibble at {job['pack']} ({error.strerror})"
        way = "put the pack there, or name its place in the jobs file: worker: pack"
        return {"event": "refused", "kind": "FileRefused", "sentence": f"{where}; {way}"}
    worker = f"{code['name']()}-{node}"
    facts = {"job": job["id"], "worker": worker}
    board.tell.remote({"event": "started", **facts})
    return code["run"](job, lambda event: board.tell.remote(event | facts)) | {"worker": worker}


def say(event: dict) -> None:
    print(json.dumps(event), file=OUT, flush=True)


class Driver:
    """Jobs from stdin to the cluster; their events to stdout."""

    def __init__(self, ray) -> None:
        self.ray = ray
        self.task = ray.remote(work)
        board = ray.remote(Board).options(num_cpus=0, max_restarts=-1, max_task_retries=-1)
        self.board = board.remote()
        self.jobs: queue.SimpleQueue[dict | None] = queue.SimpleQueue()
        self.waiting: list[dict] = []
        self.running: dict = {}  # reference → job
        self.told: set[str] = set()
        self.open = True
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        for line in sys.stdin:
            self.jobs.put(json.loads(line))
        self.jobs.put(None)

    def run(self) -> None:
        """Until standard input has ended."""
        while self.open:
            self._take_jobs()
            self._submit()
            self._finish()
            for event in self.ray.get(self.board.take.remote()):
                say(event)

    def _take_jobs(self) -> None:
        with contextlib.suppress(queue.Empty):
            while True:
                job = self.jobs.get(timeout=LOOK if not self.running else 0)
                if job is None:
                    self.open = False
                    return
                self.waiting.append(job)

    def _submit(self) -> None:
        """No more at once than the cluster can work on and a few: what is submitted is lost with
        the cluster's head, and Ray heeds no order between kinds of jobs.
        """
        if not self.waiting:
            return
        nodes = [node["Resources"] for node in self.ray.nodes() if node["Alive"]]
        at_once = Counter(json.dumps(job["needs"]) for job in self.running.values())
        later = []
        for job in self.waiting:
            kind = json.dumps(job["needs"])
            if at_once[kind] >= self._room(nodes, job["needs"], kind) + ASIDE:
                later.append(job)
                continue
            at_once[kind] += 1
            needs = job["needs"]
            task = self.task.options(
                name=os.path.basename(job["id"]),
                num_cpus=needs["cpus"],
                num_gpus=needs["gpus"],
                memory=needs["memory"],
                max_retries=needs["retries"],
                retry_exceptions=[ChildProcessError],
            )
            self.running[task.remote(job, self.board)] = job
        self.waiting = later

    def _room(self, nodes: list[dict], needs: dict, kind: str) -> int:
        """How many jobs of a kind the cluster can run; says it once where that is none."""
        wanted = {"CPU": needs["cpus"], "GPU": needs["gpus"], "memory": needs["memory"]}
        wanted = {resource: amount for resource, amount in wanted.items() if amount}
        room = sum(
            int(min(node.get(resource, 0) // amount for resource, amount in wanted.items()))
            for node in nodes
        )
        if not room and kind not in self.told:
            self.told.add(kind)
            say({"event": "nowhere", "needs": needs})
        return room

    def _finish(self) -> None:
        if not self.running:
            return
        references = list(self.running)
        done, _ = self.ray.wait(references, num_returns=len(references), timeout=LOOK)
        for reference in done:
            job = self.running.pop(reference)
            try:
                event = self.ray.get(reference)
            except self.ray.exceptions.RayError as error:
                event = {"event": "lost", "sentence": in_words(error, job)}
            say(event | {"job": job["id"]})


def in_words(error: Exception, job: dict) -> str:
    """Why a job could not be done, after all of its tries."""
    tries = f"{job['needs']['retries'] + 1} tries"
    cause = getattr(error, "cause", None) or error
    said = str(cause).strip().partition("\n")[0]
    return f"given up after {tries}: {said}; more memory (worker: memory) is what mostly helps"


def connected(address: str, patience: float):
    """Ray, connected; looks for a cluster again for `patience` seconds."""
    import ray

    given: dict = {"log_to_driver": False, "configure_logging": False}
    until = time.monotonic() + patience
    while True:
        try:
            reach(address)
            if address == "local":
                given["include_dashboard"] = False
            ray.init(address=address, **given)
            return ray
        except (ConnectionError, RuntimeError, ValueError, OSError) as error:
            if time.monotonic() > until:
                print(str(error).strip().partition("\n")[0], file=sys.stderr)
                sys.exit(NO_CLUSTER)
            time.sleep(1)


def reach(address: str) -> None:
    """Raises OSError where nobody listens: Ray itself would try for ten minutes."""
    host, _, port = address.rpartition("://")[2].partition(":")
    if port.isdigit():
        socket.create_connection((host, int(port)), timeout=5).close()


def main() -> int:
    os.environ.update({key: os.environ.get(key, value) for key, value in SETTINGS.items()})
    ray = connected(sys.argv[1], float(sys.argv[2]))
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    amounts = {key: sum(node.get(key, 0) for node in nodes) for key in ("CPU", "GPU", "memory")}
    say({"event": "cluster", "nodes": len(nodes)} | amounts)
    try:
        Driver(ray).run()
    except ray.exceptions.RayError as error:
        print(str(error).strip().partition("\n")[0], file=sys.stderr)
        return LOST_CLUSTER
    finally:
        ray.shutdown()
    return 0


if __name__ == "__main__":
    OUT = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what packages print is no event
    sys.exit(main())
