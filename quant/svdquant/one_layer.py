"""A layer at a time, from its weights alone, for whoever streams a model as diffusers' loader does.
It comes out as it does in a file of the same recipe.
"""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ..files import architectures
from ..files.architectures import LayerPlan
from ..job.whole_groups import with_zeros
from ..weights.formats import Weight
from .decompose import quantize_linear
from .nvfp4 import quantize_linear_nvfp4
from .quantize import generator_of
from .recipe import Recipe
from .w4a16 import quantize_w4a16


class DataFree:
    """Layers by the preset fast; options: fields of its `Recipe`. Raises ValueError for options
    that cannot be, or that compare the layers of a whole model.
    """

    def __init__(self, options: Mapping[str, Any]):
        self.recipe = Recipe.from_preset("fast", **options)
        if self.recipe.wide_share:
            raise ValueError(
                "wide_share compares all layers of a model, which a loader sees one by one; make a"
                " file, and load that"
            )

    def plan(self, shapes: Mapping[str, tuple[int, ...]], name: str) -> list[LayerPlan]:
        """What becomes of each linear of a model of these tensors. Raises FileRefused for what is
        no diffusion model.
        """
        architecture = architectures.recognise(shapes, name, native=True)
        return architectures.plan(shapes, architecture, self.recipe, name)

    def layer(self, plan: LayerPlan, weight: Tensor, bias: Tensor | None) -> Weight:
        """A linear of plan.action 'w4a4' or 'w4a16': weight (N, K) and bias (N,) in any float."""
        weight = with_zeros(weight.float())
        bias = None if bias is None else bias.float()
        if plan.action == "w4a16":
            return quantize_w4a16(weight, bias, None, self.recipe)[0]
        generator = generator_of(self.recipe, plan.name)
        known: dict[str, Any] = {"post_gelu": plan.post_gelu, "generator": generator}
        if self.recipe.floats:
            return quantize_linear_nvfp4(weight, bias, None, self.recipe, **known).weight
        return quantize_linear(weight, bias, None, self.recipe, **known)[0]
