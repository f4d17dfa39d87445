"""Caching of a transformer's parts by a schedule for each kind: SmoothCache (arXiv 2411.10510) on
attention and feed-forward layers. What such a layer returns is guessed; gates and norms around it
follow the current step.

A kind is the name of a list of blocks and of the layer in them: "transformer_blocks.attn",
"blocks.ffn".
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.hooks.hooks import ModelHook

from ..caching.extrapolate import Reuse
from ..caching.steps import Window
from .outputs import tensors_of, with_tensors
from .run import Runs, kept_of

_PART = re.compile(r"attn\d*|attention|ff|ffn|ff_context|feed_forward|(\w+_)?mlp")


def parts(model: torch.nn.Module) -> Iterator[tuple[str, str, torch.nn.Module]]:
    """(kind, name, layer) of every part that can be reused alone."""
    for group, blocks in model.named_children():
        if not isinstance(blocks, torch.nn.ModuleList):
            continue
        for number, block in enumerate(blocks):
            for name, layer in block.named_children():
                if _PART.fullmatch(name) and any(True for _ in layer.state_dict()):
                    yield f"{group}.{name}", f"{group}.{number}.{name}", layer


def shares(model: torch.nn.Module) -> dict[str, float]:
    """kind → its share of the model's weights: about its share of the work."""

    def weights(module: torch.nn.Module) -> int:
        held = [*module.parameters(), *module.buffers()]
        return sum(tensor.nbytes for tensor in held)

    whole, out = max(weights(model), 1), dict[str, float]()
    for kind, _, layer in parts(model):
        out[kind] = out.get(kind, 0.0) + weights(layer) / whole
    return out


@dataclass(frozen=True)
class Schedule:
    """The rule: kind → which steps compute it."""

    masks: Mapping[str, Sequence[bool]]
    window: Window

    def decider(self) -> Schedule:
        return self

    def computed(self) -> None:
        """Nothing to start again."""


class Root(ModelHook):
    """At the transformer: finds the step, and records what it computes."""

    _is_stateful = True

    def __init__(self, runs: Runs, weights: Mapping[str, float]):
        super().__init__()
        self.runs, self.weights = runs, weights
        self.contexts = runs.contexts  # diffusers looks for it here

    def pre_forward(self, module: torch.nn.Module, *args: Any, **kwargs: Any) -> tuple:
        """Before the first block."""
        stream = self.runs.enter(module, args, kwargs)
        run = self.runs.run
        assert run is not None
        step, rule = stream.step, run.rule
        forced = rule.window.forbids(step) is not None or not stream.parts
        stream.computes = {
            kind: forced or bool(rule.masks[kind][step.index]) for kind in self.weights
        }
        run.record.add_rows(step, dict(stream.computes), dict(self.weights))
        return args, kwargs

    def reset_state(self, module: torch.nn.Module) -> torch.nn.Module:
        """At a pipeline's end."""
        if self.runs.run is not None:
            self.runs.run.streams.clear()
        return module


class Part(ModelHook):
    """At a layer."""

    def __init__(self, runs: Runs, kind: str, name: str, reuse: Reuse):
        super().__init__()
        self.runs, self.kind, self.name, self.reuse = runs, kind, name, reuse

    def new_forward(self, module: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
        """Computes, or guesses."""
        stream = self.runs.now
        histories, like = stream.parts.get(self.name, ([], None))
        if histories and not stream.computes[self.kind]:
            return with_tensors(like, [kept.guess(stream.step.time) for kept in histories])
        output = self.fn_ref.original_forward(*args, **kwargs)
        values = [value.detach().clone() for value in tensors_of(output)]
        histories = kept_of(values, histories, self.reuse)
        for kept, value in zip(histories, values, strict=True):
            kept.store(stream.step.time, value)
        stream.parts[self.name] = (histories, with_tensors(output, values))
        return output
