"""Codewords as one of ComfyUI's quantized tensors, beside the 4-bit layouts: everything that a
vector-quantized linear owns travels as one.

    W[n, j*D + e] = scale[n] * codebook[index[n, j], e]        VQ4DiT (Deng et al., 2024,
      arXiv:2408.17131, eq. 2)

A LoRA's low-rank factors join the format's own 16-bit branch, which sees the raw x; indices and
codebook stay as they are.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from comfy.quant_ops import QuantizedTensor, register_layout_class

from ....kernels import ops as kernels
from ....quant.weights.vq import VQWeight
from . import layouts


class NibbleVQLayout(layouts._Layout):
    """`vq`: qdata uint8 (N, K/D * b/8); codebook float16 (C, D); scale (N,), ones where the file
    has none; proj_* the file's branch and patches.
    """

    FORMAT = VQWeight.FORMAT

    @dataclass(frozen=True)
    class Params(layouts._Params):
        codebook: torch.Tensor | None = None
        rotation: int = 0

    @classmethod
    def base(cls, qdata: torch.Tensor, p: Params, bias: torch.Tensor | None = None) -> VQWeight:
        return VQWeight(qdata, p.codebook, p.scale, p.proj_down, p.proj_up, bias, p.rotation)

    @classmethod
    def params(cls, tensors: dict[str, torch.Tensor], settings: dict, dtype: torch.dtype) -> Params:
        weight, codebook = tensors["weight"], tensors["weight_codebook"]
        scale = tensors.get("weight_scale")
        scale = (
            torch.ones(len(weight), dtype=codebook.dtype, device=codebook.device)
            if scale is None
            else scale
        )
        down, up = tensors.get("weight_proj_down"), tensors.get("weight_proj_up")
        # checks the shapes
        plain = VQWeight(
            weight, codebook, scale, down, up, rotation=int(settings.get("rotation", 0))
        )
        return cls.Params(
            scale=scale,
            orig_dtype=dtype,
            orig_shape=plain.shape,
            proj_down=down,
            proj_up=up,
            **layouts._patched_fields(tensors),
            hook=layouts.HookCell(),
            codebook=codebook,
            rotation=plain.rotation,
        )

    @classmethod
    def settings(cls, p: Params) -> dict:
        codewords, vector = p.codebook.shape
        extra = {"rotation": p.rotation, "rank": 0 if p.proj_up is None else p.proj_up.shape[1]}
        return {"format": cls.FORMAT, "codewords": codewords, "vector": vector} | {
            name: value for name, value in extra.items() if value
        }


def is_codewords(weight: object) -> bool:
    """Whether a parameter is a vector-quantized weight."""
    return layouts.is_ours(weight) and weight._layout_cls == NibbleVQLayout.__name__


def linear(x: torch.Tensor, weight: QuantizedTensor, bias: torch.Tensor | None) -> torch.Tensor:
    """x (…, K) → (…, N) in x's dtype, with the low-rank branch and what patches put into it."""
    p = weight._params
    return kernels.linear_vq(
        x, weight._qdata, p.codebook, p.scale, p.proj_down, p.proj_up, bias, p.rotation
    )


layouts.LAYOUTS[NibbleVQLayout.FORMAT] = NibbleVQLayout
register_layout_class(NibbleVQLayout.__name__, NibbleVQLayout)
