"""Every choice of a run that makes a file for stock ComfyUI, checked on creation and written into
that file.
"""

from dataclasses import dataclass
from typing import ClassVar

from ...job.recipe import FromPreset
from .formats import FORMATS

PRESET_HELP = {
    "fast": "Rounds each weight to nearest, with scales that suit what the layers read.",
    "best": (
        "Records what the layers receive while the model generates pictures, and lets each weight"
        " make up for the rounding of those before it (GPTQ)."
    ),
}


@dataclass(frozen=True)
class StockRecipe(FromPreset):
    """How to quantize a model for stock ComfyUI. Make one with `StockRecipe.from_preset("fast" |
    "best", **changes)`.

    format      asym_w4a8_int8 | int8_convrot | nvfp4
    gptq        round each column so that the next ones make up for it (needs recorded inputs)
    keep        fnmatch patterns on module names, added to the architecture's own: kept in 16 bit
    modulation  modulation layers: "quantize" (in the same format) or "keep"
    seed        of every random choice
    """

    PRESETS: ClassVar[dict[str, dict]] = {"fast": {"gptq": False}, "best": {"gptq": True}}

    format: str = "asym_w4a8_int8"
    gptq: bool = False
    keep: tuple[str, ...] = ()
    modulation: str = "quantize"
    seed: int = 0
    # what a plan of layers asks of a recipe besides: these formats have neither
    rank: ClassVar[int] = 0
    act_unsigned: ClassVar[bool] = False
    w4a16: ClassVar[tuple[str, ...]] = ()

    def __post_init__(self):
        choices = {"format": tuple(FORMATS), "modulation": ("quantize", "keep")}
        for name, allowed in {"preset": tuple(self.PRESETS), **choices}.items():
            if getattr(self, name) not in allowed:
                raise ValueError(
                    f"{name}={getattr(self, name)!r} is not one of {', '.join(allowed)}"
                )
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"seed={self.seed} is not between 0 and {2**63 - 1}")
        if isinstance(self.keep, str) or not all(isinstance(p, str) for p in self.keep):
            raise ValueError(
                f"keep={self.keep!r} is not a list of name patterns such as 'double_blocks.0.*'"
            )
        object.__setattr__(self, "keep", tuple(self.keep))
