"""SVDQuant's quantize request: as every method's (`job`); the preset best needs prompts."""

from __future__ import annotations

from dataclasses import dataclass

from ....quant.svdquant.quantize import SVDQuantJob
from .job import QuantizeRequest

NO_PROMPTS = (
    "The preset 'best' watches the model while it samples your own prompts. Connect a text"
    " encoder's CONDITIONING to 'positive' (join several prompts with Conditioning (Combine)), or"
    " the text encoder to 'clip' for Nibble's own prompts, or choose the preset 'fast'."
)


@dataclass(kw_only=True)
class SVDQuantRequest(QuantizeRequest):
    """What the user asked for."""

    method = SVDQuantJob

    @property
    def ending(self) -> str:
        kind = "int4" if self.recipe.act_bits == 4 else "int4a8"
        if self.recipe.wide_share:
            kind = "int4auto"
        kind = {"svdquant_w4a8": "w4a8", "svdquant_nvfp4": "fp4"}.get(self.recipe.format, kind)
        return f"svdq-{kind}-r{self.recipe.rank}"

    @property
    def needs_inputs(self) -> bool:
        return self.recipe.preset == "best"

    def check(self) -> None:
        if self.recipe.preset == "best" and not self.positive and self.clip is None:
            raise ValueError(NO_PROMPTS)
