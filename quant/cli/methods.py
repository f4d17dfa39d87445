"""The method that a recipe belongs to: for callers that offer several."""

from pathlib import Path

from ..files.atomic import Held
from ..files.source import Source, StateDictSource
from ..job.checkpoint_run import QuantizeJob
from ..svdquant.quantize import SVDQuantJob
from ..svdquant.recipe import Recipe as SVDQuantRecipe
from ..svdquant.stock.quantize import StockJob
from ..svdquant.stock.recipe import StockRecipe
from ..vq4dit.quantize import VQJob
from ..vq4dit.recipe import Recipe as VQRecipe

JOBS: dict[type, type[QuantizeJob]] = {
    SVDQuantRecipe: SVDQuantJob,
    StockRecipe: StockJob,
    VQRecipe: VQJob,
}


def prepare(
    source: str | Path | Source | StateDictSource,
    target: str | Path | Held,
    recipe: SVDQuantRecipe | StockRecipe | VQRecipe,
) -> QuantizeJob:
    """The job of a recipe's method; see `QuantizeJob.prepare`."""
    return JOBS[type(recipe)].prepare(source, target, recipe)
