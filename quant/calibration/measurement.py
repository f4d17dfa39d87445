"""What a quantization knows of the 16-bit model at work: recorded inputs, or the model itself."""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import nn

from .statistics import InputStats


@dataclass
class Teacher:
    """The 16-bit model at work.

    model   any nn.Module; it is run and never changed
    run     calls the model as a sampler does, the same each time; what it is conditioned on is its
            own business (noise and random conditioning need no data)
    parts   the modules that make up a layer of the file, in the order of its rows
    cap     bytes of one block's recorded inputs and outputs to hold at once: beyond it, fewer of
            the calls are used
    device  that the model's inputs belong on
    """

    model: nn.Module
    run: Callable[[], None]
    parts: Callable[[str], list[str]] = lambda name: [name]
    cap: int = 2 << 30
    device: torch.device | str = "cpu"


def no_statistics(name: str) -> InputStats | None:
    """Of no layer is anything known."""
    return None


@dataclass(frozen=True)
class Measurement:
    """What a run is given about the layers' inputs; by default nothing.

    provenance  where it comes from, as JSON: stands in the file, and a file of another provenance
                is another file
    statistics  a layer's name → its recorded inputs, None where there are none
    teacher     for recipes that calibrate block by block
    """

    provenance: dict = field(default_factory=dict)
    statistics: Callable[[str], InputStats | None] = no_statistics
    teacher: Teacher | None = None
