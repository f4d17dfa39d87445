"""Convolutions of 1 x 1 that are linears in all but their shape, (N, K, 1, 1): SANA's feed-forward
has half of its weights in two of them (Xie et al., 2024, arXiv:2410.10629, section 2.2).

They are planned, quantized and stored as matrices (N, K).
"""

from collections.abc import Iterable
from fnmatch import fnmatchcase

PATTERNS = (
    "transformer_blocks.*.ff.conv_inverted.weight",
    "transformer_blocks.*.ff.conv_point.weight",
)
"""Names of their weights in diffusers' models."""


def is_one(name: str) -> bool:
    """Whether a tensor is the weight of one, by its name."""
    return any(fnmatchcase(name, pattern) for pattern in PATTERNS)


def has_some(names: Iterable[str]) -> bool:
    """Whether a model of these tensors has such convolutions."""
    return any(is_one(name) for name in names)


def matrix(name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """(N, K) of the weight (N, K, 1, 1) of one; any other shape as it is."""
    return shape[:2] if is_one(name) and shape[2:] == (1, 1) else shape
