"""Caching of a model's blocks as one: TeaCache as published. Embedders, modulation and the final
layer run at every step.

What is kept is the residual of the image's tokens over all blocks, taken after the model returned,
since ControlNets are added to it in place after the last block. The first block's input is cloned
at the boundary: ComfyUI's blocks write into their inputs. On a reused step every block returns what
it was given, and the last one the first's input plus the guessed residual.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from ....accel.caching.steps import Step
from ....accel.caching.teacache import TeaCacheStream, distance
from .hooks import Place, visiting
from .models import FEATURES, Adapter
from .run import KEY, Run, Stream, deferred_control, options_of, substitute
from .wrap_steps import keep


def around_blocks(adapter: Adapter) -> Callable:
    """The wrapper for a model of this family: DIFFUSION_MODEL where the model calls such wrappers,
    else APPLY_MODEL.
    """

    def wrapper(executor, *args, **kwargs):
        options = options_of(args, kwargs)
        if options is None:
            return executor(*args, **kwargs)
        run: Run = options[KEY]
        step = run.step(options["sigmas"])
        owner = executor.class_obj
        model = owner if adapter.wrapper else owner.diffusion_model
        visit = Visit(run, run.streams_of(options, step, args[0]), step, adapter)
        visit.decide_early()
        visit.control = deferred_control(args, kwargs)
        if visit.control is not None and visit.compute:
            args, kwargs = substitute(args, kwargs, visit.control, visit.control.resolve())
        with visiting(model, adapter, options, visit) as hooked:
            hooked["patches"] = {
                name: [visit.gated(patch) if name == "double_block" else patch for patch in patches]
                for name, patches in hooked.get("patches", {}).items()
            }
            args, kwargs = substitute(args, kwargs, options, hooked)
            out = executor(*args, **kwargs)
        visit.keep()
        return out

    return wrapper


class Visit:
    """One call of the model. compute: True, False, or None until the first block has been seen."""

    def __init__(self, run: Run, streams: list[Stream], step: Step, adapter: Adapter):
        self.run, self.streams, self.step, self.adapter = run, streams, step, adapter
        self.compute: bool | None = None
        self.control = None
        # a clone of the image's tokens before the first block
        self.entered: torch.Tensor | None = None
        # the last block's output, with the ControlNet once the model has returned
        self.left: torch.Tensor | None = None

    def decide_early(self) -> None:
        """Before the model is called: by a rule that needs no feature, or because a step must be
        computed anyway.
        """
        if isinstance(self.streams[0].rule, TeaCacheStream):
            forced = [stream.rule.forced(self.step) for stream in self.streams]
            if all(forced):
                self.compute = self.run.settle(self.step, self.streams, forced)
        else:
            self.compute = self.run.settle(
                self.step,
                self.streams,
                [s.rule.decide(self.step, s.history.nodes) for s in self.streams],
            )

    def block(
        self,
        place: Place,
        image: torch.Tensor,
        text: torch.Tensor | None,
        arguments: dict,
        compute: Callable,
    ):
        """At every block: decide at the first, then compute all or none."""
        if place.first:
            self.entered = image.clone()
            first = self._first_block(place, image, text, arguments, compute)
            if first is not None:
                return first
        if self.compute:
            out = compute()
            if place.last:
                self.left = out[0]
            return out
        return (self._leave(image), text) if place.last else (image, text)

    def _first_block(self, place: Place, image, text, arguments: dict, compute: Callable):
        """Observes F and decides. Where F is the first block's own residual, that block runs at
        every step and its output is returned.
        """
        probing = self.run.feature == "first_residual"
        if not isinstance(self.streams[0].rule, TeaCacheStream):
            return None
        out = compute() if probing else None
        feature = out[0] - self.entered if probing else self._feature(place, arguments, image)
        self._decide(feature)
        if probing and place.last:
            self.left = out[0]
        return out

    def _feature(self, place: Place, arguments: dict, image: torch.Tensor) -> torch.Tensor:
        found = FEATURES[self.run.feature](
            place.module, image, arguments.get(place.blocks.vector), arguments
        )
        return image if found is None else found

    def _decide(self, feature: torch.Tensor) -> None:
        dim = (
            self.adapter.batch
            if feature.ndim > self.adapter.batch
            and feature.shape[self.adapter.batch] == self._batch()
            else 0
        )
        pieces = feature.detach().clone().chunk(len(self.streams), dim)
        known = all(
            len(s.history) and s.feature is not None and s.feature.shape == p.shape
            for s, p in zip(self.streams, pieces, strict=True)
        )
        if self.compute is None:
            far = (
                torch.stack(
                    [distance(p, s.feature) for s, p in zip(self.streams, pieces, strict=True)]
                ).tolist()
                if known
                else None
            )
            decisions = [
                s.rule.decide(self.step, None if far is None else far[i])
                for i, s in enumerate(self.streams)
            ]
            self.compute = self.run.settle(self.step, self.streams, decisions)
        for stream, piece in zip(self.streams, pieces, strict=True):
            stream.feature = piece
        if self.control is not None:
            self.control.skip = not self.compute

    def _batch(self) -> int:
        return self.entered.shape[self.adapter.batch]

    def _image_part(self, joined: torch.Tensor) -> slice:
        """Where the image's tokens are in the last block's stream, which may hold the
        text's too.
        """
        length, whole = self.entered.shape[1], joined.shape[1]
        return slice(whole - length, whole) if self.adapter.image_last else slice(0, length)

    def _leave(self, image: torch.Tensor) -> torch.Tensor:
        residual = [stream.history.guess(self.step.sigma, image) for stream in self.streams]
        found = self.entered + (
            residual[0] if len(residual) == 1 else torch.cat(residual, self.adapter.batch)
        )
        if image.shape == found.shape:
            return found
        where = self._image_part(image)
        return torch.cat([image[:, : where.start], found, image[:, where.stop :]], 1)

    def keep(self) -> None:
        """After a computed call: the residual of each stream. Drops what it held."""
        if self.compute and self.left is not None and self.entered is not None:
            left = (
                self.left
                if self.left.shape == self.entered.shape
                else self.left[:, self._image_part(self.left)]
            )
            pieces = (left - self.entered).chunk(len(self.streams), self.adapter.batch)
            for stream, residual in zip(self.streams, pieces, strict=True):
                keep(stream, self.step, residual)
        self.entered = self.left = self.control = None

    def gated(self, patch: Callable) -> Callable:
        """Another node's patch after a block, which has nothing to do on a reused step."""
        return lambda given: patch(given) if self.compute else given
