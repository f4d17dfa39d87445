"""What the commands show: a progress bar on stderr, label and value on stdout."""

import sys

from ..job.monitor import BlockError, Monitor


def print_summary(title: object, lines: list[tuple[str, str]]) -> None:
    """A title, then its (label, value) lines."""
    print(title)
    for label, value in lines:
        print(f"  {label:<13} {value}")


class Bar:
    """A tqdm bar as a progress callback (done, total, what)."""

    def __init__(self, unit: str = "weights"):
        self.unit = unit

    def __enter__(self) -> "Bar":
        from tqdm import tqdm

        self.bar = tqdm(unit=f" {self.unit}", unit_scale=True, dynamic_ncols=True, file=sys.stderr)
        return self

    def __exit__(self, *_) -> None:
        self.bar.close()

    def __call__(self, done: int, total: int, what: str) -> None:
        self.bar.total = total
        self.bar.set_description_str(what, refresh=False)
        self.bar.update(done - self.bar.n)

    def note(self, error: BlockError) -> None:
        """A block's progress in calibration, behind the bar."""
        self.bar.set_postfix_str(f"step {error.step}/{error.steps}, {error.db:.1f} dB")

    @property
    def monitor(self) -> Monitor:
        """The bar as a run's monitor."""
        return Monitor(progress=self, block_error=self.note)
