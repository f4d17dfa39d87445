"""GPU kernels compiled before a model's first step, where they have to be: once a machine, with a
line of text under the node that loads it.
"""

from __future__ import annotations

import logging

import torch
from comfy.model_patcher import ModelPatcher
from comfy.quant_ops import QuantizedTensor

from .... import kernels
from ....kernels.preparation import Layer
from ....quant.weights.awq_w4a16 import W4A16Weight
from ....quant.weights.svdquant_nvfp4 import NVFP4Weight
from ....quant.weights.svdquant_w4a4 import SVDQuantWeight
from ....quant.weights.svdquant_w4a8 import W4A8Weight
from ....quant.weights.vq import VQWeight
from ..host.progress import Progress
from . import layouts, mlp

log = logging.getLogger("nibble")

_OPS = {
    SVDQuantWeight.FORMAT: "linear_w4a4",
    W4A8Weight.FORMAT: "linear_w4a8",
    NVFP4Weight.FORMAT: "linear_nvfp4",
    W4A16Weight.FORMAT: "linear_w4a16",
    VQWeight.FORMAT: "linear_vq",
}

_OWN_DTYPES = ("codebook", "scale_2", "channel_scale")
"""Parameters that kernels take in a dtype of their own."""


def prepare(patcher: ModelPatcher) -> int:
    """Has what a model's layers will ask for ready on its GPU; returns how many kernels had to be
    compiled. One that does not compile is left to the first step, which says so.
    """
    progress = Progress("preparing GPU kernels, once", unit="kernel")
    dtype = patcher.model.get_dtype_inference()
    layers = layers_of(patcher.model.diffusion_model, dtype)
    try:
        return kernels.prepare(patcher.load_device, dtype, layers, progress)
    except kernels.CompileError as error:
        log.warning("a GPU kernel does not compile: %s", error)
        return 0


def layers_of(model: torch.nn.Module, dtype: torch.dtype) -> list[Layer]:
    """The low-bit layers of a model, each once; biases come in the dtype that it computes in."""
    found: dict[Layer, None] = {}
    for module in model.modules():
        if mlp.is_fused(module):
            found[_layer(module[0], dtype)._replace(op="mlp_w4a4")] = None
        if layouts.is_ours(module._parameters.get("weight")):
            found[_layer(module, dtype)] = None
    return list(found)


def _layer(linear: torch.nn.Module, dtype: torch.dtype) -> Layer:
    weight: QuantizedTensor = linear.weight
    p = weight.params
    tensors = {name: t for name, t in p.tensors().items() if name not in _OWN_DTYPES}
    floats = {t.dtype for t in tensors.values() if t.dtype.is_floating_point}
    floats -= {torch.float8_e4m3fn}
    floats |= set() if linear.bias is None else {dtype}
    down, codebook = p.proj_down, getattr(p, "codebook", None)
    bits = vector = 0
    if codebook is not None:
        bits, vector = len(codebook).bit_length() - 1, codebook.shape[1]
    return Layer(
        _OPS[layouts.format_of(weight)],
        (weight.shape[0], weight.layout_cls.stored_inputs(weight)),
        frozenset(floats),
        0 if down is None else down.shape[1],
        bool(getattr(p, "act_unsigned", False) or getattr(p, "unsigned_from", 0)),
        bool(getattr(p, "rotation", 0)) and codebook is None,
        bits,
        vector,
        getattr(p, "act_bits", 4),
    )
