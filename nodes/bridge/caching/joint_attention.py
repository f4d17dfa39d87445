"""The attention of blocks that compute it among their own lines (FLUX and its kin), as a part that
can be reused alone.

What is kept is what its two projections give, of the image's tokens and of the text's. Where both
are reused, the block runs with stand-ins: `qkv` gives one token of zeros for each stream, what
attends gives them back, `proj` gives what was kept. So neither the projections nor the attention
are computed, and no forward is replaced. A single block has attention and MLP in the same two
matrices, and is reused whole.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Protocol

import torch

from .models import Blocks
from .shadow import shadow_attr

PART = "attn"
_PATCHES = ("attn1_patch", "attn1_output_patch")  # of other nodes, inside attention


class AttentionPass(Protocol):
    """One call of the model. attention: what the projections of the block that runs are to give, by
    the names of their streams; empty where they are computed.
    """

    attention: dict[str, torch.Tensor]

    def computed(self, kind: str, index: object, out: object, like: torch.Tensor) -> None:
        """Hears what a part gave, and of which tokens."""


def kind_of(blocks: Blocks) -> str:
    """What a schedule calls it."""
    return f"{blocks.kind}.{PART}"


def shadow_joint(
    stack: ExitStack, module: torch.nn.Module, blocks: Blocks, index: int, model_pass: AttentionPass
) -> None:
    """Puts the stand-ins before a block's projections, until the stack is closed."""
    for name in blocks.joint:
        stream = getattr(module, name)
        where = (kind_of(blocks), (index, name))
        for place, stand_in in (
            ("qkv", _Inputs(model_pass, stream.qkv)),
            ("proj", _Projection(model_pass, where, stream.proj)),
        ):
            shadow_attr(stack, stream, place, stand_in)


def bypassed(options: dict) -> dict:
    """transformer_options of a block whose attention is not computed: the patches of other nodes
    have nothing to work on.
    """
    patches = options.get("patches", {})
    return options | {
        "patches": {name: held for name, held in patches.items() if name not in _PATCHES},
        "optimized_attention_override": _values,
    }


def _values(attention: Callable, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *_, **__):
    """(B, heads, tokens, channels) as attention returns them: (B, tokens, heads * channels)."""
    return v.transpose(1, 2).flatten(2)


class _StandIn:
    """Called as the layer is, and lends its attributes."""

    def __init__(self, model_pass: AttentionPass, module: torch.nn.Module):
        self.model_pass = model_pass
        self.module = module

    def __getattr__(self, name: str):
        return getattr(self.module, name)


class _Inputs(_StandIn):
    """Before `qkv`."""

    def __call__(self, tokens: torch.Tensor) -> torch.Tensor:
        if self.model_pass.attention:
            return tokens.new_zeros(len(tokens), 1, 3 * tokens.shape[-1])
        return self.module(tokens)


class _Projection(_StandIn):
    """Before `proj`."""

    def __init__(self, model_pass: AttentionPass, where: tuple, module: torch.nn.Module):
        super().__init__(model_pass, module)
        self.where = where

    def __call__(self, attended: torch.Tensor) -> torch.Tensor:
        kind, (index, name) = self.where
        if self.model_pass.attention:
            return self.model_pass.attention[name]
        out = self.module(attended)
        self.model_pass.computed(kind, (index, name), out, attended)
        return out
