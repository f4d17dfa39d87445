"""An MLP's two 4-bit linears as one op, where a model keeps them as Sequential(Linear, GELU,
Linear): FLUX's double blocks, Chroma, Wan.

Between the two of them lie the widest activations of a block. The fused op (`kernels.mlp_w4a4`)
quantizes them where they are computed, so that a GPU neither stores nor reads them. The Sequential
stays what it is, with its children and their names, and gets another class, whose forward calls the
op where nothing else wants to see a child: no patch, hook or other node's function, both weights on
the GPU. Everything else runs layer by layer, as ComfyUI wrote it.
"""

from __future__ import annotations

import functools

import comfy.ops
import torch
from comfy.quant_ops import QuantizedTensor
from torch import nn

from .... import kernels
from ....quant.weights.svdquant_w4a4 import SVDQuantWeight
from . import layouts
from .linear import Linear

_ALIKE = ("Sequential", "WanFeedForward")
"""Classes whose forward calls its three children one after another."""


def fuse(model: nn.Module) -> int:
    """Gives every MLP of a model that the op can run its new class; returns how many there are."""
    found = [module for module in model.modules() if _is_mlp(module)]
    for module in found:
        module.__class__ = _fused(type(module))
    return len(found)


def _is_mlp(module: nn.Module) -> bool:
    if type(module).__name__ not in _ALIKE or len(module) != 3:
        return False
    first, act, second = module
    return (
        type(act) is nn.GELU
        and act.approximate == "tanh"
        and all(type(linear) is Linear and _is_single(linear.weight) for linear in (first, second))
    )


def _is_single(weight: object) -> bool:
    """Whether a weight is one that the op takes: its input is whole groups, smoothed in one
    way, and quantized with one sign.
    """
    if layouts.format_of(weight) != SVDQuantWeight.FORMAT or layouts.is_padded(weight):
        return False
    return not (weight.params.unsigned_from or weight.params.smooth_rows)


@functools.cache
def _fused(base: type[nn.Module]) -> type[nn.Module]:
    """A class of MLPs with the forward below in front of its own."""

    def forward(self: nn.Module, x: torch.Tensor) -> torch.Tensor:
        first, act, second = self
        if not _runs_fused(first, act, second, x):
            return base.forward(self, x)
        comfy.ops.run_every_op()
        operands, flags = zip(*(_operands(linear, x) for linear in (first, second)), strict=True)
        bits = (linear.weight.params.act_bits for linear in (first, second))
        return kernels.mlp_w4a4(x, *operands, *flags[0], *flags[1], *bits)

    return type(f"Fused{base.__name__}", (base,), {"forward": forward, "runs_as_one_op": True})


def is_fused(module: nn.Module) -> bool:
    """Whether a module got its new class."""
    return getattr(type(module), "runs_as_one_op", False)


def _runs_fused(first: nn.Module, act: nn.Module, second: nn.Module, x: torch.Tensor) -> bool:
    if not gains(x.device) or (torch.is_grad_enabled() and x.requires_grad):
        return False
    if _is_watched(act) or not (_is_plain(first, x) and _is_plain(second, x)):
        return False
    if torch.compiler.is_compiling():
        return True  # the op decides when it is called
    params = first.weight.params, second.weight.params
    kinds = {tensor.dtype for p in params for tensor in p.tensors().values()}
    kinds |= {x.dtype for linear in (first, second) if linear.bias is not None}
    bits = max(p.act_bits for p in params)
    return kernels.fuses_mlp(x.device, x.dtype, tuple(sorted(kinds, key=str)), bits)


def gains(device: torch.device) -> bool:
    """Where the op saves time: on a GPU, whose memory the activations would go through. A CPU gains
    a few percent and would give other last bits than it gives layer by layer.
    """
    return device.type == "cuda"


def _is_plain(linear: nn.Module, x: torch.Tensor) -> bool:
    """Whether a layer is what its file holds, a LoRA within its own low-rank branch included, and
    lies where x is.
    """
    weight: QuantizedTensor = linear.weight
    if type(linear) is not Linear or not _is_single(weight) or hasattr(linear, "_v"):
        return False
    if linear.weight_function or linear.bias_function or _is_watched(linear):
        return False
    params, bias = weight.params, linear.bias
    here = weight.device == x.device and (bias is None or bias.device == x.device)
    return here and params.side.is_empty and params.hooked is None


def _is_watched(module: nn.Module) -> bool:
    """Whether something wants the call of a module itself: a hook, or a forward in its place."""
    hooks = module._forward_hooks, module._forward_pre_hooks, module._backward_hooks
    return any(hooks) or "forward" in vars(module)


def _operands(linear: nn.Module, x: torch.Tensor) -> tuple[tuple, tuple[bool, int]]:
    """A layer as the op takes it: (tensors, flags)."""
    p, bias = linear.weight.params, linear.bias
    bias = None if bias is None else bias.to(x.dtype)
    tensors = (linear.weight._qdata, p.scale, p.smooth_factor, p.proj_down, p.proj_up, bias)
    return tensors, (p.act_unsigned, p.rotation)
