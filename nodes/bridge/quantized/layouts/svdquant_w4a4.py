"""SVDQuant: 4-bit weights and activations."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .....quant.weights.svdquant_w4a4 import SVDQuantWeight, linear_w4a4
from .base import Layout, in_the_branch, nibble_shape, shared_fields
from .tensor import LayoutParams, Tensors


class NibbleSVDQuantLayout(Layout):
    """`svdquant_w4a4`: qdata int8 (N, K/2); scale (K/64, N); proj_down (K, R); proj_up (N, R);
    smooth_factor (K,), or (P, K) for P runs of rows.
    """

    FORMAT = SVDQuantWeight.FORMAT

    @dataclass(frozen=True)
    class Params(LayoutParams):
        smooth_factor: torch.Tensor | None = None
        act_unsigned: bool = False
        rotation: int = 0
        unsigned_from: int = 0
        smooth_rows: tuple[int, ...] = ()
        act_bits: int = 4  # that it computes with
        fitted_bits: int = 4  # that its file says

        def options(self) -> dict:
            """The fields that `SVDQuantWeight` has by the same names."""
            return {
                "act_unsigned": self.act_unsigned,
                "rotation": self.rotation,
                "unsigned_from": self.unsigned_from,
                "smooth_rows": self.smooth_rows,
                "act_bits": self.act_bits,
            }

    @classmethod
    def read(cls, tensors: Tensors, settings: dict, dtype: torch.dtype) -> Params:
        branch = {name: tensors[f"weight_{name}"] for name in ("proj_down", "proj_up")}
        return cls.Params(
            scale=tensors["weight_scale"],
            orig_shape=nibble_shape(tensors["weight"]),
            smooth_factor=tensors["weight_smooth_factor"],
            act_unsigned=bool(settings.get("act_unsigned", False)),
            rotation=int(settings.get("rotation", 0)),
            unsigned_from=int(settings.get("unsigned_from", 0)),
            smooth_rows=tuple(settings.get("smooth_rows", ())),
            act_bits=settings.get("act_bits", 4),
            fitted_bits=settings.get("act_bits", 4),
            **(shared_fields(tensors, dtype) | branch),
        )

    @classmethod
    def settings(cls, params: Params) -> dict:
        options = {name: value for name, value in params.options().items() if value}
        # said also where false: without Nibble's metadata, readers would guess by the layer's name
        options["act_unsigned"] = params.act_unsigned
        options["act_bits"] = params.fitted_bits
        if params.fitted_bits == 4:
            del options["act_bits"]  # earlier versions refuse what they do not know
        if params.smooth_rows:
            options["smooth_rows"] = list(params.smooth_rows)
        return {"format": cls.FORMAT, "rank": params.proj_down.shape[1]} | options

    @classmethod
    def stored(
        cls, qdata: torch.Tensor, params: Params, bias: torch.Tensor | None = None
    ) -> SVDQuantWeight:
        return SVDQuantWeight(
            qweight=qdata,
            scale=params.scale,
            proj_down=params.proj_down,
            proj_up=params.proj_up,
            smooth_factor=params.smooth_factor,
            bias=bias,
            **params.options(),
        )

    @classmethod
    def product(cls, x, weight, bias, changes):
        params = weight.params
        down, up, rest = in_the_branch(params, changes, x.dtype)
        return linear_w4a4(x, weight._qdata, params, down, up, bias), rest
