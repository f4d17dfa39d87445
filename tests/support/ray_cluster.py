"""A real Ray cluster on this machine: a head and more nodes, each its own processes, to be killed.

`ray stop` would stop every Ray of the machine; here each node is a process group of its own. Ray
guards clusters by a token since 2.60, which belongs to whoever started one: none is used here.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

SETTINGS = {"RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0", "RAY_DEDUP_LOGS": "0"}
RAY = Path(sys.executable).with_name("ray")


def address_of_this_machine() -> str:
    """Ray takes no loopback address."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        with contextlib.suppress(OSError):
            probe.connect(("192.0.2.1", 9))  # sends nothing
            return probe.getsockname()[0]
    return socket.gethostbyname(socket.gethostname())


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("", 0))
        return probe.getsockname()[1]


class Cluster:
    """nodes: cores of each, the head first. A context manager."""

    def __init__(self, nodes: tuple[int, ...] = (1, 1), memory: int = 8_000_000_000):
        self.cores, self.memory = nodes, memory
        self.port = free_port()
        self.address = f"{address_of_this_machine()}:{self.port}"
        self.folder = Path(tempfile.mkdtemp(prefix="ray"))
        self.nodes: list[subprocess.Popen] = []

    def __enter__(self) -> Cluster:
        self.start()
        return self

    def __exit__(self, *_) -> None:
        self.kill()
        shutil.rmtree(self.folder, ignore_errors=True)

    def start(self) -> None:
        """The head, then the others; returns when it answers."""
        for number, cores in enumerate(self.cores):
            where = ["--address", self.address]
            if number == 0:
                where = ["--head", "--port", str(self.port), "--include-dashboard=false"]
                where += ["--temp-dir", str(self.folder)]
            self.nodes.append(self._start(cores, where))
            self._wait_for_port()

    def wait_for_nodes(self) -> None:
        """Until all of them have joined."""
        for _ in range(120):
            ended = subprocess.run(
                [str(RAY), "status", "--address", self.address],
                capture_output=True,
                text=True,
                env=os.environ | SETTINGS,
            )
            if ended.stdout.count("node_") >= len(self.cores):
                return
            time.sleep(1)
        raise TimeoutError(ended.stdout + ended.stderr)

    def kill(self, numbers: tuple[int, ...] | None = None) -> None:
        """Ends nodes as a power cut does; all by default."""
        for number in range(len(self.nodes)) if numbers is None else numbers:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.nodes[number].pid, signal.SIGKILL)
            self.nodes[number].wait()
        if numbers is None:
            self.nodes = []

    def _start(self, cores: int, where: list[str]) -> subprocess.Popen:
        command = [str(RAY), "start", *where, "--block", "--num-cpus", str(cores)]
        command += ["--memory", str(self.memory), "--object-store-memory", "100000000"]
        log = open(self.folder / f"node{len(self.nodes)}.log", "ab")
        with log:
            return subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=os.environ | SETTINGS,
                start_new_session=True,
            )

    def _wait_for_port(self) -> None:
        host, _, port = self.address.partition(":")
        for _ in range(240):
            with contextlib.suppress(OSError):
                socket.create_connection((host, int(port)), timeout=1).close()
                return
            time.sleep(0.25)
        raise TimeoutError((self.folder / "node0.log").read_text())


def tasks(job: str) -> list[int]:
    """The processes of Ray that work on a job, by its name."""
    found = []
    for folder in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            if folder.name.isdigit():
                title = (folder / "cmdline").read_bytes().strip(b"\0").decode(errors="replace")
                if title == f"ray::{Path(job).name}":
                    found.append(int(folder.name))
    return found
