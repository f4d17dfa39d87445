"""The quantize request for a file that stock ComfyUI opens: as every method's (`job`)."""

from __future__ import annotations

from dataclasses import dataclass

from ....quant.files.report import Report
from ....quant.job.checkpoint_run import QuantizeJob
from ....quant.svdquant.stock.quantize import StockJob
from .job import QuantizeRequest
from .svdquant import NO_PROMPTS


@dataclass(kw_only=True)
class StockRequest(QuantizeRequest):
    """What the user asked for."""

    method = StockJob

    @property
    def ending(self) -> str:
        return self.recipe.format

    @property
    def needs_inputs(self) -> bool:
        return self.recipe.preset == "best"

    def check(self) -> None:
        if self.recipe.preset == "best" and not self.positive:
            raise ValueError(NO_PROMPTS)

    def existing_report(self, job: QuantizeJob) -> Report | None:
        # what it was measured on is known only when the measurement is
        return None
