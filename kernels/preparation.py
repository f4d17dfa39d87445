"""GPU kernels made ready before a model's first step, where they have to be compiled.

What the package carries, or the cache on disk, is loaded when it is first asked for, in no time;
compiling takes seconds a kernel, and would do so in the middle of sampling.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch

from .backends import native
from .backends.choose import PARTS
from .backends.cubins import CompileError, CubinModule
from .backends.cubins.wanted import LayerKind, of_model

__all__ = ["CompileError", "Layer", "prepare"]

Said = Callable[[int, int, str], None]


class Layer(NamedTuple):
    """A layer of a model, as far as it decides which kernels run. op: linear_w4a4, linear_w4a8,
    linear_w4a16, linear_vq, linear_nvfp4, or mlp_w4a4 for the first layer of an MLP. parameters:
    those of its floating-point dtypes by which a backend is chosen.
    """

    op: str
    shape: tuple[int, int]  # (N, K)
    parameters: frozenset[torch.dtype]
    rank: int = 0
    act_unsigned: bool = False
    rotated: bool = False
    bits: int = 0
    vector: int = 0
    act_bits: int = 4


def prepare(
    device: torch.device, dtype: torch.dtype, layers: Iterable[Layer], said: Said | None = None
) -> int:
    """Compiles what layers will ask for on a GPU for activations of a dtype; returns how many
    kernels that were, 0 where nothing had to be. `said`: done, all, name of each.

    Raises CompileError, and what `said` raises, at once.
    """
    if device.type != "cuda" or dtype not in native.DTYPES:
        return 0
    module = native.serving(device)[0]
    if not isinstance(module, CubinModule):
        return 0
    gpu = module.on(native.index_of(device))
    kinds = [kind for layer in layers if (kind := _kind(layer, device, dtype)) is not None]
    return gpu.prepare(of_model(kinds, native.DTYPES[dtype], gpu.gpu), said)


def _kind(layer: Layer, device: torch.device, dtype: torch.dtype) -> LayerKind | None:
    """None for a layer that no kernel takes, or that runs as others do."""
    if layer.op == "mlp_w4a4" and not native.fuses(device):
        return None
    kinds = tuple(layer.parameters)
    parts = PARTS.get(layer.op, (layer.op,))
    brought_to = native.serves(parts, device, dtype, kinds, layer.act_bits)[0]
    if brought_to is None:
        return None
    n, k = layer.shape
    return LayerKind(
        layer.op,
        n,
        k,
        layer.rank,
        native.DTYPES[brought_to],
        layer.act_unsigned,
        layer.rotated,
        layer.bits,
        layer.vector,
        layer.act_bits,
    )
