"""Transformers of diffusers that others have fitted TeaCache's polynomial on, as data: where their
blocks are, what these take and return, and which of diffusers' own modules give F.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from ..caching import coefficients
from ..caching.coefficients import LARGE_LATENT, Shipped

TIMESTEP = "timestep's embedding"  # among a block's arguments: what `Family.embedder` gave


@dataclass(frozen=True)
class Family:
    """One class of transformers.

    model: what coefficients.json calls it; lists: of its blocks, in the order in which they run
    image: where the image's tokens are among `returns` values that a block gives
    feature: F where no published polynomial asks for another
    facts: what coefficients are chosen by, beside width and numbers of blocks, of its configuration
    embedder: the sub-module whose first result is the timestep's embedding alone
    """

    model: str
    lists: tuple[str, ...]
    image: int = 0
    returns: int = 1
    feature: str = "modulated"
    facts: Callable[[Mapping[str, Any]], dict[str, object]] = dict
    embedder: str = ""


def _wan(config: Mapping[str, Any]) -> dict[str, object]:
    kind = "t2v" if config["image_dim"] is None else "i2v"
    keyframes = config["pos_embed_seq_len"] is not None
    return {"in_dim": config["in_channels"], "model_type": kind, "keyframes": keyframes}


def _channels(config: Mapping[str, Any]) -> dict[str, object]:
    return {name: config.get(name) for name in ("in_channels", "patch_size_t")}


_BOTH = ("transformer_blocks", "single_transformer_blocks")
FAMILIES = {
    "FluxTransformer2DModel": Family("Flux", _BOTH, image=1, returns=2, facts=_channels),
    "HunyuanVideoTransformer3DModel": Family("HunyuanVideo", _BOTH, returns=2, facts=_channels),
    "QwenImageTransformer2DModel": Family(
        "QwenImageTransformer2DModel", ("transformer_blocks",), image=1, returns=2
    ),
    "LTXVideoTransformer3DModel": Family("LTXVModel", ("transformer_blocks",)),
    "CogVideoXTransformer3DModel": Family(
        "CogVideoXTransformer3DModel",
        ("transformer_blocks",),
        returns=2,
        feature="vector",
        facts=_channels,
    ),
    "WanTransformer3DModel": Family(
        "WanModel", ("blocks",), feature="vector", facts=_wan, embedder="condition_embedder"
    ),
}


def family_of(model: torch.nn.Module) -> Family:
    """Raises ValueError for a model whose blocks are not known here."""
    family = FAMILIES.get(type(model).__name__)
    if family is None:
        raise ValueError(
            f"The rule 'teacache' knows {', '.join(FAMILIES)}, not {type(model).__name__}; take the"
            " rule 'error', which works on any."
        )
    return family


def blocks_of(model: torch.nn.Module, family: Family) -> list[torch.nn.Module]:
    """In the order in which they run."""
    return [block for name in family.lists for block in getattr(model, name)]


def published(
    model: Any, x: torch.Tensor | None = None, reference: bool = False, plain: bool = False
) -> Shipped | None:
    """The published polynomial of a transformer of this size, or None. x: the latent that it reads,
    by which videos of 720p are told; reference: it edits a picture (FLUX Kontext); plain: see
    `coefficients.lookup`.
    """
    family, config = family_of(model), model.config
    traits = {
        "hidden": config["num_attention_heads"] * config["attention_head_dim"],
        "blocks": [len(getattr(model, name)) for name in family.lists],
        "reference": reference,
        "large": x is not None and x.ndim == 5 and x.shape[-1] * x.shape[-2] > LARGE_LATENT,
    }
    return coefficients.lookup(family.model, traits | family.facts(config), plain)


def feature(kind: str, block: Any, given: Mapping[str, Any]) -> torch.Tensor:
    """F of the first block's arguments.

    modulated: its norm of the image's tokens, scaled and shifted by the timestep; vector: the
    embedding that it receives; timestep: the one that Wan makes each block's scales and shifts of
    """
    image, vector = given["hidden_states"], given["temb"]
    if kind == "vector":
        return vector
    if kind == "timestep":
        return given[TIMESTEP]
    if hasattr(block, "scale_shift_table"):  # LTX-Video
        table = block.scale_shift_table + vector.reshape(*vector.shape[:2], 6, -1)
        return block.norm1(image) * (1 + table[:, :, 1]) + table[:, :, 0]
    if hasattr(block, "img_mod"):  # Qwen-Image
        shift, scale, _ = block.img_mod(vector).chunk(2, dim=-1)[0].chunk(3, dim=-1)
        return block.img_norm1(image) * (1 + scale[:, None]) + shift[:, None]
    return block.norm1(image, emb=vector)[0]  # FLUX, HunyuanVideo
