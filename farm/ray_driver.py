"""The farm's only file that imports Ray: a program of its own, run by path beside the farm.

    python ray_driver.py ADDRESS PATIENCE      ADDRESS: of a running cluster, or "local"

In, on stdin: a job a line (work.py says what is in it, and `id`, `needs`). Out, on stdout: lines of
JSON, each an event with the `job` that it is of: started, alive, progress, report, refused, lost.
The farm itself never imports Ray: a driver that has lost its cluster cannot go on, so it ends,
which the farm lives through, and starts another; and nothing is pickled but the few lines here,
strings and numbers.
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
ALIVE = 5.0  # seconds between two signs of life of a task
WATCH = 1.0  # seconds between two looks at whether the head is there
MISSES = 5  # of them, one after the other, that it does not answer
STUCK = 60.0  # seconds after which a turn of the driver will never end
NODES = 5.0  # seconds between two looks at what the cluster has
# nothing is sent home
SETTINGS = {"RAY_USAGE_STATS_ENABLED": "0"}


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
    facts = {"job": job["id"], "worker": f"{code['name']()}-{node}"}
    board.tell.remote({"event": "started", **facts})
    ended = threading.Event()

    def alive() -> None:
        while not ended.is_set():
            board.tell.remote({"event": "alive", **facts})
            ended.wait(ALIVE)

    threading.Thread(target=alive, daemon=True).start()
    try:
        return code["run"](job, lambda event: board.tell.remote(event | facts)) | facts
    finally:
        ended.set()


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
        self.running: dict = {}  # reference → kind, job
        self.rooms: dict[str, int] = {}  # what a job asks for → how many at once
        self.told: set[str] = set()
        self.nodes: list[dict] = []
        self.cluster: dict = {}
        self.look = 0.0
        self.open = True
        self.turned = time.monotonic()
        threading.Thread(target=self.watch, daemon=True).start()
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        for line in sys.stdin:
            self.jobs.put(json.loads(line))
        self.jobs.put(None)

    def run(self) -> None:
        """Until standard input has ended."""
        while self.open:
            self.turned = time.monotonic()
            self._look_at_nodes()
            self._take_jobs()
            self._submit()
            ended = self._finish()  # after what was told of them before
            told = self.ray.get(self.board.take.remote(), timeout=STUCK)
            for event in [*told, *ended]:
                say(event)

    def watch(self) -> None:
        """Ends this process when the cluster's head is gone, or has come back as another: Ray takes
        a minute to see the one, and waits for ever with the other.
        """
        address = self.ray.get_runtime_context().gcs_address
        missed = 0
        while time.monotonic() - self.turned < STUCK and missed < MISSES:
            time.sleep(WATCH)
            try:
                reach(address)
                missed = 0
            except ConnectionRefusedError:
                break
            except OSError:  # late, or no way there at the moment
                missed += 1
        os._exit(LOST_CLUSTER)

    def _look_at_nodes(self) -> None:
        """What the cluster has; told when it changes."""
        if time.monotonic() < self.look:
            return
        self.look = time.monotonic() + NODES
        self.nodes = [node["Resources"] for node in self.ray.nodes() if node["Alive"]]
        amounts = {
            name: sum(node.get(name, 0) for node in self.nodes) for name in ("CPU", "GPU", "memory")
        }
        cluster = {"event": "cluster", "nodes": len(self.nodes)} | amounts
        if cluster != self.cluster:
            self.cluster = cluster
            self.rooms = {}
            say(cluster)

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
        the cluster's head, and Ray heeds no order. Jobs with a graphics card, those without and
        those that no machine is large enough for do not wait for one another.
        """
        at_once = Counter(kind for kind, _ in self.running.values())
        full: set[str] = set()
        later = []
        for job in self.waiting:
            kind = "gpu" if job["needs"]["gpus"] else "cpu"
            if kind in full:
                later.append(job)
                continue
            room = self._room(job["needs"])
            if not room:
                kind = "nowhere"
            if kind in full or at_once[kind] >= room + ASIDE:
                full.add(kind)
                later.append(job)
                continue
            at_once[kind] += 1
            self._start(kind, job)
        self.waiting = later

    def _start(self, kind: str, job: dict) -> None:
        needs = job["needs"]
        try:
            task = self.task.options(
                name=os.path.basename(job["id"]),
                num_cpus=needs["cpus"],
                num_gpus=needs["gpus"],
                memory=needs["memory"],
                max_retries=needs["retries"],
                retry_exceptions=[ChildProcessError],
            )
            self.running[task.remote(job, self.board)] = (kind, job)
        except (ValueError, TypeError, OverflowError) as error:
            said = f"Ray does not take what it needs ({error}); change it in the jobs file"
            say({"event": "lost", "job": job["id"], "sentence": said})

    def _room(self, needs: dict) -> int:
        """How many such jobs the cluster can run; says it once where that is none."""
        wanted = {"CPU": needs["cpus"], "GPU": needs["gpus"], "memory": needs["memory"]}
        key = json.dumps(wanted)
        if key not in self.rooms:
            asked = {name: amount for name, amount in wanted.items() if amount}
            self.rooms[key] = sum(
                int(min((node.get(name, 0) // amount for name, amount in asked.items()), default=1))
                for node in self.nodes
            )
        room = self.rooms[key]
        if not room and key not in self.told:
            self.told.add(key)
            say({"event": "nowhere", "needs": needs})
        return room

    def _finish(self) -> list[dict]:
        """The last events of the jobs that have ended."""
        if not self.running:
            return []
        references = list(self.running)
        done, _ = self.ray.wait(references, num_returns=len(references), timeout=LOOK)
        ended = []
        for reference in done:
            _, job = self.running.pop(reference)
            ended.append(self._ended(reference, job) | {"job": job["id"]})
        return ended

    def _ended(self, reference, job: dict) -> dict:
        """A task's last event. Raises RayError where not the task, but the cluster is lost."""
        errors = self.ray.exceptions
        try:
            return self.ray.get(reference)
        except (errors.RayTaskError, errors.WorkerCrashedError, errors.OutOfMemoryError) as error:
            self.ray.nodes()  # a cluster that has gone fails tasks, too: then this fails or ends us
            return {"event": "lost", "sentence": in_words(error, job)}


def in_words(error: Exception, job: dict) -> str:
    """Why a job could not be done, after all of its tries."""
    cause = getattr(error, "cause", None) or error
    said = str(cause).strip().partition("\n")[0]
    if cause is not error and not isinstance(cause, ChildProcessError):  # not tried again
        return f"{type(cause).__name__}: {said}"
    tries = f"{job['needs']['retries'] + 1} tries"
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
    try:
        Driver(ray).run()
    except ray.exceptions.RayError as error:
        print(str(error).strip().partition("\n")[0], file=sys.stderr, flush=True)
        os._exit(LOST_CLUSTER)  # nothing of Ray can be ended in order
    ray.shutdown()
    return 0


if __name__ == "__main__":
    OUT = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what packages print is no event
    sys.exit(main())
