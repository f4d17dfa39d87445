"""What the commands show: a progress bar on stderr, label and value on stdout."""

import sys
from typing import Any

from ...kernels.optional import optional
from ..job.monitor import BlockError, Monitor


def print_summary(title: object, lines: list[tuple[str, str]]) -> None:
    """A title, then its (label, value) lines."""
    print(title)
    for label, value in lines:
        print(f"  {label:<13} {value}")


class Bar:
    """A tqdm bar as a progress callback (done, total, what), drawn when the work starts: what is
    refused before is one line. Nothing where tqdm is absent, or with shown=False.
    """

    def __init__(self, unit: str = "weights", shown: bool = True):
        self.unit = unit
        self.shown = shown
        self.bar: Any = None

    def __enter__(self) -> "Bar":
        return self

    def _start(self) -> None:
        self.shown = False  # tried once
        tqdm, why = optional("tqdm")
        if tqdm is None:
            print(f"nibble: {why}, so there is no progress bar", file=sys.stderr)
            return
        self.bar = tqdm.tqdm(
            unit=f" {self.unit}", unit_scale=True, dynamic_ncols=True, file=sys.stderr
        )

    def __exit__(self, *_) -> None:
        if self.bar is not None:
            self.bar.close()

    def __call__(self, done: int, total: int, what: str) -> None:
        if self.shown:
            self._start()
        if self.bar is None:
            return
        self.bar.total = total
        self.bar.set_description_str(what, refresh=False)
        self.bar.update(done - self.bar.n)

    def note(self, error: BlockError) -> None:
        """A block's progress in calibration, behind the bar."""
        if self.bar is not None:
            self.bar.set_postfix_str(f"step {error.step}/{error.steps}, {error.db:.1f} dB")

    @property
    def monitor(self) -> Monitor:
        """The bar as a run's monitor."""
        return Monitor(progress=self, block_error=self.note)
