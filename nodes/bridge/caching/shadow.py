"""Stand-ins for sub-modules, for the length of one call."""

from __future__ import annotations

from contextlib import ExitStack

import torch


def shadow_attr(stack: ExitStack, module: torch.nn.Module, name: str, value: object) -> None:
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
