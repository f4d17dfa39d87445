"""Trees of tensors and plain values (ComfyUI's conditioning entries) as JSON beside a list of
tensors, and back.

    ["tensor", place]   ["list", [node, …]]   ["tuple", [node, …]]   ["dict", [[key, node], …]]
      ["plain", number, text, true, false or null]

Every node says what it is, so that no dictionary of the user's can be taken for something else.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable

from torch import Tensor, nn

from ...quant.files.safetensors import DTYPE_NAMES, tensor_bytes


def _is_plain(tensor: Tensor) -> bool:
    """No subclass, dense, and of a dtype that safetensors has."""
    known = type(tensor) in (Tensor, nn.Parameter) and tensor.dtype in DTYPE_NAMES
    return known and not tensor.is_sparse


def encode(tree: object, tensors: list[Tensor], where: str = "the prompt") -> list:
    """The tree as JSON; its tensors are appended to `tensors`, on the CPU, contiguous, each with
    memory of its own.

    Raises ValueError that names the key of anything else: models, ControlNets, hooks.
    """
    if isinstance(tree, Tensor) and _is_plain(tree):
        tensors.append(tree.detach().cpu().contiguous().clone())
        return ["tensor", len(tensors) - 1]
    if isinstance(tree, dict):
        if not all(type(key) is str for key in tree):
            raise ValueError(
                f"{where} has a key that is no text, which cannot be kept in a file; connect a"
                " prompt without it."
            )
        return [
            "dict",
            [[key, encode(part, tensors, f"{where}: {key}")] for key, part in tree.items()],
        ]
    if isinstance(tree, (list, tuple)):
        return [
            "list" if isinstance(tree, list) else "tuple",
            [encode(part, tensors, where) for part in tree],
        ]
    if tree is None or isinstance(tree, (bool, int, float, str)):
        return ["plain", tree]
    kind = f"a tensor of {tree.dtype}" if isinstance(tree, Tensor) else f"a {type(tree).__name__}"
    raise ValueError(
        f"{where} is {kind}, which cannot be kept in a file beside the pairs; connect a prompt of"
        " plain text or pictures, without ControlNet, GLIGEN or hooks on it."
    )


def decode(node: list, tensor: Callable[[int], Tensor]) -> object:
    """The tree that `encode` saw. tensor: place in its list → tensor. Raises ValueError for what
    `encode` never makes.
    """
    kind, *rest = node
    if len(rest) == 1 and kind == "plain":
        return rest[0]
    if len(rest) == 1 and kind == "tensor":
        return tensor(rest[0])
    if len(rest) == 1 and kind == "dict":
        return {key: decode(part, tensor) for key, part in rest[0]}
    if len(rest) == 1 and kind in ("list", "tuple"):
        return (list if kind == "list" else tuple)(decode(part, tensor) for part in rest[0])
    raise ValueError(f"a tree with {kind!r} in it")


def digest(nodes: list, tensors: list[Tensor]) -> str:
    """32 hex digits of encoded trees and their tensors."""
    sha = hashlib.sha256(
        json.dumps(
            [nodes, [[DTYPE_NAMES[tensor.dtype], list(tensor.shape)] for tensor in tensors]]
        ).encode()
    )
    for tensor in tensors:
        sha.update(tensor_bytes(tensor))
    return sha.hexdigest()[:32]
