"""SVDQuant's quantize request: as every method's (`job`); the preset best needs prompts."""

from __future__ import annotations

from dataclasses import dataclass

from ....quant.svdquant.nvfp4.quantize import NVFP4Job, NVFP4Recipe
from ....quant.svdquant.quantize import SVDQuantJob
from .job import QuantizeRequest

NO_PROMPTS = (
    "The preset 'best' watches the model while it samples your own prompts. Connect a text"
    " encoder's CONDITIONING to 'positive' (join several prompts with Conditioning (Combine)), or"
    " choose the preset 'fast'."
)


@dataclass(kw_only=True)
class SVDQuantRequest(QuantizeRequest):
    """What the user asked for."""

    method = SVDQuantJob

    def __post_init__(self) -> None:
        if isinstance(self.recipe, NVFP4Recipe):
            self.method = NVFP4Job  # type: ignore[misc]  (of this request, not of all)

    @property
    def ending(self) -> str:
        form = "fp4" if isinstance(self.recipe, NVFP4Recipe) else "int4"
        return f"svdq-{form}-r{self.recipe.rank}"

    @property
    def needs_inputs(self) -> bool:
        return self.recipe.preset == "best"

    def check(self) -> None:
        if self.recipe.preset == "best" and not self.positive:
            raise ValueError(NO_PROMPTS)
