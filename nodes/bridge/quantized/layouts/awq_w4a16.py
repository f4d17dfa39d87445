"""4-bit weights, 16-bit activations: modulation layers."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .....kernels import ops as kernels
from .....quant.weights.awq_w4a16 import W4A16Weight
from .....quant.weights.delta import WeightDelta
from .base import Layout, nibble_shape, shared_fields
from .tensor import LayoutParams, Tensors


class NibbleW4A16Layout(Layout):
    """`awq_w4a16`: qdata int8 (N, K/2) of codes 0…15; scale (K/64, N); zeros (K/64, N) or None.
    proj_* hold what was merged, in the file or by a patch.
    """

    FORMAT = W4A16Weight.FORMAT

    @dataclass(frozen=True)
    class Params(LayoutParams):
        zeros: torch.Tensor | None = None

    @classmethod
    def read(cls, tensors: Tensors, settings: dict, dtype: torch.dtype) -> Params:
        return cls.Params(
            scale=tensors["weight_scale"],
            orig_shape=nibble_shape(tensors["weight"]),
            zeros=tensors.get("weight_zeros"),
            **shared_fields(tensors, dtype),
        )

    @classmethod
    def settings(cls, params: Params) -> dict:
        settings = {"format": cls.FORMAT}
        if params.proj_up is not None:
            settings["rank"] = params.proj_up.shape[1]
        return settings

    @classmethod
    def stored(
        cls, qdata: torch.Tensor, params: Params, bias: torch.Tensor | None = None
    ) -> W4A16Weight:
        return W4A16Weight(
            qweight=qdata,
            scale=params.scale,
            zeros=params.zeros,
            bias=bias,
            proj_down=params.proj_down,
            proj_up=params.proj_up,
        )

    @classmethod
    def product(cls, x, weight, bias, changes):
        params = weight.params
        y = kernels.linear_w4a16(x, weight._qdata, params.scale, params.zeros, bias)
        return WeightDelta(down=params.proj_down, up=params.proj_up).on_output(y, x), changes
