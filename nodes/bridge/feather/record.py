"""What is known of one run of a vision-language encoder: its images, and which of their tokens each
stage kept. It travels in the conditioning, for the report.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

KEY = "nibble_feather"  # of the hooks on the patcher, and of what the run kept in the conditioning


@dataclass
class Picture:
    """One image in a prompt: its place in the sequence, its raster of tokens, and which of them
    each stage kept.
    """

    start: int
    height: int
    width: int
    pixels: torch.Tensor  # (1, H, W, 3) in [0, 1], as the prompt had it
    masks: list[torch.Tensor] = field(default_factory=list)  # (height * width,) a stage

    @property
    def count(self) -> int:
        """How many tokens the image has."""
        return self.height * self.width

    def kept(self, stages: int | None = None) -> torch.Tensor:
        """Mask (count,) after so many stages; by default after all that have been decided."""
        masks = self.masks[:stages]
        return masks[-1] if masks else torch.ones(self.count, dtype=torch.bool)


@dataclass
class Prompt:
    """One run of the encoder: tokens in all, the place of the last one that is not padding, the
    images, and the model's sizes.
    """

    length: int
    last: int
    pictures: list[Picture]
    layers: int
    width: int
    hidden: int
    begins: tuple[int, ...]  # the layer that each stage begins with

    def mask(self, stages: int | None = None) -> torch.Tensor:
        """Which positions (length,) are still there: all text, and what was kept of the images."""
        left = torch.ones(self.length, dtype=torch.bool)
        for picture in self.pictures:
            left[picture.start : picture.start + picture.count] = picture.kept(stages)
        return left

    def tokens(self) -> list[int]:
        """How many tokens each layer runs on."""
        counts = [int(self.mask(stages).sum()) for stages in range(len(self.begins) + 1)]
        return [
            counts[sum(begin <= layer for begin in self.begins)] for layer in range(self.layers)
        ]
