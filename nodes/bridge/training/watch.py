"""What a training shows while it runs, and what is left of it when it stops: a state file beside
the file to be.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path

from ..host.progress import Progress

EVERY = 1.0  # seconds between two drawings of the curve


class Watch:
    """Sees every step: bar and text, the curve now and then, a preview every so often, Stop.

    chart: summary lines → the curve so far; preview_every: steps, 0 for none
    """

    def __init__(self, node_id: str | None, chart: Callable[[list], dict], preview_every: int):
        self.progress = Progress("training", node_id, unit="step", resumes=True)
        self.chart = chart
        self.preview_every = preview_every
        self._drawn = 0.0
        self._began: tuple[float, int] | None = None  # when the first step was done, and which

    def __call__(
        self, step: int, steps: int, text: str, preview: Callable[[], tuple | None]
    ) -> None:
        """After each step, of `steps` in all. Raises ComfyUI's interrupt."""
        if self._began is None:
            self._began = (time.monotonic(), step)
        self.progress(step, steps, text)
        if time.monotonic() - self._drawn > EVERY or step == steps:
            self.progress.show(self.chart([("speed", self.speed(step))]))
            self._drawn = time.monotonic()
        if self.preview_every and (step % self.preview_every == 0 or step == steps):
            picture = preview()
            if picture is not None:
                self.progress.picture(step, steps, picture)

    def speed(self, step: int) -> str:
        """Seconds a step, since the first one of this run."""
        began, first = self._began
        if step == first:
            return "measuring"
        return f"{(time.monotonic() - began) / (step - first):.3g} s a step"


def what_is_kept(message: str, losses: Sequence[float], state: Path) -> str:
    """An error's sentence, and what is left of the run."""
    if not losses or not state.exists():
        return message
    return (
        f"{message.rstrip('.')}. The {len(losses)} steps before are kept: run again with a lower"
        " learning rate to resume from them."
    )
