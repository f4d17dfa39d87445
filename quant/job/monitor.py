"""Who hears of a run while it works, and who can stop it."""

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class BlockError:
    """How a block is doing while it is calibrated: its number among `blocks`, its name, step and
    steps, error of its outputs in dB.
    """

    number: int
    blocks: int
    name: str
    step: int
    steps: int
    db: float


def ignore(*_) -> None:
    """Nobody listens."""


@dataclass(frozen=True)
class Monitor:
    """Callbacks of a run; by default nobody listens.

    progress     called before each layer or block with (weights done, weights in all, its name)
    cancelled    called before each layer, on a CPU also while one is made, and every few steps of
                 calibration; raises to stop. What is finished stays and the next run goes on from
                 there
    block_error  called every few steps of calibration
    layers       called with (layers done, layers in all) whenever either is known to have changed
    """

    progress: Callable[[int, int, str], None] = ignore
    cancelled: Callable[[], None] = ignore
    block_error: Callable[[BlockError], None] = ignore
    layers: Callable[[int, int], None] = ignore
