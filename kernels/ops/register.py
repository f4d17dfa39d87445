"""Registration with torch's dispatcher: `torch.ops.nibble.*`.

torch keeps one registry a process. A second copy of this package (ComfyUI's folder beside an
installed one) finds the ops registered and uses them; if its schemas differ it refuses to load,
because the two copies would call each other's code.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor


def _resolved(value: Any) -> Any:
    """A tensor, or each tensor of a list, without torch's lazy negation and conjugation."""
    if isinstance(value, Tensor):
        return value.resolve_conj().resolve_neg()
    if isinstance(value, (list, tuple)):
        return [_resolved(entry) for entry in value]
    return value


def _sees_values(schema: torch._C.FunctionSchema, run: Callable) -> Callable:
    """`run` with the values of tensors in lists: torch's dispatcher resolves lazy negation and
    conjugation of single tensors and of `Tensor[]`, and hands a `Tensor?[]` on as it is.
    """
    if not any("List" in str(argument.type) for argument in schema.arguments):
        return run

    @functools.wraps(run)
    def on_values(*arguments: Any) -> Any:
        return run(*map(_resolved, arguments))

    return on_values


class Gradient(NamedTuple):
    """An op's autograd: what is kept of its inputs, and the backward pass."""

    save: Callable[[Any, tuple, Any], None]
    backward: Callable[..., tuple]


def register(
    op: str, schema: str, run: Callable, fake: Callable, gradient: Gradient | None = None
) -> Callable[..., Any]:
    """Define one op, or find it defined by another copy of this package with the same schema.

    fake: gives the shapes and dtypes of results, after the same refusals as `run`.
    Returns its overload. Raises ImportError where another copy has another schema.
    """
    name = f"nibble::{op}"
    parsed = torch._C.parse_schema(f"{name}{schema}")
    found = getattr(torch.ops.nibble, op, None)
    if found is None:
        torch.library.define(name, schema, tags=(torch.Tag.pt2_compliant_tag,))
        torch.library.impl(name, "default", _sees_values(parsed, run))
        torch.library.register_fake(name, fake)
        if gradient is not None:
            torch.library.register_autograd(name, gradient.backward, setup_context=gradient.save)
    elif found.default._schema != parsed:
        raise ImportError(
            f"another version of Nibble in this process defines {found.default._schema} where this"
            f" one has {parsed}: keep only one of the two installations"
        )
    return getattr(torch.ops.nibble, op).default


def need_gradients(*tensors: Tensor | None) -> bool:
    """Whether autograd records a call with these inputs."""
    return torch.is_grad_enabled() and any(
        tensor is not None and tensor.requires_grad for tensor in tensors
    )


def grad_bias(ctx: Any, grad: Tensor, position: int) -> Tensor | None:
    """Sum of grad (M, N) over tokens in float32 or wider, if asked for at this input's position."""
    # The dispatcher drops trailing arguments that equal their defaults, so a bias of None may have
    # no entry at all.
    if ctx.bias_dtype is None or not ctx.needs_input_grad[position]:
        return None
    return grad.sum(0, dtype=torch.promote_types(grad.dtype, torch.float32)).to(ctx.bias_dtype)
