"""Progress bar, a line of text under the node, a chart that changes while the node works, and the
Stop button: one object that algorithms call.
"""

from __future__ import annotations

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


def running_node() -> str | None:
    """The node that ComfyUI runs now, in this thread."""
    context = get_executing_context() if get_executing_context else None
    return None if context is None else context.node_id


class Progress:
    """Called as progress(done, total, name): moves the bar, shows "title: name", and stops where
    the user asked to.
    """

    def __init__(self, title: str, node_id: str | None = None):
        self.title, self.node_id = title, node_id or running_node()
        self.bar = comfy.utils.ProgressBar(1)

    def __call__(self, done: int, total: int, name: str = "") -> None:
        self.check()
        self.bar.update_absolute(done, max(total, 1))
        self.say(f"{self.title}: {name or 'done'}")

    def say(self, text: str) -> None:
        """Shows a line under the node, where there is a server to show it."""
        server = getattr(PromptServer, "instance", None)
        if server is not None and self.node_id is not None:
            server.send_progress_text(text, self.node_id)

    def show(self, chart: dict) -> None:
        """Draws a chart (`charts.py`) in the node now, in place of the last one; the node's own
        result replaces it at the end.
        """
        server = getattr(PromptServer, "instance", None)
        if server is not None and self.node_id is not None:
            server.send_sync(CHART_EVENT, {"node": self.node_id, "chart": chart}, server.client_id)

    def picture(self, done: int, total: int, preview: tuple) -> None:
        """Shows a picture under the node as samplers do; preview: (format, PIL image, largest
        side), as ComfyUI's previewers give it.
        """
        self.bar.update_absolute(done, max(total, 1), preview)

    @staticmethod
    def check() -> None:
        """Raises ComfyUI's InterruptProcessingException when the user pressed Stop."""
        comfy.model_management.throw_exception_if_processing_interrupted()
