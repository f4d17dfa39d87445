"""SVDQuant on 4-bit floats (NVFP4)."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .....quant.weights.svdquant_nvfp4 import NVFP4Weight, linear_nvfp4
from .base import Layout, in_the_branch, nibble_shape, shared_fields
from .tensor import LayoutParams, Tensors


class NibbleNVFP4Layout(Layout):
    """`svdquant_nvfp4`: qdata int8 (N, K/2); scale e4m3 (N, K/16); scale_2 (P, N); proj_down (K,
    R); proj_up (N, R); smooth_factor (K,).
    """

    FORMAT = NVFP4Weight.FORMAT

    @dataclass(frozen=True)
    class Params(LayoutParams):
        scale_2: torch.Tensor | None = None
        smooth_factor: torch.Tensor | None = None
        scale_columns: tuple[int, ...] = ()
        rounded: bool = False

        @property
        def branch_dtype(self) -> torch.dtype:
            return self.proj_down.dtype

    @classmethod
    def read(cls, tensors: Tensors, settings: dict, dtype: torch.dtype) -> Params:
        return cls.Params(
            scale=tensors["weight_scale"],
            orig_shape=nibble_shape(tensors["weight"]),
            scale_2=tensors["weight_scale_2"],
            smooth_factor=tensors["weight_smooth_factor"],
            scale_columns=tuple(settings.get("scale_columns", ())),
            rounded=bool(settings.get("rounded", False)),
            **shared_fields(tensors, dtype),
        )

    @classmethod
    def settings(cls, params: Params) -> dict:
        options = {"scale_columns": list(params.scale_columns), "rounded": params.rounded}
        return {"format": cls.FORMAT, "rank": params.proj_down.shape[1]} | {
            name: value for name, value in options.items() if value
        }

    @classmethod
    def stored(
        cls, qdata: torch.Tensor, params: Params, bias: torch.Tensor | None = None
    ) -> NVFP4Weight:
        return NVFP4Weight(
            qweight=qdata,
            scale=params.scale,
            scale_2=params.scale_2,
            proj_down=params.proj_down,
            proj_up=params.proj_up,
            smooth_factor=params.smooth_factor,
            bias=bias,
            scale_columns=params.scale_columns,
            rounded=params.rounded,
        )

    @classmethod
    def product(cls, x, weight, bias, changes):
        params = weight.params
        down, up, rest = in_the_branch(params, changes, x.dtype)
        return linear_nvfp4(x, cls.stored(weight._qdata, params, bias), down, up), rest
