"""Hooks at every block of a model, or at its sub-layers, for the length of one call.

ComfyUI's block replacement where the model offers it, else its list of blocks shadowed in the
instance. Existing replacements (SLG, PuLID, NAG, …) are called inside ours, so the order of nodes
does not matter.

What stands there is a pass (`Pass`): an object that lives as long as one call of the model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Protocol

import torch

from .features import TIMESTEP
from .joint_attention import AttentionPass, shadow_joint
from .models import Blocks, ModelFamily, block_list
from .shadow import shadow_attr


@dataclass(frozen=True)
class BlockSite:
    """A block among all blocks of a model."""

    blocks: Blocks
    index: int
    first: bool
    last: bool
    module: torch.nn.Module

    @property
    def key(self) -> tuple[str, int]:
        return self.blocks.kind, self.index


class Pass(Protocol):
    """One call of the model, as seen from its blocks and sub-layers."""

    def block(
        self,
        place: BlockSite,
        image: torch.Tensor,
        text: torch.Tensor | None,
        arguments: dict,
        compute: Callable[..., tuple[torch.Tensor, torch.Tensor | None]],
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Returns what the block should have returned; compute() runs it, a replaced one with other
        arguments where it is given some by name.
        """


class SublayerPass(Pass, AttentionPass, Protocol):
    """The same where sub-layers are hooked too."""

    def sublayer(
        self, kind: str, index: int, compute: Callable, like: torch.Tensor
    ) -> torch.Tensor | tuple[torch.Tensor, ...]:
        """Returns what the sub-layer of block `index` should have returned, as it should be on the
        device of `like`; compute() runs it.
        """


def block_sites(network: torch.nn.Module, family: ModelFamily) -> list[BlockSite]:
    """All blocks in the order in which they run."""
    modules = [
        (blocks, i, _real(module))
        for blocks in family.blocks
        for i, module in enumerate(block_list(network, blocks))
    ]
    last = len(modules) - 1
    return [
        BlockSite(blocks, i, first=n == 0, last=n == last, module=module)
        for n, (blocks, i, module) in enumerate(modules)
    ]


def _real(module: torch.nn.Module | ShadowedBlock) -> torch.nn.Module:
    """The block itself, while another stands in the list for it."""
    return _real(module.site.module) if isinstance(module, ShadowedBlock) else module


@contextmanager
def hooked_blocks(
    network: torch.nn.Module, family: ModelFamily, options: dict, model_pass: Pass
) -> Iterator[dict]:
    """transformer_options with the pass at every block; the model is as before when this ends,
    however it ends.
    """
    replace = dict(options.get("patches_replace", {}).get("dit", {}))
    patches_replace = {**options.get("patches_replace", {}), "dit": replace}
    with ExitStack() as stack:
        shadows: dict[str, list] = {}
        watched: dict[str, torch.Tensor] = {}
        if family.timestep:
            embedder = WatchedModule(getattr(network, family.timestep), TIMESTEP, watched)
            shadow_attr(stack, network, family.timestep, embedder)
        for site in block_sites(network, family):
            if site.blocks.replace:
                key = (site.blocks.replace, site.index)
                replace[key] = _replacement(site, replace.get(key), model_pass, watched)
            else:
                shadows.setdefault(site.blocks.attribute, []).append(
                    ShadowedBlock(site, model_pass, watched)
                )
        for name, blocks in shadows.items():
            where, _, name = name.rpartition(".")
            owner = network.get_submodule(where)
            held = getattr(owner, name)
            keyed = dict(zip(held.keys(), blocks, strict=True)) if hasattr(held, "keys") else blocks
            shadow_attr(stack, owner, name, keyed)
        yield options | {"patches_replace": patches_replace}


def shadow_sublayers(
    stack: ExitStack, network: torch.nn.Module, family: ModelFamily, model_pass: SublayerPass
) -> None:
    """Puts the pass before every sub-layer that the family names and a block has, until the stack
    is closed.
    """
    for site in block_sites(network, family):
        if site.blocks.joint:
            shadow_joint(stack, site.module, site.blocks, site.index, model_pass)
        for name in site.blocks.parts:
            module = getattr(site.module, name, None)
            if module is not None:
                kind = f"{site.blocks.kind}.{name}"
                shadow = ShadowedSublayer(model_pass, kind, site.index, module)
                shadow_attr(stack, site.module, name, shadow)


def _replacement(
    site: BlockSite, previous: Callable | None, model_pass: Pass, watched: dict[str, torch.Tensor]
) -> Callable:
    image, text = site.blocks.image, site.blocks.text

    def gate(arguments: dict, extra: dict) -> dict:
        def compute(**others):
            given = arguments | others
            out = previous(given, extra) if previous else extra["original_block"](given)
            return out[image], out.get(text) if text else None

        image_out, text_out = model_pass.block(
            site,
            arguments[image],
            arguments.get(text) if text else None,
            arguments | watched,
            compute,
        )
        return {image: image_out, text: text_out} if text else {image: image_out}

    return gate


class ShadowedBlock:
    """Stands in a list of blocks for one of them: called as the block is, and lends its
    attributes. watched: what the pass is told beside the block's own arguments.
    """

    def __init__(self, site: BlockSite, model_pass: Pass, watched: dict[str, torch.Tensor]):
        self.site = site
        self.model_pass = model_pass
        self.watched = watched

    def __getattr__(self, name: str):
        return getattr(self.site.module, name)

    def __call__(self, *args, **kwargs):
        blocks = self.site.blocks

        def argument(where: str | int | None):
            if where is None:
                return None
            return args[where] if isinstance(where, int) else kwargs.get(where)

        def compute():
            out = self.site.module(*args, **kwargs)
            if len(blocks.returns) == 1:
                return out, None
            return out[blocks.returns.index("img")], out[blocks.returns.index("txt")]

        image, text = self.model_pass.block(
            self.site,
            argument(blocks.image),
            argument(blocks.text),
            dict(enumerate(args)) | kwargs | self.watched,
            compute,
        )
        if len(blocks.returns) == 1:
            return image
        return tuple(image if name == "img" else text for name in blocks.returns)


class WatchedModule:
    """Stands before a sub-module: called as it is, lends its attributes, and notes what it gave."""

    def __init__(self, module: torch.nn.Module, name: str, notes: dict[str, torch.Tensor]):
        self.module = module
        self.name = name
        self.notes = notes

    def __getattr__(self, name: str):
        return getattr(self.module, name)

    def __call__(self, *args, **kwargs):
        self.notes[self.name] = self.module(*args, **kwargs)
        return self.notes[self.name]


class ShadowedSublayer:
    """Stands before a sub-module: called as it is, and lends its attributes."""

    def __init__(self, model_pass: SublayerPass, kind: str, index: int, module: torch.nn.Module):
        self.model_pass = model_pass
        self.kind = kind
        self.index = index
        self.module = module

    def __getattr__(self, name: str):
        return getattr(self.module, name)

    def __call__(self, *args, **kwargs):
        like = next(value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor))
        return self.model_pass.sublayer(
            self.kind, self.index, lambda: self.module(*args, **kwargs), like
        )
