"""FLUX LoRAs in Nunchaku's own form (its `to_nunchaku`), as ordinary LoRA files that ComfyUI reads.

    linears       X.lora_down (K, R), X.lora_up (N, R), in the order of tensor cores (`swizzle.py`)
    modulations   X.lora_down (R, K) and X.lora_up (N, R) in natural order, but the rows of lora_up
      interleaved as those of the model's modulation
    the rest      what it was: lora_A, lora_B of layers in 16 bit, differences of biases, norms

q, k and v are one module there, and ComfyUI's linear1 and linear2 are two modules each, whose
factors are joined here block by block: nothing is rounded. ComfyUI's own loader passes all these
names over.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from ..files import atomic, small
from ..files.errors import FileRefused
from ..files.safetensors import Header, SafetensorsFile
from ..files.writer import check_target
from . import swizzle
from .names import Family, families, modern

_BLOCKS = ("transformer_blocks.", "single_transformer_blocks.")
# ComfyUI's linears of a single block: their pieces, and the share of each in units of the model's
# width
_ROWS = {"linear1": (("attn.to_qkv", 3), ("mlp_fc1", 4))}
_COLUMNS = {"linear2": (("attn.to_out", 1), ("mlp_fc2", 4))}
_SINGLE = "single_transformer_blocks.#."
_NORMS = ("norm_q", "norm_k", "norm_added_q", "norm_added_k")

Factors = tuple[Tensor, Tensor]  # down (K, R), up (N, R), natural


def is_nunchaku_lora(header: Header) -> bool:
    """Whether a file is a LoRA in Nunchaku's form, from its header."""
    names = header.tensors
    return any(name.endswith(".lora_down") and name.startswith(_BLOCKS) for name in names) and not (
        any(name.endswith(".qweight") for name in names)
    )


def convert_lora(source: str | os.PathLike, target: str | os.PathLike) -> list[tuple[str, str]]:
    """Writes an ordinary LoRA file with the numbers of one in Nunchaku's form; returns a summary in
    lines. Raises FileRefused for a file that is none, or damaged.
    """
    path = Path(target)
    with atomic.exclusive(path) as held:
        with SafetensorsFile(source) as stored:
            check_target(stored.path, held)
            tensors = ordinary(stored)
        small.write(held, tensors, {"format": "pt"})
    return [
        ("model", "FLUX.1"),
        ("format", "Nunchaku LoRA → LoRA for Load LoRA"),
        ("layers", str(len({name.rpartition(".lora_up")[0] for name in tensors} - {""}))),
        ("size", f"{path.stat().st_size / 1e6:,.1f} MB"),
    ]


def ordinary(stored: SafetensorsFile) -> dict[str, Tensor]:
    """The tensors of a LoRA in Nunchaku's form under names that ComfyUI's loader reads: factors as
    `X.lora_down.weight` (R, K), `X.lora_up.weight` (N, R). Raises FileRefused.
    """
    family = next(family for family in families() if family.name == "FLUX.1")
    whole: dict[str, Factors] = {}
    out: dict[str, Tensor] = {}
    biases: dict[str, Tensor] = {}
    for name in stored.header.tensors:
        module, _, suffix = modern(name, family).rpartition(".")
        if suffix == "proj_down" and name.startswith(_BLOCKS):
            whole[module] = _factors(stored, family, module, name)
        elif suffix == "proj_up" and name.startswith(_BLOCKS):
            continue  # read with its lora_down
        elif suffix == "bias":
            biases[module] = stored.read(name)
        elif name.startswith(_BLOCKS) and module.rpartition(".")[2] in _NORMS:
            out[f"diffusion_model.{_target(stored, family, module)}.set_weight"] = stored.read(name)
        elif name.endswith((".lora_A.weight", ".lora_B.weight")):
            out[f"transformer.{name}"] = stored.read(name)
        else:
            raise _refusal(stored, f"holds {name}, which is no part of a LoRA for FLUX")
    for layer, (down, up) in _joined(stored, family, whole).items():
        out[f"diffusion_model.{layer}.lora_down.weight"] = down.t().contiguous()
        out[f"diffusion_model.{layer}.lora_up.weight"] = up.contiguous()
    for layer, bias in _joined_biases(stored, family, biases).items():
        out[f"diffusion_model.{layer}.diff_b"] = bias
    return out


def _refusal(stored: SafetensorsFile, what: str) -> FileRefused:
    return FileRefused(
        f"{stored.path.name} {what}; choose the LoRA as it was published, before it was converted"
        " for Nunchaku."
    )


def _factors(stored: SafetensorsFile, family: Family, module: str, name: str) -> Factors:
    """Of one of the file's modules, in natural order."""
    other = name.removesuffix("down") + "up"
    if other not in stored.header.tensors:
        raise _refusal(stored, f"lacks {other}")
    down, up, splits = stored.read(name), stored.read(other), family.splits(module)
    if down.dim() != 2 or up.dim() != 2:
        raise _refusal(stored, f"has {name} in a shape that no linear has")
    if splits:
        down = down.t()
    sizes = (*down.shape, *up.shape)
    if down.shape[1] != up.shape[1] or any(size % 16 for size in sizes):
        raise _refusal(stored, f"has {name} and {other} in shapes that do not fit together")
    if splits:
        if up.shape[0] % splits:
            raise _refusal(stored, f"has {other} in a shape that no modulation has")
        return down, swizzle.rows_from_adanorm(up, splits)
    return swizzle.down_from_nunchaku(down), swizzle.up_from_nunchaku(up)


def _target(stored: SafetensorsFile, family: Family, module: str) -> str:
    """ComfyUI's name of the layer that a module is, or is a part of."""
    pattern, number = family.numbered(module)
    targets = family.targets_of.get(pattern)
    if not targets:
        raise _refusal(stored, f"changes {module}, which FLUX does not have")
    return targets[0].replace("#", number)


def _joined(
    stored: SafetensorsFile, family: Family, modules: Mapping[str, Factors]
) -> dict[str, Factors]:
    """ComfyUI's layer → its factors."""
    layers: dict[str, Factors] = {}
    for module in modules:
        layer, number = _target(stored, family, module), family.numbered(module)[1]
        if layer in layers:
            continue
        kind = layer.rpartition(".")[2]
        table = (_ROWS | _COLUMNS).get(kind) if layer.startswith("single_blocks.") else None
        if table is None:
            layers[layer] = modules[module]
            continue
        names = [_SINGLE.replace("#", number) + piece for piece, _ in table]
        try:
            join = _stacked if kind in _ROWS else _abreast
            shares = [share for _, share in table]
            layers[layer] = join([modules.get(name) for name in names], shares)
        except (RuntimeError, ValueError) as error:
            raise _refusal(stored, f"has parts of {layer} that do not fit together") from error
    return layers


def _stacked(parts: list[Factors | None], shares: list[int]) -> Factors:
    """Factors of a linear whose outputs are its parts' one behind another; None: zeros."""
    known = [part for part in parts if part is not None]
    first, width = known[0][0], known[0][0].shape[0]
    if all(down.shape == first.shape and torch.equal(down, first) for down, _ in known):
        rank, dtype = first.shape[1], known[0][1].dtype
        ups = [
            torch.zeros(share * width, rank, dtype=dtype) if part is None else part[1]
            for part, share in zip(parts, shares, strict=True)
        ]
        return first, torch.cat(ups)
    return torch.cat([down for down, _ in known], 1), torch.block_diag(*(up for _, up in known))


def _abreast(parts: list[Factors | None], shares: list[int]) -> Factors:
    """Factors of a linear whose inputs are those of its parts side by side; None: zeros."""
    turned = [None if part is None else (part[1], part[0]) for part in parts]
    up, down = _stacked(turned, shares)
    return down, up


def _joined_biases(
    stored: SafetensorsFile, family: Family, biases: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """ComfyUI's layer → the difference of its bias."""
    layers: dict[str, Tensor] = {}
    for module, bias in biases.items():
        layer, number = _target(stored, family, module), family.numbered(module)[1]
        if layer in family.swapped:
            bias = torch.cat(bias.chunk(2)[::-1])
        if layer.startswith("single_blocks.") and layer.endswith(".linear1"):
            stem = _SINGLE.replace("#", number)
            first, second = biases.get(f"{stem}attn.to_qkv"), biases.get(f"{stem}proj_mlp")
            if first is None:
                first = bias.new_zeros(3 * bias.shape[0] // 4)
            if second is None:
                second = bias.new_zeros(4 * bias.shape[0] // 3)
            bias = torch.cat([first, second])
        layers[layer] = bias
    return layers
