"""The 16-bit model that a quantized one is calibrated against."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn


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
