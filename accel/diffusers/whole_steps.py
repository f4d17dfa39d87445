"""Caching of whole steps: what the transformer returns, guessed from the last computed ones. Of a
flow that is the velocity, of others what the model predicts, at the flow time of the step.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers.hooks.hooks import ModelHook

from ..caching.error_control import ErrorDecider
from .outputs import tensors_of, with_tensors
from .run import Runs, Stream, kept_of


class WholeSteps(ModelHook):
    """Around a transformer's forward."""

    _is_stateful = True

    def __init__(self, runs: Runs):
        super().__init__()
        self.runs = runs
        self.contexts = runs.contexts  # diffusers looks for it here

    def new_forward(self, module: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
        """Computes, or guesses."""
        stream = self.runs.enter(module, args, kwargs)
        run, step = self.runs.run, stream.step
        assert run is not None
        decision = stream.decider.decide(step, stream.nodes)
        run.record.add(step, decision, stream.first)
        if not decision.compute:
            return with_tensors(stream.like, [kept.guess(step.time) for kept in stream.kept])
        output = self.fn_ref.original_forward(*args, **kwargs)
        values = [value.detach().clone() for value in tensors_of(output)]
        stream.kept = kept_of(values, stream.kept, run.reuse)
        _learn(stream, values)
        for kept, value in zip(stream.kept, values, strict=True):
            kept.store(step.time, value)
        stream.like = with_tensors(output, values)
        return output

    def reset_state(self, module: torch.nn.Module) -> torch.nn.Module:
        """At a pipeline's end."""
        if self.runs.run is not None:
            self.runs.run.streams.clear()
        return module


def _learn(stream: Stream, values: list[torch.Tensor]) -> None:
    """Tells a rule that controls errors how wrong the guess for this step would have been."""
    decider, step, nodes = stream.decider, stream.step, stream.nodes
    if not isinstance(decider, ErrorDecider) or step.time in nodes:
        return
    pairs = list(zip(stream.kept, values, strict=True))
    if decider.can_guess(nodes) and all(kept.fits(value) for kept, value in pairs):
        off = sum((kept.guess(step.time) - value).abs().float().sum() for kept, value in pairs)
        size = sum(value.abs().float().sum() for value in values)
        decider.measured(step, nodes, float(off / size))
