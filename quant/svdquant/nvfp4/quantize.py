"""A whole checkpoint to 4-bit floats: `quantize.py` of the folder above with other layers."""

import math
import zlib
from dataclasses import dataclass

import torch
from torch import Tensor

from ...files.architectures import LayerPlan
from ...files.layer_formats import FORMATS
from ...files.report import LayerRow
from ...files.safetensors import TensorSpec
from ...files.writer import Writer
from ...job.measurement import Measurement
from ...job.monitor import Monitor
from ...job.run_metadata import WHY_ROOM, padded
from ..quantize import SVDQuantizer, SVDQuantJob, layout
from ..recipe import Recipe
from .decompose import quantize_linear_nvfp4


@dataclass(frozen=True)
class NVFP4Recipe(Recipe):
    """`Recipe` for 4-bit floats; rotation is off, for the format has none. compare: tell in the
    report what int4 would have given each layer (twice the time).
    """

    rotation: str = "off"
    act_unsigned: bool = False
    compare: bool = False
    format: str = "nvfp4"

    def __post_init__(self):
        super().__post_init__()
        if self.rotation != "off":
            raise ValueError("4-bit floats (nvfp4) have no rotation; leave it out")


class NVFP4Job(SVDQuantJob):
    """A checkpoint's quantization to 4-bit floats."""

    def layout(self) -> list[TensorSpec]:
        specs = layout(self.source.shapes, self.layers, self.recipe.rank, self.source.kept_dtype)
        floats = {layer.name: layer for layer in self.layers if layer.action == "w4a4"}
        own = {f"{name}.{part}" for name in floats for part in FORMATS["svdquant_w4a4"][0]}
        return [spec for spec in specs if spec.name not in own] + [
            spec for layer in floats.values() for spec in self._specs(layer)
        ]

    def _specs(self, layer: LayerPlan) -> list[TensorSpec]:
        n, k, rank = layer.N, layer.K, self.recipe.rank
        parts = {
            "weight": (torch.int8, (n, k // 2)),
            "weight_scale": (torch.float8_e4m3fn, (n, k // 16)),
            "weight_scale_2": (torch.float32, (1, n)),
            "weight_proj_down": (torch.bfloat16, (k, rank)),
            "weight_proj_up": (torch.bfloat16, (n, rank)),
            "weight_smooth_factor": (torch.bfloat16, (k,)),
        }
        return [TensorSpec(f"{layer.name}.{suffix}", *part) for suffix, part in parts.items()]

    def quantizer(
        self, writer: Writer, measurement: Measurement, monitor: Monitor, device: torch.device
    ) -> "_NVFP4Quantizer":
        return _NVFP4Quantizer(self, writer, measurement, monitor, device)


class _NVFP4Quantizer(SVDQuantizer):
    def _quantized(
        self, layer: LayerPlan, smooth: Tensor | None
    ) -> tuple[dict[str, Tensor], LayerRow]:
        if layer.action != "w4a4":
            return super()._quantized(layer, smooth)
        bias = self.source.bias(layer.name)
        seed = zlib.crc32(f"{self.recipe.seed} {layer.name}".encode())
        made = quantize_linear_nvfp4(
            self.source.weight(layer.name).to(self.device),
            None if bias is None else bias.to(self.device),
            self.statistics(layer.name),
            self.recipe,
            post_gelu=layer.post_gelu,
            smooth=smooth,
            generator=torch.Generator().manual_seed(seed),
            compare=self.recipe.compare,
        )
        words = [layer.why, f"4-bit floats, smoothing {made.smoothing}, {made.inputs}"]
        if made.int4_db is not None:
            words.append(f"int4 {made.int4_db:.1f} dB")
        tensors = {key: t.cpu() for key, t in made.weight.tensors(layer.name).items()}
        tensors[f"{layer.name}.comfy_quant"] = padded(tensors[f"{layer.name}.comfy_quant"])
        row = LayerRow(
            name=layer.name,
            action="nvfp4",
            why="; ".join(words)[: len(layer.why.encode()) + WHY_ROOM // 2],
            db=round(made.db, 2) if math.isfinite(made.db) else None,
            bytes_before=self.source.nbytes(layer.name),
            bytes_after=0,
        )
        return tensors, row
