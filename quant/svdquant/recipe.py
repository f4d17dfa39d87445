"""Every choice of a quantization run, checked on creation and written into the file that it
makes.
"""

import json
from dataclasses import asdict, dataclass
from fnmatch import fnmatchcase
from typing import ClassVar

from ...kernels.reference.w4a8 import GROUPS
from ..job.recipe import FromPreset

PRESETS = {
    "fast": dict(solver="alternating", iterations=2, gptq=False, smoothing_grid=4),
    "best": dict(
        solver="alternating", iterations=6, gptq=True, smoothing_grid=10, smoothing_steps=60
    ),
}
PRESET_HELP = {
    "fast": (
        "Needs no data: uses the weights, and noise run through the 16-bit model if it fits in"
        " memory. Takes minutes."
    ),
    "best": (
        "Records what the layers receive while the model generates pictures, then fits rounding"
        " and low-rank branch to it. Closest to the 16-bit model."
    ),
}
# of the multiplications, where it is left to us: what a share brings for its cost is most there
# (demo model, velocity's error; docs/tried.md)
WIDE_SHARE = 0.5
_CHOICES = {
    "preset": tuple(PRESETS),
    "solver": ("alternating", "svd"),
    "rotation": ("auto", "on", "off"),
    "modulation": ("w4a16", "keep"),
    "act_bits": (4, 8),
    "format": ("svdquant_w4a4", "svdquant_w4a8", "svdquant_nvfp4"),
    "group": GROUPS,
}


@dataclass(frozen=True)
class Recipe(FromPreset):
    """How to quantize a model. Make one with `Recipe.from_preset("fast" | "best", **changes)`.

    preset          where the other values came from
    format          of the layers: "svdquant_w4a4", which runs with activations of 4 or 8 bits;
      "svdquant_w4a8", which is closer with 8 and has no other; "svdquant_nvfp4", 4-bit floats
    group           columns that share a scale of svdquant_w4a8: 16, 32 or 64 (else always 64)
    rank            of the 16-bit low-rank branch: a multiple of 16, 16..256; svdquant_w4a8 can do
      without, 0
    solver          "svd": the branch is fitted once (SVDQuant, eq. 6); "alternating": in turns with
      the 4-bit part
    iterations      turns of the alternating solver; the best one is kept
    rotation        64-point Hadamard after smoothing: "auto" measures both on recorded inputs, and
      rotates without them; svdquant_nvfp4 has none
    gptq            round each column so that the next ones make up for it (needs recorded inputs;
      w4a16 layers do so in any case)
    smoothing_grid  n: smoothing exponents i/n for i = 0..n (SVDQuant's search has n = 20)
    smoothing_steps of learning the factors from there (needs recorded inputs); 0, and in
      svdquant_nvfp4: none
    clip_search     search each group's scale instead of absmax / 7
    act_bits        of the activations that layers are fitted for: 4, or 8 (Hopper, Blackwell,
      CPU)
    wide_share      of the multiplications of W4A4 layers that may have activations of 8 bits with
      act_bits=4: in the layers that gain most by them
    act_unsigned    allow unsigned activations of 4 bits behind a GELU
    keep, w4a16     fnmatch patterns on module names, added to the architecture's own: kept in 16
      bit, or 4-bit weights only
    modulation      modulation layers: "w4a16" or "keep"
    seed            of every random choice
    compare         svdquant_nvfp4: tell in the report what int4 would have given each layer (twice
      the time)
    """

    PRESETS = PRESETS
    rows8: ClassVar[bool] = True  # text encoders' tables get 8-bit rows

    preset: str = "fast"
    rank: int = 32
    solver: str = "alternating"
    iterations: int = 2
    rotation: str = "auto"
    gptq: bool = False
    smoothing_grid: int = 4
    clip_search: bool = True
    act_unsigned: bool = True
    keep: tuple[str, ...] = ()
    w4a16: tuple[str, ...] = ()
    modulation: str = "w4a16"
    seed: int = 0
    act_bits: int = 4
    format: str = "svdquant_w4a4"
    group: int = 32
    compare: bool = False
    smoothing_steps: int = 0
    wide_share: float = 0.0

    def __post_init__(self):
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in choices:
                raise ValueError(
                    f"{name}={getattr(self, name)!r} is not one of {', '.join(map(str, choices))}"
                )
        if self.table and self.wide_share:
            raise ValueError(
                "svdquant_w4a8 has activations of 8 bits alone; choose the format svdquant_w4a4 for"
                " activations 'auto'"
            )
        if self.table:
            object.__setattr__(self, "act_bits", 8)
        self._only_floats()
        if not (self.table and self.rank == 0) and (self.rank % 16 or not 16 <= self.rank <= 256):
            raise ValueError(f"rank={self.rank} is not a multiple of 16 between 16 and 256")
        for name, (low, high) in {
            "iterations": (1, 100),
            "smoothing_grid": (1, 100),
            "smoothing_steps": (0, 1000),
            "seed": (0, 2**63 - 1),
        }.items():
            if not low <= getattr(self, name) <= high:
                raise ValueError(f"{name}={getattr(self, name)} is not between {low} and {high}")
        if self.wide_share and (self.act_bits == 8 or not 0 <= self.wide_share <= 1):
            raise ValueError(
                f"wide_share={self.wide_share} is not a share, 0 to 1, of the multiplications that"
                " get activations of 8 bits while the others have 4"
            )
        for name in ("keep", "w4a16"):
            patterns = getattr(self, name)
            if isinstance(patterns, str) or not all(isinstance(p, str) for p in patterns):
                raise ValueError(
                    f"{name}={patterns!r} is not a list of name patterns such as"
                    " 'double_blocks.0.*'"
                )
            object.__setattr__(self, name, tuple(patterns))

    def _only_floats(self) -> None:
        if not self.floats:
            if self.compare:
                raise ValueError("compare is for the format svdquant_nvfp4; leave it out")
            return
        if self.rotation == "on" or self.act_bits == 8 or self.wide_share:
            raise ValueError(
                "4-bit floats (svdquant_nvfp4) have no rotation and no activations of 8 bits; leave"
                " it out"
            )
        object.__setattr__(self, "rotation", "off")
        object.__setattr__(self, "act_unsigned", False)
        object.__setattr__(self, "smoothing_steps", 0)  # not built for 4-bit floats

    @property
    def floats(self) -> bool:
        """Whether weights and activations become 4-bit floats."""
        return self.format == "svdquant_nvfp4"

    @property
    def table(self) -> bool:
        """Whether weights get the levels of a table."""
        return self.format == "svdquant_w4a8"

    @property
    def widths(self) -> str:
        """Of weights and activations, as people write them."""
        return "W4A4 and W4A8" if self.wide_share else f"W4A{self.act_bits}"

    @property
    def ties(self) -> str:
        if self.wide_share:
            return "activations 'auto' are shared out over all layers"
        return super().ties

    def to_json(self) -> str:
        """Every value, as JSON text; what earlier versions did not have only where it is not what
        they did, so that their files are those of the same recipe.
        """
        values = asdict(self)
        if not self.table:
            del values["group"]
            if not self.floats:
                del values["format"]
        if not self.floats:
            del values["compare"]
        if self.act_bits == 4:
            del values["act_bits"]
        for later in ("smoothing_steps", "wide_share"):
            if not values[later]:
                del values[later]
        return json.dumps(values)

    def matches(self, patterns: tuple[str, ...], name: str) -> bool:
        """Whether a module's name matches one of the patterns."""
        return any(fnmatchcase(name, pattern) for pattern in patterns)
