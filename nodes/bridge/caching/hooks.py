"""A visitor's hands on every block of a model for the length of one call: ComfyUI's block
replacement where the model offers it, else its list of blocks shadowed in the instance. Existing
replacements (SLG, PuLID, NAG, …) are called inside ours, so the order of nodes does not matter.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Protocol

import torch

from .models import Adapter, Blocks, block_list


@dataclass(frozen=True)
class Place:
    """A block among all blocks of a model."""

    blocks: Blocks
    index: int
    first: bool
    last: bool
    module: torch.nn.Module

    @property
    def key(self) -> tuple[str, int]:
        return self.blocks.kind, self.index


class Visitor(Protocol):
    """What stands at every block."""

    def block(
        self,
        place: Place,
        image: torch.Tensor,
        text: torch.Tensor | None,
        arguments: dict,
        compute: Callable[[], tuple[torch.Tensor, torch.Tensor | None]],
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Returns what the block should have returned; compute() runs it."""


def places(model: torch.nn.Module, adapter: Adapter) -> list[Place]:
    """All blocks in the order in which they run."""
    found = [
        (blocks, i, _real(module))
        for blocks in adapter.blocks
        for i, module in enumerate(block_list(model, blocks))
    ]
    return [
        Place(blocks, i, n == 0, n == len(found) - 1, module)
        for n, (blocks, i, module) in enumerate(found)
    ]


def _real(module: torch.nn.Module | ShadowedBlock) -> torch.nn.Module:
    """The block itself, while another stands in the list for it."""
    return _real(module.place.module) if isinstance(module, ShadowedBlock) else module


@contextmanager
def visiting(
    model: torch.nn.Module, adapter: Adapter, options: dict, visitor: Visitor
) -> Iterator[dict]:
    """transformer_options with the visitor at every block; the model is as before when this ends,
    however it ends.
    """
    options = options | {"patches_replace": dict(options.get("patches_replace", {}))}
    replace = options["patches_replace"]["dit"] = dict(options["patches_replace"].get("dit", {}))
    with ExitStack() as stack:
        shadows: dict[str, list] = {}
        for place in places(model, adapter):
            if place.blocks.replace:
                key = (place.blocks.replace, place.index)
                replace[key] = _replacement(place, replace.get(key), visitor)
            else:
                shadows.setdefault(place.blocks.attribute, []).append(ShadowedBlock(place, visitor))
        for name, gates in shadows.items():
            held = getattr(model, name)
            shadow(
                stack,
                model,
                name,
                dict(zip(held.keys(), gates, strict=True)) if hasattr(held, "keys") else gates,
            )
        yield options


def shadow(stack: ExitStack, module: torch.nn.Module, name: str, value: object) -> None:
    """Puts a value before a submodule for attribute access alone: parameters, state dict and LoRA
    keys do not see it. Undone by the stack.
    """
    before = module.__dict__.get(name)
    module.__dict__[name] = value

    def undo():
        if before is None:
            module.__dict__.pop(name, None)
        else:
            module.__dict__[name] = before

    stack.callback(undo)


def _replacement(place: Place, previous: Callable | None, visitor: Visitor) -> Callable:
    image, text = place.blocks.image, place.blocks.text

    def gate(arguments: dict, extra: dict) -> dict:
        def compute():
            out = previous(arguments, extra) if previous else extra["original_block"](arguments)
            return out[image], out.get(text) if text else None

        found, words = visitor.block(
            place, arguments[image], arguments.get(text) if text else None, arguments, compute
        )
        return {image: found} | ({text: words} if text else {})

    return gate


class ShadowedBlock:
    """Stands in a list of blocks for one of them: called as the block is, and lends its
    attributes.
    """

    def __init__(self, place: Place, visitor: Visitor):
        self.place, self.visitor = place, visitor

    def __getattr__(self, name: str):
        return getattr(self.place.module, name)

    def __call__(self, *args, **kwargs):
        blocks = self.place.blocks

        def value(where):
            return (
                None
                if where is None
                else args[where]
                if isinstance(where, int)
                else kwargs.get(where)
            )

        def compute():
            out = self.place.module(*args, **kwargs)
            if len(blocks.returns) == 1:
                return out, None
            return out[blocks.returns.index("img")], out[blocks.returns.index("txt")]

        found = self.visitor.block(
            self.place,
            value(blocks.image),
            value(blocks.text),
            dict(enumerate(args)) | kwargs,
            compute,
        )
        return (
            found[0]
            if len(blocks.returns) == 1
            else tuple(found[0] if name == "img" else found[1] for name in blocks.returns)
        )
