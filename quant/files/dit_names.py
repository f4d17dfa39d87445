"""The names of DiT's authors (Peebles and Xie, 2023, arXiv:2212.09748: `DiT-XL-2-256x256`) →
diffusers'. ComfyUI has no class for DiT, so diffusers' names are those that its files have.

    DiT's authors                   diffusers
    blocks.i.attn.qkv               transformer_blocks.i.attn1.to_q, to_k, to_v
    t_embedder, y_embedder          transformer_blocks.i.norm1.emb: one for each block, all alike
    pos_embed                       pos_embed.pos_embed: computed there, kept in our files

The embedders are alike in all blocks of diffusers' conversions too, 5.5 MB each of DiT-XL/2 in
16 bit. Our files store them once, as the first block's.
"""

import json
import math
from collections.abc import Callable, Collection, Iterable, Mapping

import torch
from torch import Tensor

from .errors import FileRefused
from .renamed import Renamed, Rows
from .stored_tensors import StoredTensor, StoredTensors

CLASS_NAME = "DiTTransformer2DModel"
POSITIONS = "pos_embed.pos_embed"
SHIFT = "frequency_shift"
"""Beside the config: of the frequencies of time, w_i = 10000^(-i / (128 - shift)). The authors' is
0; diffusers gives a DiT 1.
"""
EMBEDDERS = "transformer_blocks.0.norm1.emb."
_QKV = ("attn1.to_q", "attn1.to_k", "attn1.to_v")
_AROUND = {
    "x_embedder.proj": "pos_embed.proj",
    "t_embedder.mlp.0": f"{EMBEDDERS}timestep_embedder.linear_1",
    "t_embedder.mlp.2": f"{EMBEDDERS}timestep_embedder.linear_2",
    "y_embedder.embedding_table": f"{EMBEDDERS}class_embedder.embedding_table",
    "final_layer.adaLN_modulation.1": "proj_out_1",
    "final_layer.linear": "proj_out_2",
}
_IN_BLOCK = {
    "attn.proj": "attn1.to_out.0",
    "mlp.fc1": "ff.net.0.proj",
    "mlp.fc2": "ff.net.2",
    "adaLN_modulation.1": "norm1.linear",
}
_NEEDED = (
    "pos_embed",
    "x_embedder.proj.weight",
    "y_embedder.embedding_table.weight",
    "t_embedder.mlp.0.weight",
    "blocks.0.attn.qkv.weight",
    "final_layer.linear.weight",
)
_XL = 1152  # wide, in 16 heads of 72; heads of the smaller ones have 64


def is_authors(names: Collection[str]) -> bool:
    """Whether these are the tensors of a DiT under its authors' names."""
    return {
        "y_embedder.embedding_table.weight",
        "t_embedder.mlp.0.weight",
        "blocks.0.adaLN_modulation.1.weight",
    } <= set(names)


def in_diffusers_names(stored: StoredTensors) -> StoredTensors:
    """The same tensors under diffusers' names, with its config in the metadata. Raises FileRefused
    for a model that is not whole.
    """
    for name in _NEEDED:
        if name not in stored.tensors:
            raise FileRefused(
                f"{stored.name} lacks {name}, so the file is not complete; download it again."
            )
    places: dict[str, list[Rows]] = {}
    for name, tensor in stored.tensors.items():
        places |= _places(name, tensor, stored.name)
    renamed = Renamed(stored, places)
    facts = {"transformer": _config(stored.tensors, stored.name), SHIFT: 0}
    renamed.metadata = {"config": json.dumps(facts)} | dict(stored.metadata)
    return renamed


def is_diffusers(names: Collection[str]) -> bool:
    """Whether these are the tensors of a DiT of diffusers."""
    return {f"{EMBEDDERS}class_embedder.embedding_table.weight", "proj_out_1.weight"} <= set(names)


def copies(names: Iterable[str], read: Callable[[str], Tensor]) -> set[str]:
    """The tensors of a DiT's embedders that only repeat the first block's: all of them, or none."""
    behind = EMBEDDERS.partition(".0.")[2]
    known = [name for name in names if f".{behind}" in name]
    first = {
        name.removeprefix(EMBEDDERS): read(name) for name in known if name.startswith(EMBEDDERS)
    }
    others = [name for name in known if not name.startswith(EMBEDDERS)]
    for name in others:
        one = first.get(name.partition(behind)[2])
        if one is None or not torch.equal(one, read(name)):
            return set()
    return set(others)


def without_copies(stored: StoredTensors) -> StoredTensors:
    """A DiT under diffusers' names with one embedder, where all of its blocks have the same."""
    repeated = copies(stored.tensors, stored.read)
    if not repeated:
        return stored
    return Renamed(stored, {name: [Rows(name)] for name in stored.tensors if name not in repeated})


def _places(name: str, tensor: StoredTensor, file: str) -> dict[str, list[Rows]]:
    """Where a stored tensor's rows go."""
    if name == "pos_embed":
        return {POSITIONS: [Rows(name)]}
    module, _, parameter = name.rpartition(".")
    if module in _AROUND:
        return {f"{_AROUND[module]}.{parameter}": [Rows(name)]}
    first, _, rest = module.partition(".")
    number, _, inner = rest.partition(".")
    block = f"transformer_blocks.{number}"
    if first != "blocks" or (inner != "attn.qkv" and inner not in _IN_BLOCK):
        return {name: [Rows(name)]}  # refused by whoever builds the model
    if inner in _IN_BLOCK:
        return {f"{block}.{_IN_BLOCK[inner]}.{parameter}": [Rows(name)]}
    if not tensor.shape:  # one scale for all three
        return {f"{block}.{part}.{parameter}": [Rows(name)] for part in _QKV}
    rows, rest_of_rows = divmod(tensor.shape[0], len(_QKV))
    if rest_of_rows:
        raise FileRefused(
            f"{file} has {tensor.shape[0]} rows in {name}, which are not queries, keys and values;"
            " download it again."
        )
    return {
        f"{block}.{part}.{parameter}": [Rows(name, i * rows, (i + 1) * rows)]
        for i, part in enumerate(_QKV)
    }


def _config(tensors: Mapping[str, StoredTensor], file: str) -> dict:
    """diffusers' config of a DiT, by its shapes."""
    width, channels, patch = tensors["x_embedder.proj.weight"].shape[:3]
    head = 72 if width == _XL else 64
    side = math.isqrt(tensors["pos_embed"].shape[-2])
    if width % head or side**2 != tensors["pos_embed"].shape[-2]:
        raise FileRefused(
            f"{file} is a DiT of a width of {width} and {tensors['pos_embed'].shape[-2]} positions,"
            " which is none of its authors' sizes; convert it with diffusers and choose the folder."
        )
    blocks = {name.split(".")[1] for name in tensors if name.startswith("blocks.")}
    return {
        "_class_name": CLASS_NAME,
        "num_attention_heads": width // head,
        "attention_head_dim": head,
        "in_channels": channels,
        "out_channels": tensors["final_layer.linear.weight"].shape[0] // patch**2,
        "num_layers": len(blocks),
        "sample_size": side * patch,
        "patch_size": patch,
        # the last row stands for no class
        "num_embeds_ada_norm": tensors["y_embedder.embedding_table.weight"].shape[0] - 1,
        "norm_eps": 1e-6,
    }
