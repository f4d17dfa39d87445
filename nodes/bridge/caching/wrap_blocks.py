"""Caching of a model's blocks as one: TeaCache as published. Embedders, modulation and the final
layer run at every step.

What is kept is the residual of the image's tokens over all blocks. The first block's input is
cloned at the boundary: ComfyUI's blocks write into their inputs. On a reused step every block
returns what it was given, and the last one the first's input plus the guessed residual.

What is added to the last block's output in place belongs to the residual where it is left out of a
reused step: ControlNets, other nodes' patches. What the model itself adds there (Wan 2.2 S2V its
sound) it adds on reused steps, too, and so must not be in it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from ....accel.caching.steps import Decision
from ....accel.caching.teacache import TeaCacheDecider, distance
from .controlnet import Deferred
from .features import FEATURES
from .hooks import BlockSite, hooked_blocks
from .models import ModelFamily
from .run import ModelCall, deferred_control, model_call, substitute
from .wrap_steps import remember


def around_blocks(family: ModelFamily) -> Callable:
    """The wrapper for a model of this family, of the kind `family.hook`."""

    def wrapper(executor, *args, **kwargs):
        call = model_call(args, kwargs)
        if call is None:
            return executor(*args, **kwargs)
        blocks = BlockPass(call, family, deferred_control(args, kwargs))
        blocks.decide_early()
        if blocks.control is not None and blocks.compute:
            args, kwargs = substitute(args, kwargs, blocks.control, blocks.control.resolve())
        network = family.network(executor.class_obj)
        with hooked_blocks(network, family, call.options, blocks) as options:
            options["patches"] = {
                name: [
                    blocks.gated(patch) if name == "double_block" else patch for patch in patches
                ]
                for name, patches in options.get("patches", {}).items()
            }
            args, kwargs = substitute(args, kwargs, call.options, options)
            out = executor(*args, **kwargs)
        blocks.keep_residual()
        return out

    return wrapper


class BlockPass:
    """One call of the model. compute: True, False, or None until the first block has been seen.
    control: the ControlNet's result, not computed yet.
    """

    def __init__(self, call: ModelCall, family: ModelFamily, control: Deferred | None):
        self.run, self.streams, self.step = call.run, call.streams, call.step
        self.family = family
        self.control = control
        self.compute: bool | None = None
        # a clone of the image's tokens before the first block
        self.entered: torch.Tensor | None = None
        # what all blocks add to them
        self.residual: torch.Tensor | None = None
        # the last block's output, where a ControlNet or a patch has still to be added to it
        self.left: torch.Tensor | None = None
        self.added_to = control is not None or bool(
            call.options.get("patches", {}).get("double_block")
        )

    def decide_early(self) -> None:
        """Before the model is called: by a rule that needs no feature, or because a step must be
        computed anyway.
        """
        deciders = [stream.decider for stream in self.streams]
        if isinstance(deciders[0], TeaCacheDecider):
            decisions = [decider.forced(self.step) for decider in deciders]
            if not all(decisions):
                return
        else:
            decisions = [
                stream.decider.decide(self.step, stream.history.nodes) for stream in self.streams
            ]
        self._commit(decisions)

    def _commit(self, decisions: list[Decision]) -> None:
        self.compute = self.run.commit(self.step, self.streams, decisions)
        if self.control is not None:
            self.control.skip = not self.compute

    def block(
        self,
        site: BlockSite,
        image: torch.Tensor,
        text: torch.Tensor | None,
        arguments: dict,
        compute: Callable,
    ):
        """At every block: decide at the first, then compute all or none."""
        if site.first:
            self.entered = image.clone()
            self._forget_other_sizes(image)
            first = self._first_block(site, image, text, arguments, compute)
            if first is not None:
                return first
        if self.compute:
            out = compute()
            if site.last:
                self._leave(out[0])
            return out
        return (self._reused(image) if site.last else image), text

    def _forget_other_sizes(self, image: torch.Tensor) -> None:
        """What was kept of another number of tokens is of no use: with ComfyUI's Flux KV Cache the
        reference pictures' tokens are there at the first step alone.
        """
        pieces = image.chunk(len(self.streams), self.family.batch)
        stale = [
            stream
            for stream, piece in zip(self.streams, pieces, strict=True)
            if len(stream.history) and not stream.history.fits(piece)
        ]
        for stream in stale:
            stream.forget()
        if stale and self.compute is False:
            self._commit([Decision(True, "new")] * len(self.streams))

    def _first_block(self, site: BlockSite, image, text, arguments: dict, compute: Callable):
        """Observes F and decides. Where F is the first block's own residual, that block runs at
        every step and its output is returned.
        """
        probing = self.run.feature == "first_residual"
        if not isinstance(self.streams[0].decider, TeaCacheDecider):
            return None
        out = compute() if probing else None
        feature = out[0] - self.entered if probing else self._feature(site, arguments, image)
        self._decide(feature)
        if probing and site.last and self.compute:
            self._leave(out[0])
        return out

    def _feature(self, site: BlockSite, arguments: dict, image: torch.Tensor) -> torch.Tensor:
        vector = arguments.get(site.blocks.vector)
        feature = FEATURES[self.run.feature](site.module, image, vector, arguments)
        return image if feature is None else feature

    def _decide(self, feature: torch.Tensor) -> None:
        pieces = feature.detach().clone().chunk(len(self.streams), self._batch_dim(feature))
        if self.compute is None:
            distances = self._distances(pieces)
            decisions = [
                stream.decider.decide(self.step, d)
                for stream, d in zip(self.streams, distances, strict=True)
            ]
            self._commit(decisions)
        for stream, piece in zip(self.streams, pieces, strict=True):
            stream.feature = piece

    def _distances(self, pieces: Sequence[torch.Tensor]) -> list[float] | list[None]:
        """How far F moved in each stream since its last step, read from the GPU at once; None
        where one has nothing to compare with.
        """
        pairs = list(zip(self.streams, pieces, strict=True))
        for stream, piece in pairs:
            if not len(stream.history) or stream.feature is None:
                return [None] * len(pairs)
            if stream.feature.shape != piece.shape:
                return [None] * len(pairs)
        return torch.stack([distance(piece, stream.feature) for stream, piece in pairs]).tolist()

    def _batch_dim(self, feature: torch.Tensor) -> int:
        """The dimension of F in which the streams lie."""
        batch = self.family.batch
        same = feature.ndim > batch and feature.shape[batch] == self.entered.shape[batch]
        return batch if same else 0

    def _image_part(self, joined: torch.Tensor) -> slice:
        """Where the image's tokens are in the last block's stream, which may hold the
        text's too.
        """
        length, whole = self.entered.shape[1], joined.shape[1]
        return slice(whole - length, whole) if self.family.image_last else slice(0, length)

    def _reused(self, image: torch.Tensor) -> torch.Tensor:
        """What the last block would have returned."""
        guesses = [stream.history.guess(self.step.time, image) for stream in self.streams]
        residual = guesses[0] if len(guesses) == 1 else torch.cat(guesses, self.family.batch)
        out = self.entered + residual
        if image.shape == out.shape:
            return out
        where = self._image_part(image)
        return torch.cat([image[:, : where.start], out, image[:, where.stop :]], 1)

    def _leave(self, left: torch.Tensor) -> None:
        """The last block's output on a computed step."""
        if self.added_to:
            self.left = left
        else:
            self.residual = self._residual(left)

    def _residual(self, left: torch.Tensor) -> torch.Tensor:
        if left.shape != self.entered.shape:
            left = left[:, self._image_part(left)]
        return left - self.entered

    def keep_residual(self) -> None:
        """After the model has returned: the residual of each stream. Drops what it held."""
        if self.left is not None:
            self.residual = self._residual(self.left)
        if self.residual is not None:
            pieces = self.residual.chunk(len(self.streams), self.family.batch)
            for stream, residual in zip(self.streams, pieces, strict=True):
                remember(stream, self.step, residual)
        self.entered = self.residual = self.left = self.control = None

    def gated(self, patch: Callable) -> Callable:
        """Another node's patch after a block, which has nothing to do on a reused step."""
        return lambda given: patch(given) if self.compute else given
