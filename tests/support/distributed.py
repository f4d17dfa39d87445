"""ComfyUI-Distributed in a test server: its checkout at COMFYUI_DISTRIBUTED_PATH, copied into a
server's home, because it keeps the list of its workers inside its own folder. That names addresses
on this machine alone.
"""

import json
import os
import shutil
from pathlib import Path

from comfyui_server import Server
from demo_graphs import Graph

CHECKOUT = os.environ.get("COMFYUI_DISTRIBUTED_PATH", "")
PACK = "ComfyUI-Distributed"
PATIENCE = 5  # seconds that a master waits for a worker that has nothing in its queue


def missing() -> str | None:
    """Why the real pack cannot be driven here."""
    if not Path(CHECKOUT, "nodes", "collector.py").is_file():
        return "COMFYUI_DISTRIBUTED_PATH names no ComfyUI-Distributed: its nodes did NOT run"
    return None


def install(home: Path) -> None:
    """Copies the pack into a server's home, where there is one."""
    if missing() is None:
        shutil.copytree(
            CHECKOUT, home / "custom_nodes" / PACK, ignore=shutil.ignore_patterns(".git")
        )


def set_workers(master: Server, *workers: Server) -> list[str]:
    """Tells the master its workers; returns their ids."""
    ids = [str(number) for number, _ in enumerate(workers, 1)]
    listed = [
        {
            "id": one,
            "name": f"Worker {one}",
            "host": "127.0.0.1",
            "port": worker.port,
            "enabled": True,
            "type": "remote",
        }
        for one, worker in zip(ids, workers, strict=True)
    ]
    settings = {"auto_launch_workers": False, "worker_timeout_seconds": PATIENCE}
    (master.home / "custom_nodes" / PACK / "gpu_config.json").write_text(
        json.dumps({"workers": listed, "settings": settings})
    )
    return ids


def spread(graph: Graph, sampler: str, seed: int) -> str:
    """Distributed Seed in front of a sampler, Distributed Collector behind what it draws; returns
    the id whose output has the pictures, the master's first.
    """
    chosen = graph.add("DistributedSeed", seed=seed)
    graph.nodes[sampler]["inputs"]["seed"] = [chosen, 0]
    saved = graph.save(sampler)
    pixels = graph.nodes[saved]["inputs"]["images"]
    collected = graph.add("DistributedCollector", images=pixels, load_balance=False)
    graph.nodes[saved]["inputs"]["images"] = [collected, 0]
    return saved


def queue(master: Server, graph: Graph, workers: list[str]) -> dict:
    """Queues a graph as the pack's panel does: {"prompt_id", "worker_count"} or {"error"}."""
    body = {"prompt": graph.nodes, "client_id": master.client, "enabled_worker_ids": workers}
    return master.post("/distributed/queue", body)
