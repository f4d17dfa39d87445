"""How diffusers' names of a FLUX.1 map onto Black Forest Labs', which are ComfyUI's.

q, k and v are one linear there and three here; RMS norms are called `.scale` there; the two halves
of the last modulation lie in the other order.
"""

from typing import Any

import torch
from torch import Tensor

from ..interop.names import families
from ..weights.formats import Weight

# A family's last way to put a module together is that of diffusers' own, unquantized modules.
_FLUX = next(family for family in families() if family.name == "FLUX.1")
_TO_DIFFUSERS = {
    module: [part.module for part in ways[-1].parts] for module, ways in _FLUX.rows.items()
}
_TO_FLUX = {
    part: (module, i) for module, parts in _TO_DIFFUSERS.items() for i, part in enumerate(parts)
}


def diffusers_parts(module: str) -> list[str]:
    """Diffusers' modules that make up one FLUX module, in row order: 'single_blocks.3.linear1' →
    to_q, to_k, to_v, proj_mlp. Raises ValueError for what is no FLUX module.
    """
    parts = _known_parts(module)
    if parts is None:
        raise ValueError(f"{module} is no part of a FLUX transformer")
    return parts


def _known_parts(module: str) -> list[str] | None:
    """The same; None for what is no FLUX module."""
    pattern, number = _FLUX.numbered(module)
    parts = _TO_DIFFUSERS.get(pattern)
    return parts and [part.replace("#", number) for part in parts]


def flux_module(part: str) -> tuple[str, int] | None:
    """The FLUX module that holds a diffusers module, and its place in it: '….attn.to_k' →
    ('double_blocks.0.img_attn.qkv', 1).
    """
    pattern, number = _FLUX.numbered(part)
    row = _TO_FLUX.get(pattern)
    return row and (row[0].replace("#", number), row[1])


def to_flux_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A FluxTransformer2DModel's state dict under Black Forest Labs' names (q, k, v joined; RMS
    norms as '.scale').
    """
    parts: dict[str, dict[int, Tensor]] = {}
    for name, tensor in state.items():
        part, _, parameter = name.rpartition(".")
        row = flux_module(part)
        if row is None:
            raise ValueError(f"{name} is no part of a FLUX transformer")
        module, place = row
        suffix = "scale" if module.endswith("_norm") else parameter
        parts.setdefault(f"{module}.{suffix}", {})[place] = (
            _swap_halves(tensor) if module in _FLUX.swapped else tensor
        )
    return {name: torch.cat([pieces[i] for i in sorted(pieces)]) for name, pieces in parts.items()}


def to_diffusers_names(state: dict[str, Tensor], rows: dict[str, int]) -> dict[str, Tensor]:
    """The inverse of `to_flux_names`; rows gives each diffusers module's number of output rows, to
    split the joined ones.
    """
    out = {}
    for name, tensor in state.items():
        module, _, parameter = name.rpartition(".")
        parts = _known_parts(module)
        if parts is None:
            raise ValueError(f"{name} is no part of a FLUX transformer")
        pieces = tensor.split([rows[part] for part in parts]) if len(parts) > 1 else [tensor]
        for part, piece in zip(parts, pieces, strict=True):
            out[f"{part}.{'weight' if parameter == 'scale' else parameter}"] = (
                _swap_halves(piece) if module in _FLUX.swapped else piece
            )
    return out


def in_other_order(name: str, tensor: Tensor) -> Tensor:
    """A 16-bit tensor of a FLUX module with its rows as `swap_rows` has them; its own inverse."""
    return _swap_halves(tensor) if name in _FLUX.swapped else tensor


def _swap_halves(tensor: Tensor) -> Tensor:
    """(shift, scale) ↔ (scale, shift): the two libraries order the last modulation differently."""
    return torch.cat(tensor.chunk(2)[::-1])


def swap_rows(name: str, weight: Weight) -> Weight:
    """A quantized FLUX module with its rows in the other library's order; its own inverse."""
    if name not in _FLUX.swapped:
        return weight
    half = weight.shape[0] // 2
    # of the weight's own format, which a list of the union cannot say
    halves: list[Any] = [weight.rows(half, 2 * half), weight.rows(0, half)]
    return weight.cat(halves)
