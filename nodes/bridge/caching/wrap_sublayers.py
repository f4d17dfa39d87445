"""Caching of a model's parts by a static schedule: SmoothCache for kinds of blocks, or for the
sub-layers inside them.

A block's part is its residual, out - in, of the image's tokens and of the text's; a sub-layer's is
its output. Reused parts are guessed from the last computed ones, so gates and norms around a
sub-layer still follow the current step. The same gates record the errors that the schedules are
made from (`measure.py`).
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack

import torch

from ....accel.caching.extrapolate import History
from ....accel.caching.steps import Step, Window
from . import joint_attention
from .hooks import BlockSite, block_sites, hooked_blocks, shadow_sublayers
from .models import Blocks, ModelFamily
from .run import ModelCall, model_call, substitute


def kinds(family: ModelFamily, depth: str) -> list[str]:
    """What a schedule of this depth has rows for: kinds of blocks, split into sub-layers where the
    family has them.
    """
    return [kind for blocks in family.blocks for kind in _kinds(blocks, depth)]


def _kinds(blocks: Blocks, depth: str) -> list[str]:
    if depth == "sublayer" and blocks.parts:
        return [f"{blocks.kind}.{part}" for part in blocks.parts]
    return [blocks.kind]


def shares(network: torch.nn.Module, family: ModelFamily, depth: str) -> dict[str, float]:
    """kind → its share of the weights of all blocks: about its share of the work, since each weight
    is multiplied once a token.
    """

    def weights(module: torch.nn.Module | None) -> int:
        if module is None:
            return 0
        return sum(parameter.numel() for parameter in module.parameters())

    sites = block_sites(network, family)
    whole = max(sum(weights(site.module) for site in sites), 1)
    out = dict.fromkeys(kinds(family, depth), 0.0)
    for site in sites:
        for kind in _kinds(site.blocks, depth):
            part = kind.removeprefix(site.blocks.kind).removeprefix(".")
            modules = [getattr(site.module, part, None) if part else site.module]
            if part == joint_attention.PART and site.blocks.joint:
                modules = [getattr(site.module, name) for name in site.blocks.joint]
            out[kind] += sum(map(weights, modules)) / whole
    return out


def around_sublayers(family: ModelFamily, depth: str) -> Callable:
    """The wrapper for a model of this family, of the kind `family.hook`; the run's rule is a
    SublayerSchedule.
    """
    weights: dict[str, float] = {}

    def wrapper(executor, *args, **kwargs):
        call = model_call(args, kwargs)
        if call is None:
            return executor(*args, **kwargs)
        network = family.network(executor.class_obj)
        sublayers = ScheduledPass(call, family, depth)
        if not weights:
            weights.update(shares(network, family, depth))
        computed = {kind: sublayers.computes(kind) for kind in weights}
        call.run.record.add_rows(call.step, computed, weights)
        with ExitStack() as stack:
            options = stack.enter_context(hooked_blocks(network, family, call.options, sublayers))
            if depth == "sublayer":
                shadow_sublayers(stack, network, family, sublayers)
            args, kwargs = substitute(args, kwargs, call.options, options)
            return executor(*args, **kwargs)

    return wrapper


class SublayerSchedule:
    """The rule, and its own decider: kind → mask over the run's steps."""

    def __init__(self, masks: dict[str, list[bool]], window: Window):
        self.masks, self.window = masks, window

    def decider(self) -> SublayerSchedule:
        return self

    def computes(self, kind: str, step: Step) -> bool:
        """Whether this kind's parts are computed at this step."""
        return (
            self.window.forbids(step) is not None
            or self.masks[kind][min(step.index, len(self.masks[kind]) - 1)]
        )

    def computed(self) -> None:
        """Nothing to start again."""


class ScheduledPass:
    """One call of the model: each part is computed and kept, or guessed."""

    def __init__(self, call: ModelCall, family: ModelFamily, depth: str):
        self.run, self.streams, self.step = call.run, call.streams, call.step
        self.family = family
        self.depth = depth
        self.attention: dict[str, torch.Tensor] = {}

    def computes(self, kind: str) -> bool:
        return self.streams[0].decider.computes(kind, self.step)

    def block(
        self,
        site: BlockSite,
        image: torch.Tensor,
        text: torch.Tensor | None,
        arguments: dict,
        compute: Callable,
    ):
        """Around a whole block, where blocks are what is kept."""
        if self.depth == "sublayer" and site.blocks.parts:
            return self._inside(site, image, text, arguments, compute)
        batch = self.family.batch
        image_key, text_key = (*site.key, "img"), (*site.key, "txt")
        if not self.computes(site.blocks.kind):
            change = self._guess(image_key, image, batch)
            if change is not None and text is None:
                return image + change, None
            words = None if change is None else self._guess(text_key, text, batch)
            if words is not None:
                return image + change, text + words
        image_before = image.clone()
        text_before = None if text is None else text.clone()
        out = compute()
        self._keep(image_key, out[0] - image_before, image_before, batch)
        if text is not None and out[1] is not None and out[1].shape == text_before.shape:
            self._keep(text_key, out[1] - text_before, text_before, batch)
        return out

    def _inside(self, site: BlockSite, image, text, arguments: dict, compute: Callable):
        """Runs a block whose parts are what is kept, without its attention where that is
        reused.
        """
        kind = joint_attention.kind_of(site.blocks)
        if not site.blocks.joint or self.computes(kind):
            return compute()
        guesses = {
            name: self._guess((kind, (site.index, name), 0), tokens, 0)
            for name, tokens in zip(site.blocks.joint, (image, text), strict=True)
        }
        if any(guess is None for guess in guesses.values()):
            return compute()
        self.attention = guesses
        options = joint_attention.bypassed(arguments["transformer_options"])
        try:
            return compute(pe=None, transformer_options=options)
        finally:
            self.attention = {}

    def sublayer(self, kind: str, index: int, compute: Callable, like: torch.Tensor):
        """Around a sub-layer, whose output is a tensor or a tuple of tensors."""
        if not self.computes(kind):
            pieces = []
            while (kind, index, len(pieces)) in self.streams[0].parts:
                pieces.append(self._guess((kind, index, len(pieces)), like, 0))
            if pieces and all(piece is not None for piece in pieces):
                return pieces[0] if len(pieces) == 1 else tuple(pieces)
        out = compute()
        self.computed(kind, index, out, like)
        return out

    def computed(self, kind: str, index: object, out: object, like: torch.Tensor) -> None:
        """Keeps what a sub-layer gave."""
        for i, value in enumerate(out if isinstance(out, tuple) else (out,)):
            self._keep((kind, index, i), value.clone(), like, 0)

    def _guess(self, key: tuple, like: torch.Tensor, batch: int) -> torch.Tensor | None:
        """The value of a part that is computed from `like`, at this step and on its device; None
        where a stream has not computed it yet, or from another number of tokens.
        """
        size = _size(like, batch)
        if any(stream.sizes.get(key) != size for stream in self.streams):
            return None
        guesses = [stream.parts[key].guess(self.step.time, like) for stream in self.streams]
        # a model may write into what a part returned
        return guesses[0].clone() if len(guesses) == 1 else torch.cat(guesses, batch)

    def _keep(self, key: tuple, value: torch.Tensor, like: torch.Tensor, batch: int) -> None:
        for stream, piece in zip(self.streams, value.chunk(len(self.streams), batch), strict=True):
            history = stream.parts.setdefault(key, History(self.run.reuse, self.run.store))
            history.store(self.step.time, piece)
            stream.sizes[key] = _size(like, batch)


def _size(tokens: torch.Tensor, batch: int) -> tuple[int, ...]:
    """A shape without its batch."""
    return (*tokens.shape[:batch], *tokens.shape[batch + 1 :])
