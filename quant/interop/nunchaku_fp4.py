"""Nunchaku's NVFP4 files (svdq-fp4): the INT4 files' names and orders (`nunchaku_read.py`), with
4-bit floats in the place of integers.

    qweight int8 (N, K/2), nibbles e2m1, in int4's order · wscales e4m3 (K/16, N), tiled · wtscale,
      one number, or wcscales (N,), tiled as a bias; neither: 1

No input is unsigned, and no bias has a shift in it. Modulations are AWQ, as there.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from ..files.errors import reader
from ..files.safetensors import Header, TensorInfo, TensorSpec
from ..weights.awq_w4a16 import W4A16Weight
from ..weights.base import StoredWeight, json_tensor
from ..weights.svdquant_nvfp4 import NVFP4Weight, join_columns, join_rows
from . import swizzle
from .names import Part, Recipe
from .nunchaku_read import NunchakuFile

_FLOATS = (torch.float16, torch.bfloat16, torch.float32)
_E4M3 = torch.float8_e4m3fn


def is_fp4(header: Header) -> bool:
    """Whether a file of Nunchaku's holds 4-bit floats, from its header."""
    return any(
        name.endswith((".wtscale", ".wcscales"))
        or (name.endswith(".wscales") and info.dtype == _E4M3)
        for name, info in header.tensors.items()
    )


class NunchakuFp4File(NunchakuFile):
    """An opened file; see QuantizedFile."""

    kind = "Nunchaku NVFP4"

    def _is_unsigned(self, module: str) -> bool:
        return False

    def _faults(self, module: str, infos: Mapping[str, TensorInfo]) -> str | None:
        if "wzeros" in infos:
            return super()._faults(module, infos)
        missing = [
            suffix
            for suffix in ("wscales", "smooth_factor", "proj_down", "proj_up")
            if suffix not in infos
        ]
        if missing:
            return f"lacks {module}.{missing[0]}; the file is damaged: download it again"
        shapes = {suffix: tuple(info.shape) for suffix, info in infos.items()}
        n, k = shapes["qweight"][0], shapes["qweight"][-1] * 2
        rank = shapes["proj_down"][-1]
        wanted = {
            "qweight": (n, k // 2),
            "wscales": (k // 16, n),
            "smooth_factor": (k,),
            "proj_down": (k, rank),
            "proj_up": (n, rank),
            "bias": (n,),
            "wcscales": (n,),
        }
        if n % 128 or k % 128 or rank % 16 or not rank:
            return f"has a layer of unknown shape, {module} ({shapes}); it was damaged"
        for suffix, info in infos.items():
            if suffix in wanted and shapes[suffix] != wanted[suffix]:
                return (
                    f"has a damaged layer: {module}.{suffix} has the shape {shapes[suffix]} and"
                    f" needs {wanted[suffix]}; download it again"
                )
            allowed = {"qweight": (torch.int8,), "wscales": (_E4M3,)}.get(suffix, _FLOATS)
            if info.dtype not in allowed:
                return (
                    f"stores {module}.{suffix} as {str(info.dtype).removeprefix('torch.')}, which"
                    " is no form of NVFP4 that Nibble knows; download the file again"
                )
        if "wtscale" in infos and infos["wtscale"].shape not in ((), (1,)):
            return f"has a damaged layer: {module}.wtscale is no single number; download it again"
        return None

    def _facts(self, name: str, recipe: Recipe) -> dict:
        facts = super()._facts(name, recipe)
        if facts["format"] == W4A16Weight.FORMAT:
            return facts
        if "smooth_rows" in facts:
            raise self.refusal(
                f"has {name} in pieces that smooth their input each in its own way, which Nibble"
                " cannot join at NVFP4; choose the file with int4 in its name"
            )
        if any(part.module in self._fused for part in recipe.parts):
            raise self.refusal(
                f"has the smoothing of {name} fused into the layer before, which Nibble cannot take"
                " out again at NVFP4; choose the file with int4 in its name"
            )
        widths = [2 * self._info(f"{part.module}.qweight").shape[1] for part in recipe.parts]
        joined = recipe.axis == 1 and len(widths) > 1
        return {"format": NVFP4Weight.FORMAT, "rank": facts["rank"]} | (
            {"scale_columns": widths} if joined else {}
        )

    @reader
    def specs(self, name: str) -> list[TensorSpec]:
        facts = self.layers.get(name, {})
        if facts.get("format") != NVFP4Weight.FORMAT:
            return super().specs(name)
        recipe = self._recipes[name]
        sizes = [self._info(f"{part.module}.qweight").shape for part in recipe.parts]
        heights = [size[0] // p.pieces for size, p in zip(sizes, recipe.parts, strict=True)]
        widths = facts.get("scale_columns") or [2 * sizes[0][1]]
        n, k = heights[0] if recipe.axis else sum(heights), sum(widths)
        first, r = recipe.parts[0].module, facts["rank"]
        kept = {suffix: self._info(f"{first}.{suffix}").dtype for suffix in _OWN_DTYPES}
        specs = [
            ("weight", torch.int8, (n, k // 2)),
            ("weight_scale", _E4M3, (n, k // 16)),
            ("weight_scale_2", torch.float32, (len(widths), n)),
            ("weight_proj_down", kept["proj_down"], (k, r)),
            ("weight_proj_up", kept["proj_up"], (n, r)),
            ("weight_smooth_factor", kept["smooth_factor"], (k,)),
            ("comfy_quant", torch.uint8, tuple(json_tensor(facts).shape)),
        ]
        biased = [p.module for p in recipe.parts if f"{p.module}.bias" in self._stored]
        if biased:
            specs.append(("bias", self._info(f"{biased[0]}.bias").dtype, (n,)))
        return [TensorSpec(f"{name}.{suffix}", dtype, shape) for suffix, dtype, shape in specs]

    def _joined(self, name: str, recipe: Recipe) -> StoredWeight:
        join = join_columns if recipe.axis else join_rows
        return self._in_order(name, join([self._nvfp4(part) for part in recipe.parts]))

    def _nvfp4(self, part: Part) -> NVFP4Weight:
        def tensor(suffix: str) -> Tensor | None:
            key = f"{part.module}.{suffix}"
            return self._read(key) if key in self._stored else None

        def needed(suffix: str) -> Tensor:
            return self._read(f"{part.module}.{suffix}")

        n = self._info(f"{part.module}.qweight").shape[0]
        whole, rows, bias = tensor("wtscale"), tensor("wcscales"), tensor("bias")
        scale_2 = torch.ones(n) if rows is None else swizzle.vector_from_nunchaku(rows).float()
        if whole is not None:
            scale_2 = scale_2 * whole.float().reshape(())
        weight = NVFP4Weight(
            swizzle.weight_from_nunchaku(needed("qweight")),
            swizzle.micro_from_nunchaku(needed("wscales")),
            scale_2[None],
            swizzle.down_from_nunchaku(needed("proj_down")),
            swizzle.up_from_nunchaku(needed("proj_up")),
            swizzle.vector_from_nunchaku(needed("smooth_factor")),
            None if bias is None else swizzle.vector_from_nunchaku(bias),
        )
        if part.pieces == 1:
            return weight
        height = n // part.pieces
        return weight.rows(part.piece * height, (part.piece + 1) * height)


_OWN_DTYPES = ("proj_down", "proj_up", "smooth_factor")
