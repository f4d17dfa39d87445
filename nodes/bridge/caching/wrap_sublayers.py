"""Caching of a model's parts by a static schedule: SmoothCache for kinds of blocks, or for the
sub-layers inside them.

A block's part is its residual, out - in, of the image's tokens and of the text's; a sub-layer's is
its output. Reused parts are guessed from the last computed ones, so gates and norms around a
sub-layer still follow the current step. The same gates record the errors that the schedules are
made from (`cache_calibration.py`).
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack

import torch

from ....accel.caching.extrapolate import History
from ....accel.caching.steps import Step, Window
from .hooks import Place, places, shadow, visiting
from .models import Adapter
from .run import KEY, Run, Stream, options_of, substitute

DEPTHS = ("step", "block", "sublayer")


def kinds(adapter: Adapter, depth: str) -> list[str]:
    """What a schedule of this depth has rows for: kinds of blocks, split into sub-layers where the
    family has them.
    """
    found = []
    for blocks in adapter.blocks:
        found += (
            [f"{blocks.kind}.{part}" for part in blocks.parts]
            if depth == "sublayer" and blocks.parts
            else [blocks.kind]
        )
    return found


def shares(model: torch.nn.Module, adapter: Adapter, depth: str) -> dict[str, float]:
    """kind → its share of the weights of all blocks: about its share of the work, since each weight
    is multiplied once a token.
    """

    def size(module):
        return sum(parameter.numel() for parameter in module.parameters())

    every = places(model, adapter)
    whole, found = (
        sum(size(place.module) for place in every),
        dict.fromkeys(kinds(adapter, depth), 0.0),
    )
    for place in every:
        for name, module in (
            [(place.blocks.kind, place.module)]
            if place.blocks.kind in found
            else [
                (f"{place.blocks.kind}.{part}", getattr(place.module, part, None))
                for part in place.blocks.parts
            ]
        ):
            found[name] += size(module) / max(whole, 1) if module is not None else 0.0
    return found


def around_parts(adapter: Adapter, depth: str) -> Callable:
    """The wrapper for a model of this family; the run's rule is a PartSchedule."""
    weights: dict[str, float] = {}

    def wrapper(executor, *args, **kwargs):
        options = options_of(args, kwargs)
        if options is None:
            return executor(*args, **kwargs)
        run: Run = options[KEY]
        step = run.step(options["sigmas"])
        owner = executor.class_obj
        model = owner if adapter.wrapper else owner.diffusion_model
        visit = PartVisit(run, run.streams_of(options, step, args[0]), step, adapter, depth)
        weights.update({} if weights else shares(model, adapter, depth))
        run.record.add_rows(step, {kind: visit.computes(kind) for kind in weights}, weights)
        with ExitStack() as stack:
            hooked = stack.enter_context(visiting(model, adapter, options, visit))
            if depth == "sublayer":
                visit.shadow_parts(stack, model)
            args, kwargs = substitute(args, kwargs, options, hooked)
            return executor(*args, **kwargs)

    return wrapper


class PartSchedule:
    """The rule: kind → mask over the run's steps."""

    def __init__(self, masks: dict[str, list[bool]], window: Window):
        self.masks, self.window = masks, window

    def stream(self) -> PartSchedule:
        return self

    def computes(self, kind: str, step: Step) -> bool:
        """Whether this kind's parts are computed at this step."""
        return (
            self.window.forbids(step) is not None
            or self.masks[kind][min(step.index, len(self.masks[kind]) - 1)]
        )

    def computed(self) -> None:
        """Nothing to start again."""

    @staticmethod
    def keep(key: tuple, history: History, step: Step, value: torch.Tensor) -> None:
        """Remembers a computed part."""
        history.store(step.sigma, value)


class PartVisit:
    """One call of the model: each part is computed and kept, or guessed."""

    def __init__(self, run: Run, streams: list[Stream], step: Step, adapter: Adapter, depth: str):
        self.run, self.streams, self.step, self.adapter, self.depth = (
            run,
            streams,
            step,
            adapter,
            depth,
        )

    def computes(self, kind: str) -> bool:
        return self.streams[0].rule.computes(kind, self.step)

    def block(
        self,
        place: Place,
        image: torch.Tensor,
        text: torch.Tensor | None,
        arguments: dict,
        compute: Callable,
    ):
        """Around a whole block, where blocks are what is kept."""
        if self.depth == "sublayer" and place.blocks.parts:
            return compute()
        batch = self.adapter.batch
        found = (
            None
            if self.computes(place.blocks.kind)
            else self._guess((*place.key, "img"), image, batch)
        )
        words = (
            None if found is None or text is None else self._guess((*place.key, "txt"), text, batch)
        )
        if found is not None and (text is None or words is not None):
            return image + found, None if text is None else text + words
        before = image.clone(), None if text is None else text.clone()
        out = compute()
        self._keep((*place.key, "img"), out[0] - before[0], batch)
        if text is not None and out[1] is not None and out[1].shape == before[1].shape:
            self._keep((*place.key, "txt"), out[1] - before[1], batch)
        return out

    def shadow_parts(self, stack: ExitStack, model: torch.nn.Module) -> None:
        """Puts a gate before every sub-layer that the family names and this block has."""
        for place in places(model, self.adapter):
            for name in place.blocks.parts:
                module = getattr(place.module, name, None)
                if module is not None:
                    shadow(
                        stack,
                        place.module,
                        name,
                        ShadowedPart(self, f"{place.blocks.kind}.{name}", place.index, module),
                    )

    def part(self, kind: str, index: int, compute: Callable, like: torch.Tensor):
        """Around a sub-layer, whose output is a tensor or a tuple of tensors."""
        if not self.computes(kind):
            pieces = []
            while (kind, index, len(pieces)) in self.streams[0].parts:
                pieces.append(self._guess((kind, index, len(pieces)), like, 0))
            if pieces and all(piece is not None for piece in pieces):
                return pieces[0] if len(pieces) == 1 else tuple(pieces)
        out = compute()
        for i, value in enumerate(out if isinstance(out, tuple) else (out,)):
            self._keep((kind, index, i), value.clone(), 0)
        return out

    def _guess(self, key: tuple, like: torch.Tensor, batch: int) -> torch.Tensor | None:
        """The part's value at this step, on the device of `like`; None where a stream has not
        computed it yet.
        """
        histories = [stream.parts.get(key) for stream in self.streams]
        if not all(histories):
            return None
        found = [history.guess(self.step.sigma, like) for history in histories]
        # a model may write into what a part returned
        return found[0].clone() if len(found) == 1 else torch.cat(found, batch)

    def _keep(self, key: tuple, value: torch.Tensor, batch: int) -> None:
        for stream, piece in zip(self.streams, value.chunk(len(self.streams), batch), strict=True):
            stream.rule.keep(
                key,
                stream.parts.setdefault(key, History(self.run.reuse, self.run.store)),
                self.step,
                piece,
            )


class ShadowedPart:
    """Stands before a sub-module: called as it is, and lends its attributes."""

    def __init__(self, visit: PartVisit, kind: str, index: int, module: torch.nn.Module):
        self.visit, self.kind, self.index, self.module = visit, kind, index, module

    def __getattr__(self, name: str):
        return getattr(self.module, name)

    def __call__(self, *args, **kwargs):
        like = next(value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor))
        return self.visit.part(self.kind, self.index, lambda: self.module(*args, **kwargs), like)
