"""The formats as nn.Modules for scripts: a state dict under the names on disk, and a low-rank
branch that can be trained.
"""

from collections.abc import Callable
from typing import Any

from .awq_w4a16 import W4A16Weight
from .base import StoredLinear, StoredWeight
from .svdquant_nvfp4 import NVFP4Weight
from .svdquant_w4a4 import SVDQuantWeight
from .svdquant_w4a8 import W4A8Weight
from .vq import VQLinear


class SVDQuantLinear(StoredLinear):
    """svdquant_w4a4. train: proj_down, proj_up and the bias become parameters; codes, scales and
    smoothing never do.
    """

    weight_class = SVDQuantWeight

    def __init__(self, weight: SVDQuantWeight, train: bool = False):
        super().__init__(weight, ("proj_down", "proj_up", "bias") if train else ())


class W4A8Linear(StoredLinear):
    """svdquant_w4a8. train: as for `SVDQuantLinear`."""

    weight_class = W4A8Weight

    def __init__(self, weight: W4A8Weight, train: bool = False):
        super().__init__(weight, ("proj_down", "proj_up", "bias") if train else ())


class NVFP4Linear(StoredLinear):
    """svdquant_nvfp4. train: as for `SVDQuantLinear`."""

    weight_class = NVFP4Weight

    def __init__(self, weight: NVFP4Weight, train: bool = False):
        super().__init__(weight, ("proj_down", "proj_up", "bias") if train else ())


class W4A16Linear(StoredLinear):
    """awq_w4a16. train: the bias becomes a parameter."""

    weight_class = W4A16Weight

    def __init__(self, weight: W4A16Weight, train: bool = False):
        super().__init__(weight, ("bias",) if train else ())


# weight → its module, whose first argument is a weight of that very class
_MODULES: dict[type[StoredWeight], Callable[[Any, bool], StoredLinear]] = {
    module.weight_class: module
    for module in (SVDQuantLinear, W4A8Linear, NVFP4Linear, W4A16Linear, VQLinear)
}


def as_module(weight: StoredWeight, train: bool = False) -> StoredLinear:
    """The module for a quantized linear of any format."""
    return _MODULES[type(weight)](weight, train)
