"""What a model or a layer of diffusers is given or returns (a tensor, a tuple, a list of pictures,
a ModelOutput): its tensors, and the same with others in their places.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch


def tensors_of(value: Any) -> list[torch.Tensor]:
    """All tensors in it, in order."""
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, dict):
        return tensors_of(list(value.values()))
    if isinstance(value, (tuple, list)):
        return [tensor for part in value for tensor in tensors_of(part)]
    return []


def with_tensors(value: Any, tensors: Sequence[torch.Tensor]) -> Any:
    """A value of the same form, with these tensors."""
    return _rebuilt(value, iter(tensors))


def _rebuilt(value: Any, tensors: Iterator[torch.Tensor]) -> Any:
    if isinstance(value, torch.Tensor):
        return next(tensors)
    if isinstance(value, dict):
        return type(value)(**{name: _rebuilt(part, tensors) for name, part in value.items()})
    if isinstance(value, (tuple, list)):
        return type(value)(_rebuilt(part, tensors) for part in value)
    return value
