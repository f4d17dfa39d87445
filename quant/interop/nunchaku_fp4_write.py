"""A model of 4-bit floats as Nunchaku's programs read it: `nunchaku_fp4.py` the other way round."""

import json

import torch
from torch import Tensor

from ..files.checkpoint import QuantizedFile
from ..weights.svdquant_nvfp4 import NVFP4Weight, join_rows, split_columns, split_rows
from . import swizzle
from .nunchaku_write import GAIN, ToNunchaku


def to_nunchaku(source: QuantizedFile) -> ToNunchaku:
    """The conversion that suits a file's layers."""
    floats = any(facts["format"] == NVFP4Weight.FORMAT for facts in source.layers.values())
    return ToNunchakuFp4(source) if floats else ToNunchaku(source)


class ToNunchakuFp4(ToNunchaku):
    """One file with Nunchaku's names, its linears in NVFP4."""

    FORMATS = (NVFP4Weight.FORMAT, "awq_w4a16")
    W4A4 = NVFP4Weight.FORMAT

    def _weight(self, module: str) -> NVFP4Weight:  # type: ignore[override]
        pieces = []
        for provider in self._providers[module]:
            target = provider.target
            weight = NVFP4Weight.from_tensors(self.source.layer(target), target)
            if len(provider.parts) > 1:
                n, k = weight.shape
                sizes = [n, k - n] if provider.axis else [3 * k, n - 3 * k]
                split = split_columns if provider.axis else split_rows
                weight = split(weight, sizes)[provider.place]
            pieces.append(weight)
        try:
            return join_rows(pieces)
        except ValueError as error:
            raise self.refused(
                self._providers[module][0].target, "has q, k and v that differ in smoothing", GAIN
            ) from error

    def _w4a4(self, module: str, weight: NVFP4Weight) -> dict[str, Tensor]:  # type: ignore[override]
        n, k = weight.shape
        if n % 128 or k % 128:
            raise self.refused(module, f"has {n} x {k} weights", "Nunchaku's need multiples of 128")
        if weight.rounded:
            self._note("inputs are coded by the scale before its rounding, as Nunchaku does it")
        down, up = (
            torch.nn.functional.pad(t, (0, self.rank - weight.rank))
            for t in (weight.proj_down, weight.proj_up)
        )
        smooth = swizzle.vector_to_nunchaku(weight.smooth_factor)
        tensors = {
            "qweight": swizzle.weight_to_nunchaku(weight.qweight.contiguous()),
            "wscales": swizzle.micro_to_nunchaku(weight.scale.contiguous()),
            "proj_down": swizzle.down_to_nunchaku(down),
            "proj_up": swizzle.up_to_nunchaku(up),
            "smooth_factor": smooth,
            "smooth_factor_orig": smooth.clone(),
            **self._row_scales(weight),
        }
        if weight.bias is not None:
            bias = weight.bias.to(weight.smooth_factor.dtype)
            tensors["bias"] = swizzle.vector_to_nunchaku(bias)
        return tensors

    def _row_scales(self, weight: NVFP4Weight) -> dict[str, Tensor]:
        rows = weight.scale_2[0].float()
        if rows.eq(rows[0]).all():
            return {"wtscale": rows[:1].clone()}
        kept = rows.to(weight.smooth_factor.dtype)
        if not torch.equal(kept.float(), rows):
            self._note("scales of rows were rounded to 16 bits, as Nunchaku keeps them")
        return {"wcscales": swizzle.vector_to_nunchaku(kept)}

    def metadata(self, bytes_after: int) -> dict[str, str]:
        facts = super().metadata(bytes_after)
        group = {"dtype": "fp4_e2m1_all", "group_size": 16}
        config = json.loads(facts["quantization_config"]) | {
            "weight": group | {"scale_dtype": [None, "fp8_e4m3_nan"]},
            "activation": group | {"scale_dtype": "fp8_e4m3_nan"},
        }
        return facts | {"quantization_config": json.dumps(config)}
