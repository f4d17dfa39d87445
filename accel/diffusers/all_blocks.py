"""Caching of a transformer's blocks as one by TeaCache's rule (arXiv 2411.19108): the first block's
input decides; what is reused is the difference that all blocks make to the image's tokens. What
lies around the blocks runs at every step.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from diffusers.hooks.hooks import ModelHook

from ..caching.extrapolate import History
from ..caching.teacache import distance
from .families import TIMESTEP, Family, blocks_of, feature
from .run import Runs, arguments


class Stack:
    """One transformer's blocks, and how they fare in the call that is under way."""

    def __init__(self, runs: Runs, family: Family):
        self.runs, self.family = runs, family
        self.computes = True
        self.embedded: torch.Tensor | None = None
        self._entered: torch.Tensor | None = None

    def hooks(self, model: torch.nn.Module) -> dict[torch.nn.Module, ModelHook]:
        """For the model and its parts."""
        blocks = blocks_of(model, self.family)
        hooks: dict[torch.nn.Module, ModelHook] = {
            block: _Block(self, first=block is blocks[0], last=block is blocks[-1])
            for block in blocks
        }
        if self.family.embedder:
            hooks[model.get_submodule(self.family.embedder)] = _Embedder(self)
        return hooks | {model: _Root(self)}

    def enter(self, block: torch.nn.Module, given: Mapping[str, Any]) -> None:
        """At the first block: decides."""
        run, stream = self.runs.run, self.runs.now
        assert run is not None
        image = given["hidden_states"]
        if stream.kept and not stream.kept[0].fits(image):
            stream.forget()
        now = feature(run.feature, block, {**given, TIMESTEP: self.embedded})
        before, stream.feature = stream.feature, now.detach()
        decision = stream.decider.forced(stream.step)
        if decision is None:
            change = None
            if before is not None and before.shape == now.shape and stream.nodes:
                change = float(distance(stream.feature, before))
            decision = stream.decider.decide(stream.step, change)
        run.record.add(stream.step, decision, stream.first)
        self.computes, self._entered = decision.compute, image

    def leave(self, image: torch.Tensor) -> None:
        """After the last block, where it was computed."""
        stream, run = self.runs.now, self.runs.run
        assert run is not None and self._entered is not None
        stream.kept = stream.kept or [History(run.reuse)]
        stream.kept[0].store(stream.step.time, (image - self._entered).detach())

    def reused(self) -> torch.Tensor:
        """What the last block would have given of the image."""
        stream = self.runs.now
        assert self._entered is not None
        return self._entered + stream.kept[0].guess(stream.step.time)

    def end(self) -> None:
        """The call is over."""
        self._entered = self.embedded = None


class _Root(ModelHook):
    """At the transformer: finds the step."""

    _is_stateful = True

    def __init__(self, stack: Stack):
        super().__init__()
        self.stack, self.contexts = stack, stack.runs.contexts  # diffusers looks for it here

    def pre_forward(self, module: torch.nn.Module, *args: Any, **kwargs: Any) -> tuple:
        """Before the first block."""
        self.stack.runs.enter(module, args, kwargs)
        return args, kwargs

    def post_forward(self, module: torch.nn.Module, output: Any) -> Any:
        """After the last one."""
        self.stack.end()
        return output

    def reset_state(self, module: torch.nn.Module) -> torch.nn.Module:
        """At a pipeline's end."""
        if self.stack.runs.run is not None:
            self.stack.runs.run.streams.clear()
        return module


class _Embedder(ModelHook):
    """At the module whose first result is the timestep's embedding."""

    def __init__(self, stack: Stack):
        super().__init__()
        self.stack = stack

    def post_forward(self, module: torch.nn.Module, output: Any) -> Any:
        """Notes it."""
        self.stack.embedded = output[0]
        return output


class _Block(ModelHook):
    """At a block."""

    def __init__(self, stack: Stack, first: bool, last: bool):
        super().__init__()
        self.stack, self.first, self.last = stack, first, last

    def new_forward(self, module: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
        """Computes, or gives back what came in; the last one, what all of them would have given."""
        stack, given = self.stack, arguments(module, args, kwargs)
        place, count = stack.family.image, stack.family.returns
        if self.first:
            stack.enter(module, given)
        if stack.computes:
            out = self.fn_ref.original_forward(*args, **kwargs)
            if self.last:
                stack.leave(out if count == 1 else out[place])
            return out
        image = stack.reused() if self.last else given["hidden_states"]
        if count == 1:
            return image
        words = given["encoder_hidden_states"]
        return (image, words) if place == 0 else (words, image)
