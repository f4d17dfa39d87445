"""Every choice of a vector-quantization run, checked on creation and written into the file that it
makes.
"""

import math
import zlib
from dataclasses import dataclass

from ..files.layer_formats import CODEWORDS
from ..job.recipe import FromPreset
from . import codebook as codebooks
from .fit import LayerOptions

LAYOUTS: dict[float, tuple[int, int]] = {
    2: (256, 4),
    3: (64, 2),
    4: (256, 2),
}  # bits a weight → codewords, weights each
MIXED_LAYOUTS = {1.5: (64, 4), **LAYOUTS}  # what mixed bits mix
PRESETS = {
    "fast": dict(candidates=1, steps=0, scaled=True, turns=2),
    "vq4dit": dict(candidates=2, steps=160, scaled=False, turns=0),
    "best": dict(candidates=1, steps=120, scaled=True, turns=3, mixed=True),
}
PRESET_HELP = {
    "fast": (
        "One layer after another, in closed form: k-means with a scale for each row, from the"
        " weights alone or with recorded inputs too."
    ),
    "vq4dit": (
        "The paper's method: each group of weights chooses among the nearest codebook entries by"
        " the output of its block, without any pictures to learn from."
    ),
    "best": (
        "Most bits where the picture needs them most, indices that make up for one another's"
        " errors, then codebooks, scales and biases fitted to the output of each block. Closest to"
        " the 16-bit model."
    ),
}
_CHOICES = {
    "preset": tuple(PRESETS),
    "bits": tuple(LAYOUTS),
    "rotation": (0, 64),
    "modulation": ("vq", "keep"),
}
_RANGES = {"candidates": (1, 8), "steps": (0, 100_000), "turns": (0, 20), "seed": (0, 2**63 - 1)}


@dataclass(frozen=True)
class Recipe(FromPreset):
    """How to quantize a model to codewords. Make one with `Recipe.from_preset("fast" | "vq4dit" |
    "best", **changes)`.

    preset      where the other values came from
    bits        a weight, of the usual layouts: 2 = 256 codewords of 4 weights, 3 = 64 of 2, 4 = 256
      of 2
    codewords, vector  another layout: a power of two of codewords, of so many weights each
    candidates  nearest codewords that a sub-vector may choose from (1: the nearest)
    steps       of calibration a block (0: none; more than 0 needs the 16-bit model to run)
    scaled      a 16-bit scale for each row
    rotation    64: 64-point Hadamard on the inputs of each layer
    turns       of Hessian feedback, codebook and scales (0: the nearest codewords; needs recorded
      inputs)
    budget_gb   size of the whole file: layers get 2, 3 or 4 bits by what each needs most (None: all
      `bits`)
    mixed       the bytes of `bits` for all layers together, spread by how much each layer's error
      matters to the model (with calibration alone; layers get 2, 3 or 4 bits, at `bits` 2 also 1.5)
    keep        fnmatch patterns on module names, added to the architecture's own: kept in 16 bit
    modulation  modulation layers: "vq" or "keep"
    seed        of every random choice
    """

    PRESETS = PRESETS

    preset: str = "fast"
    bits: int = 3
    codewords: int | None = None
    vector: int | None = None
    candidates: int = 1
    steps: int = 0
    scaled: bool = True
    rotation: int = 0
    turns: int = 2
    budget_gb: float | None = None
    keep: tuple[str, ...] = ()
    modulation: str = "vq"
    seed: int = 0
    mixed: bool = False

    def __post_init__(self):
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in choices:
                raise ValueError(
                    f"{name}={getattr(self, name)!r} is not one of {', '.join(map(str, choices))}"
                )
        for name, (low, high) in _RANGES.items():
            if not low <= getattr(self, name) <= high:
                raise ValueError(f"{name}={getattr(self, name)} is not between {low} and {high}")
        if (self.codewords is None) != (self.vector is None):
            raise ValueError("codewords and vector go together: give both, or neither and bits")
        if (
            self.codewords is not None
            and self.vector is not None
            and (self.codewords not in CODEWORDS or not 1 <= self.vector <= 16)
        ):
            raise ValueError(
                f"codewords={self.codewords}, vector={self.vector}: codewords must be a power of"
                " two up to 65536, vector 1 to 16"
            )
        if self.budget_gb is not None and (
            self.codewords is not None or not 0 < self.budget_gb < math.inf
        ):
            raise ValueError(
                "budget_gb is a positive number of GB, and chooses the layouts itself: leave"
                " codewords and vector alone"
            )
        if isinstance(self.keep, str) or not all(isinstance(pattern, str) for pattern in self.keep):
            raise ValueError(
                f"keep={self.keep!r} is not a list of name patterns such as 'double_blocks.0.*'"
            )
        object.__setattr__(self, "keep", tuple(self.keep))

    # What `architectures.plan` asks of a recipe, and codewords do not have: no low-rank branch, no
    # 4-bit layers, no quantized activations.
    rank, w4a16, act_unsigned = 0, (), False

    @property
    def calibrated(self) -> bool:
        """Whether the 16-bit model has to run, block by block."""
        return self.steps > 0

    @property
    def measures_sensitivity(self) -> bool:
        """Whether layers get bits by what the 16-bit model says of them: with calibration, for a
        budget or for mixed bits (at 4 bits all have the most already).
        """
        mixed = self.mixed and self.codewords is None and self.bits < max(LAYOUTS)
        return self.calibrated and (mixed or self.budget_gb is not None)

    @property
    def ties(self) -> str:
        if self.budget_gb is not None:
            return "a budget is shared out over all layers"
        if self.calibrated:
            return "calibration (steps above 0) runs the whole model, block after block"
        return super().ties

    def seed_of(self, name: str) -> int:
        """Where a layer's or block's own random numbers start."""
        return zlib.crc32(f"{self.seed} {name}".encode())

    def layout(self, shape: tuple[int, int], bits: float | None = None) -> tuple[int, int]:
        """(codewords, weights each) for an N x K layer, smaller ones with fewer codewords; bits:
        other than the recipe's.
        """
        if self.codewords is not None and self.vector is not None:
            codewords, vector = self.codewords, self.vector
        else:
            codewords, vector = MIXED_LAYOUTS[bits or self.bits]
        return codebooks.fitting_codewords(codewords, vector, shape), vector

    def layer_options(self, layout: tuple[int, int]) -> LayerOptions:
        """The choices for a layer of this layout."""
        return LayerOptions(*layout, scaled=self.scaled, rotation=self.rotation, turns=self.turns)
