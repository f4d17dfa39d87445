"""The shorter way of plain eager calls: a layer is checked and flattened once, then called.

torch's dispatcher and the checks in front of an op cost more than a small layer's arithmetic. Where
nothing has to see the op (no gradient, no tracing or compiling, no mode, no functional transform,
no profiler, no tensor subclass) a call compares what it was given with what was checked before, and
goes to the compiled code. Everything else takes torch's dispatcher, where wrong arguments are
refused with their sentences.

What was checked is remembered as facts: address, shape, dtype, device and density of each
parameter, with dtype, device and features of x and the extension in use. No tensor is kept, and the
facts are compared with the tensors of each call, which are alive while it runs. So a parameter that
was moved, replaced, resized, cast or freed is never used by an old address, and one that was edited
in place is read as it is. A layer whose parameters would have to be copied is not remembered: it
would keep the copies.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from ..backends import native

LAYERS = 1024
"""Layers that one op remembers at most; a FLUX.1 has 304."""

Call = Callable[[Tensor], Tensor]
Prepare = Callable[[Tensor, tuple, tuple], Call | None]


def _unknown() -> bool:
    """Stands for a question that this torch does not answer; the call keeps to the dispatcher."""
    return True


_is_compiling = getattr(torch.compiler, "is_compiling", _unknown)
_dispatch_modes = getattr(torch._C, "_len_torch_dispatch_stack", _unknown)
_function_modes = getattr(torch._C, "_len_torch_function_stack", _unknown)
_transform = getattr(torch._C._functorch, "peek_interpreter_stack", _unknown)
_tracing = getattr(torch._C, "_get_tracing_state", _unknown)
_profiling = getattr(torch.autograd, "_profiler_enabled", _unknown)


def _watched() -> bool:
    """Whether something around this call has to see the op."""
    return bool(
        _is_compiling()
        or _dispatch_modes()
        or _function_modes()
        or _transform()
        or _tracing()
        or _profiling()
    )


def plain_facts(x: Tensor, tensors: tuple, options: tuple) -> tuple | None:
    """What has to stay as it is for a checked layer to be right; None where the call needs torch's
    dispatcher. The sixth fact is that of the first parameter.
    """
    if _watched() or type(x) is not Tensor or tensors[0] is None:
        return None
    grad = torch.is_grad_enabled()
    try:
        address = x.data_ptr()
        if not address or address % native.ALIGNMENT or not x.is_contiguous() or x.is_neg():
            return None
        if grad and x.requires_grad:
            return None
        facts: list[Any] = [native.module()[0], x.dtype, x.device, x.shape[-1], options]
        for tensor in tensors:
            if tensor is None:
                facts.append(None)
                continue
            kind = type(tensor)
            if (kind is not Tensor and kind is not Parameter) or (grad and tensor.requires_grad):
                return None
            address = tensor.data_ptr()
            dense = tensor.is_contiguous()
            facts.append((address, tensor.shape, tensor.dtype, tensor.device, dense))
    # A tensor without an address or without an axis: the op says what is wrong with it.
    except (RuntimeError, IndexError):
        return None
    return tuple(facts)


def _can_be_remembered(tensors: tuple) -> bool:
    """Facts do not tell a negated view, which the dispatcher resolves; of a dense tensor there is
    one only where it has a single element.
    """
    return all(t is None or (t.numel() != 1 and not t.is_neg()) for t in tensors)


class EagerOp:
    """An op, with the layers that it has checked.

    op: the overload that torch's dispatcher knows, whose arguments are x, tensors and options.
    prepare: from arguments that the op has accepted, what computes the layer from an x like this
        one; None where compiled code does not run it on the tensors as they are.
    """

    def __init__(self, op: Callable[..., Tensor], prepare: Prepare):
        self.op = op
        self.prepare = prepare
        self._layers: dict[int, tuple[tuple, Call | None]] = {}

    def __call__(self, x: Tensor, tensors: tuple, options: tuple = ()) -> Tensor:
        facts = plain_facts(x, tensors, options)
        if facts is None:
            return self.op(x, *tensors, *options)
        weight = facts[5][0]  # its address
        known = self._layers.get(weight)
        if known is not None and known[0] == facts:
            call = known[1]
            return self.op(x, *tensors, *options) if call is None else call(x)
        y = self.op(x, *tensors, *options)  # refuses what is wrong
        if len(self._layers) >= LAYERS:
            self._layers.clear()
        prepared = self.prepare(x, tensors, options) if _can_be_remembered(tensors) else None
        self._layers[weight] = facts, prepared
        return y
