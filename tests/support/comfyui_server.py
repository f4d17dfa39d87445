"""A real ComfyUI, headless, with this checkout as a folder in its custom_nodes, spoken to as a
browser does: HTTP and websocket.
"""

from __future__ import annotations

import asyncio
import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
import uuid
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent.parent
COMFYUI = os.environ.get("COMFYUI_PATH", "")
PYTHON = os.environ.get("COMFYUI_PYTHON", sys.executable)
START_SECONDS, RUN_SECONDS = 600, 900


class Refused(Exception):
    """The server did not take a graph, or a node failed: `message` is what the user would read."""


class Server:
    """ComfyUI with its models, input and output in `home`. Use as a context manager."""

    def __init__(self, home: Path, *flags: str, device_flags: tuple[str, ...] = ("--cpu",)):
        self.home, self.flags = home, (*device_flags, *flags)
        self.client = uuid.uuid4().hex
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.log = home / "server.log"

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def folder(self, kind: str) -> Path:
        """models/<kind>, made when missing."""
        path = self.home / "models" / kind
        path.mkdir(parents=True, exist_ok=True)
        return path

    def __enter__(self) -> Server:
        pack = self.home / "custom_nodes" / "ComfyUI-Nibble"
        pack.parent.mkdir(parents=True, exist_ok=True)
        if not pack.exists():
            pack.symlink_to(ROOT, target_is_directory=True)
        settings = self.home / "user" / "default" / "comfy.settings.json"
        if not settings.exists():  # a first visit opens the templates, above all and when it likes
            settings.parent.mkdir(parents=True, exist_ok=True)
            settings.write_text('{"Comfy.TutorialCompleted": true}')
        command = [
            PYTHON,
            str(Path(__file__).with_name("comfyui_launch.py")),
            str(Path(COMFYUI) / "main.py"),
            "--listen",
            "127.0.0.1",
            "--port",
            str(self.port),
            "--base-directory",
            str(self.home),
            "--disable-api-nodes",
            "--disable-all-custom-nodes",
            "--whitelist-custom-nodes",
            "ComfyUI-Nibble",
            "--database-url",
            "sqlite:///:memory:",
            *self.flags,
        ]
        with open(self.log, "w") as log:
            self.process = subprocess.Popen(
                command, stdout=log, stderr=subprocess.STDOUT, cwd=COMFYUI
            )
        try:
            self._wait()
        except BaseException:
            self.__exit__()  # else it lives on: what fails here is never left
            raise
        return self

    def _wait(self) -> None:
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline:
            if self.process.poll() is not None:
                raise RuntimeError(f"ComfyUI did not start:\n{self.log.read_text()[-3000:]}")
            try:
                self.get("/system_stats")
                return
            except OSError:
                time.sleep(0.3)
        raise RuntimeError(
            f"ComfyUI did not answer in {START_SECONDS} s:\n{self.log.read_text()[-3000:]}"
        )

    def __exit__(self, *_) -> None:
        self.process.terminate()
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()

    def get(self, path: str):
        """JSON of a GET."""
        with urllib.request.urlopen(self.url + path, timeout=60) as reply:
            return json.load(reply)

    def post(self, path: str, body: dict):
        """JSON of a POST; an error's body is returned as well."""
        request = urllib.request.Request(
            self.url + path, json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        try:
            with urllib.request.urlopen(request, timeout=60) as reply:
                return json.loads(reply.read() or b"{}")
        except urllib.error.HTTPError as error:
            return json.loads(error.read())

    def queue(self, graph: dict) -> str:
        """Queues a graph in API format; returns its id. Raises Refused with what the nodes said."""
        reply = self.post("/prompt", {"prompt": graph, "client_id": self.client})
        if "prompt_id" not in reply or reply.get("node_errors"):  # else the rest of a graph runs
            told = [
                f"{error['message']}: {error['details']}"
                for node in reply.get("node_errors", {}).values()
                for error in node["errors"]
            ]
            raise Refused("; ".join(told) or json.dumps(reply))
        return reply["prompt_id"]

    def run(self, graph: dict) -> dict:
        """Runs a graph; returns its outputs by node id. Raises Refused with the message of a node
        that failed.
        """
        return self.result(self.queue(graph))

    def result(self, prompt_id: str) -> dict:
        """Waits for a queued graph."""
        deadline = time.monotonic() + RUN_SECONDS
        while time.monotonic() < deadline:
            entry = self.get(f"/history/{prompt_id}").get(prompt_id)
            if entry is not None:
                for kind, details in entry["status"]["messages"]:
                    if kind == "execution_error":
                        raise Refused(details["exception_message"])
                    if kind == "execution_interrupted":
                        raise Refused("interrupted")
                return entry["outputs"]
            if self.process.poll() is not None:
                raise RuntimeError(f"ComfyUI died:\n{self.log.read_text()[-3000:]}")
            time.sleep(0.1)
        raise RuntimeError(f"ComfyUI did not finish in {RUN_SECONDS} s")

    def picture(self, output: dict) -> np.ndarray:
        """The first picture of a SaveImage output, fetched over HTTP: float (height, width, 3) in
        [0, 1].
        """
        import io

        from PIL import Image

        query = urllib.parse.urlencode(
            {key: output["images"][0][key] for key in ("filename", "subfolder", "type")}
        )
        with urllib.request.urlopen(f"{self.url}/view?{query}", timeout=60) as reply:
            return (
                np.asarray(Image.open(io.BytesIO(reply.read())).convert("RGB"), dtype=np.float64)
                / 255
            )

    def events(self, graph: dict, watch=lambda event: None) -> list[dict]:
        """Runs a graph and returns what a browser is told meanwhile over the websocket; binary
        events as {"type": "binary"}. watch sees each at once.
        """
        return asyncio.run(self._events(graph, watch))

    async def _events(self, graph: dict, watch) -> list[dict]:
        import aiohttp

        seen = []
        async with (
            aiohttp.ClientSession() as session,
            session.ws_connect(f"{self.url}/ws?clientId={self.client}") as socket,
        ):
            prompt = await asyncio.to_thread(self.queue, graph)
            async for message in socket:
                if message.type == aiohttp.WSMsgType.BINARY:
                    seen.append({"type": "binary", "data": message.data})
                    await asyncio.to_thread(watch, seen[-1])
                elif message.type == aiohttp.WSMsgType.TEXT:
                    seen.append(json.loads(message.data))
                    await asyncio.to_thread(watch, seen[-1])
                    done = seen[-1]["type"] in (
                        "execution_success",
                        "execution_error",
                        "execution_interrupted",
                    )
                    if done and seen[-1]["data"].get("prompt_id") == prompt:
                        return seen
        raise RuntimeError("the websocket closed before the graph was done")
