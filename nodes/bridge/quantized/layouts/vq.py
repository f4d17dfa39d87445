"""Codewords: everything that a vector-quantized linear owns travels as one tensor.

    W[n, j*D + e] = scale[n] * codebook[index[n, j], e]        VQ4DiT (Deng et al., 2024,
      arXiv:2408.17131, eq. 2)

A LoRA's low-rank factors join the format's own 16-bit branch, which sees the raw x; indices and
codebook stay as they are.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .....kernels import ops as kernels
from .....quant.weights.vq import VQWeight
from .base import Layout, shared_fields
from .tensor import LayoutParams, Tensors


class NibbleVQLayout(Layout):
    """`vq`: qdata uint8 (N, K/D * b/8); codebook
    float16 (C, D); scale (N,), ones where the file has none; proj_* the file's branch and patches.
    """

    FORMAT = VQWeight.FORMAT

    @dataclass(frozen=True)
    class Params(LayoutParams):
        codebook: torch.Tensor | None = None
        rotation: int = 0

    @classmethod
    def read(cls, tensors: Tensors, settings: dict, dtype: torch.dtype) -> Params:
        weight, codebook = tensors["weight"], tensors["weight_codebook"]
        scale = tensors.get("weight_scale")
        if scale is None:
            scale = torch.ones(len(weight), dtype=codebook.dtype, device=codebook.device)
        fields = shared_fields(tensors, dtype)
        rotation = int(settings.get("rotation", 0))
        # checks the shapes
        checked = VQWeight(
            weight, codebook, scale, fields["proj_down"], fields["proj_up"], rotation=rotation
        )
        return cls.Params(
            scale=scale, orig_shape=checked.shape, codebook=codebook, rotation=rotation, **fields
        )

    @classmethod
    def settings(cls, params: Params) -> dict:
        codewords, vector = params.codebook.shape
        rank = 0 if params.proj_up is None else params.proj_up.shape[1]
        options = {"rotation": params.rotation, "rank": rank}
        return {"format": cls.FORMAT, "codewords": codewords, "vector": vector} | {
            name: value for name, value in options.items() if value
        }

    @classmethod
    def stored(
        cls, qdata: torch.Tensor, params: Params, bias: torch.Tensor | None = None
    ) -> VQWeight:
        return VQWeight(
            indices=qdata,
            codebook=params.codebook,
            scale=params.scale,
            proj_down=params.proj_down,
            proj_up=params.proj_up,
            bias=bias,
            rotation=params.rotation,
        )

    @classmethod
    def stored_inputs(cls, weight):
        bits, vector = len(weight.params.codebook).bit_length() - 1, weight.params.codebook.shape[1]
        return weight._qdata.shape[1] * 8 // bits * vector

    @classmethod
    def product(cls, x, weight, bias, changes):
        p = weight.params
        y = kernels.linear_vq(
            x, weight._qdata, p.codebook, p.scale, p.proj_down, p.proj_up, bias, p.rotation
        )
        return y, changes
