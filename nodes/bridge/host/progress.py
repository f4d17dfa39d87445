"""Progress bar, what a node is at and the time left, a chart that changes while the node works, and
the Stop button: one object that algorithms call.
"""

from __future__ import annotations

import time
from collections import deque

import comfy.model_management
import comfy.utils

try:
    from server import PromptServer
except ImportError:  # ComfyUI's library without its server, as in a script
    PromptServer = None

try:
    from comfy_execution.utils import get_executing_context
except ImportError:  # an older ComfyUI
    get_executing_context = None

CHART_EVENT = "nibble_chart"  # {"node": execution id, "chart": JSON}, heard by web/nibble.js
# {"node", "title", "name", "unit": "layer" | "step" | "kernel" | "", "done", "count": of them,
# "share": 0…1 of the work, "seconds": left | null, "stopped": bool, "resumes": bool}, heard by
# web/progress.mjs
PROGRESS_EVENT = "nibble_progress"
PAUSE = 0.1  # seconds between two events


def running_node() -> str | None:
    """The node that ComfyUI runs now, in this thread."""
    context = get_executing_context() if get_executing_context else None
    return None if context is None else context.node_id


class TimeLeft:
    """Seconds to go, by the speed of the last calls: seconds left = (1 - share) · dt / dshare."""

    WINDOW, SOONEST = 32, 3.0  # calls; seconds after which a speed can be told

    def __init__(self) -> None:
        self._seen: deque[tuple[float, float]] = deque(maxlen=self.WINDOW)

    def see(self, share: float) -> float | None:
        """The seconds left once `share` (0…1) of the work is done; None while nothing is known."""
        now = time.monotonic()
        self._seen.append((now, share))
        then, before = self._seen[0]
        if now - then < self.SOONEST or share <= before:
            return None
        return (1 - share) * (now - then) / (share - before)


class Progress:
    """Called as progress(done, total, name): moves the bar, tells the node's page what it is at,
    and stops where the user asked to.

    unit: what the work is counted in: "step" or "kernel", as it is called with, or "layer", whose
    numbers `count` gives; "": in nothing that people know. resumes: what is done is kept when the
    user stops, and the next run goes on from it.
    """

    def __init__(
        self, title: str, node_id: str | None = None, unit: str = "", resumes: bool = False
    ):
        self.title, self.node_id = title, node_id or running_node()
        self.bar = comfy.utils.ProgressBar(1)
        self.resumes = resumes
        self._left = TimeLeft()
        self._state: dict = {"title": title, "name": "", "unit": unit, "done": 0, "count": 0}
        self._told = 0.0

    def __call__(self, done: int, total: int, name: str = "") -> None:
        if self._state["unit"] in ("step", "kernel"):
            self.count(done, total)
        self.heed()
        self.bar.update_absolute(done, max(total, 1))
        self.at(done / max(total, 1), name)

    def count(self, done: int, count: int) -> None:
        """So many units of the work are done, of so many."""
        self._state |= {"done": done, "count": count}

    def at(self, share: float, name: str) -> None:
        """Tells that `share` (0…1) of the work is done, and what is next."""
        self._state |= {"name": name, "share": share, "seconds": self._left.see(share)}
        if time.monotonic() - self._told > PAUSE:
            self._told = time.monotonic()
            self._tell(stopped=False)

    def heed(self) -> None:
        """`check`, and where the user pressed Stop the node says how much is done."""
        try:
            self.check()
        except comfy.model_management.InterruptProcessingException:
            self._tell(stopped=True)
            raise

    def _tell(self, stopped: bool) -> None:
        self._send(PROGRESS_EVENT, {**self._state, "stopped": stopped, "resumes": self.resumes})

    def show(self, chart: dict) -> None:
        """Draws a chart (`charts.py`) in the node now, in place of the last one; the node's own
        result replaces it at the end.
        """
        self._send(CHART_EVENT, {"chart": chart})

    def _send(self, event: str, told: dict) -> None:
        server = getattr(PromptServer, "instance", None)
        if server is not None and self.node_id is not None:
            server.send_sync(event, {"node": self.node_id, **told}, server.client_id)

    def picture(self, done: int, total: int, preview: tuple) -> None:
        """Shows a picture under the node as samplers do; preview: (format, PIL image, largest
        side), as ComfyUI's previewers give it.
        """
        self.bar.update_absolute(done, max(total, 1), preview)

    @staticmethod
    def check() -> None:
        """Raises ComfyUI's InterruptProcessingException when the user pressed Stop."""
        comfy.model_management.throw_exception_if_processing_interrupted()
