"""Tells models and their patches apart: in files that were made for one model, and in what a
training or a measurement may be resumed for.

The digests are in files that users have; what is fed to them may not change.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

import torch
from comfy.model_patcher import ModelPatcher

PIECES = 24  # tensors of a model whose values the fingerprint reads
SAMPLE = 256  # values of each tensor of a patch that tell LoRAs apart
PLAIN = "16 bit or more"


def fingerprint(model: ModelPatcher) -> str:
    """32 hex digits that tell models apart by class, names, shapes and kinds of weights, and by the
    values of some vectors: norms and biases. A model and its 4-bit form differ; a model and the
    same with LoRAs, put on its weights or not, do not.
    """
    network = model.model.diffusion_model
    digest = hashlib.sha256(type(network).__name__.encode())
    vectors = []
    for name, tensor in unpatched(model):
        kind = kind_of(tensor)
        digest.update(f"{name} {tuple(tensor.shape)} {kind}".encode())
        if tensor.ndim == 1 and kind == PLAIN:
            vectors.append(tensor)
    for tensor in vectors[:: max(len(vectors) // PIECES, 1)][:PIECES]:
        digest.update(tensor.detach()[:64].to("cpu", torch.float32).numpy().tobytes())
    return digest.hexdigest()[:32]


def unpatched(model: ModelPatcher) -> Iterator[tuple[str, torch.Tensor]]:
    """(name, weight) of a model's parameters without what ComfyUI has put on them in place. It
    keeps the weight before a LoRA in `backup`, and before a LoRA hook in `hook_backup`.
    """
    for name, live in model.model.diffusion_model.named_parameters():
        key = f"diffusion_model.{name}"
        if key in model.backup:
            yield name, model.backup[key].weight
        elif key in model.hook_backup:
            yield name, model.hook_backup[key][0]
        else:
            yield name, live


def patches_fingerprint(model: ModelPatcher) -> str | None:
    """16 hex digits of the patches of a model's weights (LoRAs): names, strengths and some values;
    None where there are none.
    """
    if not model.patches:
        return None
    digest = hashlib.sha256()
    for key in sorted(model.patches, key=str):
        _feed(digest, [str(key), model.patches[key]])
    return digest.hexdigest()[:16]


def _feed(digest: hashlib._Hash, value: object) -> None:
    """Strengths, names and some values of a patch."""
    if isinstance(value, torch.Tensor):
        digest.update(
            repr(tuple(value.shape)).encode()
            + value.detach().flatten()[:SAMPLE].to("cpu", torch.float32).numpy().tobytes()
        )
    elif isinstance(value, (list, tuple)):
        for part in value:
            _feed(digest, part)
    elif value is None or isinstance(value, (bool, int, float, str)):
        digest.update(repr(value).encode())
    else:  # a weight adapter, or a function
        digest.update(type(value).__name__.encode())
        _feed(digest, getattr(value, "weights", None))


def kind_of(tensor: torch.Tensor) -> str:
    """How a weight is held: the layout of a quantized one, PLAIN for any plain float."""
    layout = getattr(tensor, "_layout_cls", None)
    if layout is not None:
        return str(layout)
    return str(tensor.dtype) if tensor.element_size() == 1 else PLAIN


def weights_of(model: ModelPatcher) -> str:
    """In words: the kinds of weights of a model."""
    kinds = {kind_of(tensor) for _, tensor in unpatched(model)}
    return ", ".join(sorted(kinds - {PLAIN})) or PLAIN
