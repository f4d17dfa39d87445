"""W4A8: 4-bit weights read as int8, activations of 8 bits."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .....kernels import ops as kernels
from .....quant.weights.svdquant_w4a8 import W4A8Weight
from .base import Layout, shared_fields
from .tensor import LayoutParams, Tensors


class NibbleW4A8Layout(Layout):
    """`svdquant_w4a8`: qdata int8 (N, K/2); scale int8 (K/g, N); channel_scale (N,); table int8
    (16,); smooth_factor (K,); proj_* the file's branch and patches.
    """

    FORMAT = W4A8Weight.FORMAT

    @dataclass(frozen=True)
    class Params(LayoutParams):
        channel_scale: torch.Tensor | None = None
        table: torch.Tensor | None = None
        smooth_factor: torch.Tensor | None = None
        rotation: int = 0

        @property
        def branch_dtype(self) -> torch.dtype:
            """Its scales are integers."""
            return self.smooth_factor.dtype

    @classmethod
    def read(cls, tensors: Tensors, settings: dict, dtype: torch.dtype) -> Params:
        own = ("scale", "channel_scale", "table", "smooth_factor")
        params = cls.Params(
            orig_shape=(0, 0),
            rotation=int(settings.get("rotation", 0)),
            **{name: tensors[f"weight_{name}"] for name in own},
            **shared_fields(tensors, dtype),
        )
        checked = cls.stored(tensors["weight"], params)  # the shapes
        return cls.Params(**(vars(params) | {"orig_shape": checked.shape}))

    @classmethod
    def settings(cls, params: Params) -> dict:
        rank = 0 if params.proj_up is None else params.proj_up.shape[1]
        options = {"rotation": params.rotation, "rank": rank}
        group = params.smooth_factor.shape[0] // params.scale.shape[0]
        return {"format": cls.FORMAT, "group": group} | {
            name: value for name, value in options.items() if value
        }

    @classmethod
    def stored(
        cls, qdata: torch.Tensor, params: Params, bias: torch.Tensor | None = None
    ) -> W4A8Weight:
        return W4A8Weight(
            qweight=qdata,
            scale=params.scale,
            channel_scale=params.channel_scale,
            table=params.table,
            smooth_factor=params.smooth_factor,
            proj_down=params.proj_down,
            proj_up=params.proj_up,
            bias=bias,
            rotation=params.rotation,
        )

    @classmethod
    def product(cls, x, weight, bias, changes):
        p = weight.params
        tensors = (weight._qdata, p.scale, p.channel_scale, p.table, p.smooth_factor)
        y = kernels.linear_w4a8(x, *tensors, p.proj_down, p.proj_up, bias, p.rotation)
        return y, changes
