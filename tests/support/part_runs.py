"""A small model whose q, k and v read one input, made in parts by every method that can be."""

from __future__ import annotations

from pathlib import Path

import nibble
from nibble.quant.files.report import Report

QUICK = {"memory_cap": 0, "quiet": True}
INT4 = {"rank": 16, "solver": "svd", **QUICK}
METHODS = {
    "int4": INT4,
    "w4a8": {"format": "svdquant_w4a8", "rank": 0, **QUICK},
    "nvfp4": {"format": "svdquant_nvfp4", "compare": True, **INT4},
    "stock w4a8": {"method": "stock", **QUICK},
    "stock int8": {"method": "stock", "format": "int8_convrot", **QUICK},
    "stock nvfp4": {"method": "stock", "format": "nvfp4", **QUICK},
    "vq": {"method": "vq", "codewords": 16, "vector": 4, **QUICK},
}


def qwen_shapes() -> dict[str, tuple[int, ...]]:
    """Two blocks whose q, k and v read one input, and layers that stay in 16 bit."""
    shapes = {"txt_norm.weight": (64,), "img_in.weight": (128, 64), "img_in.bias": (128,)}
    for block in range(2):
        home = f"transformer_blocks.{block}"
        for name in ("to_q", "to_k", "to_v", "add_q_proj", "add_k_proj", "add_v_proj", "to_out.0"):
            shapes |= {f"{home}.attn.{name}.weight": (128, 128), f"{home}.attn.{name}.bias": (128,)}
        shapes |= {f"{home}.img_mlp.net.2.weight": (128, 256), f"{home}.img_mod.1.bias": (768,)}
        shapes |= {f"{home}.img_mod.1.weight": (768, 128)}
    return shapes


def make_parts(source: Path, target: Path, count: int, *numbers: int, **options) -> None:
    """Makes parts of so many, by default all, the last one first."""
    for number in numbers or range(count, 0, -1):
        nibble.quantize(source, target, part=f"{number}/{count}", **options)


def joined(source: Path, target: Path, count: int, **options) -> Report:
    """The run that joins them."""
    return nibble.quantize(source, target, parts=count, **options)
