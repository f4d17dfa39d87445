"""What a file of ComfyUI's folders is, in one line: any that ComfyUI or Nibble reads.

Nibble's own            by its metadata
other programs' 4 bits  opening.py
models to quantize      source.py: what their matrices are stored as; architectures.py: which they
                        are, known or guessed
the rest                kinds.py, by the names of the tensors
pickles                 by their first bytes, without being read
"""

from __future__ import annotations

import json
import os
from collections.abc import Collection
from pathlib import Path

from ...kernels.optional import optional
from ..files.architectures import recognise
from ..files.checkpoint import QuantizedFile
from ..files.errors import FileRefused, reading
from ..files.kinds import Kind, kind_of, own_kind
from ..files.safetensors import SafetensorsFile
from ..files.source import Source
from ..files.source_files import INDEX, SHARD
from .nunchaku_folder import parts_of
from .nunchaku_lora import is_nunchaku_lora
from .opening import is_4bit, method_of, open_4bit

_OURS = "Load SVDQuant Model, Load Diffusion Model"
_PICKLE = Kind(
    "a PyTorch pickle, which can run code when it is opened and is not read here",
    "",
    "the loader of its folder",
)
_GGUF = Kind("a GGUF file, of which the package gguf would tell more", "", "a node pack for GGUF")
_PICKLES = (b"PK\x03\x04", b"\x80")
_PARTS = ("transformer_blocks", "unquantized_layers", "diffusion_pytorch_model")
_LONGEST_JSON = 2**26  # bytes


def identify(path: str | os.PathLike) -> Kind:
    """What a file, or the folder of a model, is. Reads no weights. Raises FileRefused for a file
    that is damaged.
    """
    path = Path(path)
    with reading(path):
        if path.is_dir():
            return _low_bit(open_4bit(path)) if is_published(path) else _folder(path)
        if path.suffix == ".gguf" and optional("gguf")[0] is None:
            return _GGUF
        if path.name.endswith((INDEX, ".gguf")) or SHARD.fullmatch(path.name):
            return _of_names(Source(path))
        if path.suffix == ".json":
            return _json(path)
        return _PICKLE if _is_pickle(path) else _safetensors(path)


def is_published(path: str | os.PathLike) -> bool:
    """Whether a file, or a folder, is a low-bit model that `open_4bit` opens. Raises FileRefused
    for a folder that lacks a part.
    """
    path = Path(path)
    if not path.is_dir():
        return is_4bit(path)
    if not any(file.name.startswith(_PARTS) for file in path.glob("*.safetensors")):
        return False
    parts = parts_of(path)
    return parts is not None and is_4bit(parts[0])


def _is_pickle(path: Path) -> bool:
    if not path.exists():
        return False  # the reader of safetensors says so
    with open(path, "rb") as file:
        start = file.read(9)
    # a header's length may begin as anything
    return start[8:] != b"{" and start.startswith(_PICKLES)


def _folder(path: Path) -> Kind:
    try:
        return _of_names(Source(path))
    except FileRefused:
        if (path / "model_index.json").is_file():
            return Kind("a folder of diffusers, a whole pipeline", "diffusers", "diffusers")
        raise


def _json(path: Path) -> Kind:
    with open(path, "rb") as file:
        content = json.loads(file.read(_LONGEST_JSON))
    kind = own_kind(content.get("format")) if isinstance(content, dict) else None
    if kind is None:
        raise FileRefused(f"{path.name} is text (JSON) without a model; choose a model's file.")
    return kind


def _safetensors(path: Path) -> Kind:
    with SafetensorsFile(path) as stored:
        header = stored.header
        own = own_kind(header.metadata.get("format"))
        if own is not None:
            return own
        if is_4bit(path):
            return _low_bit(open_4bit(path))
        if is_nunchaku_lora(header):
            return Kind("a LoRA in Nunchaku's form", "loras", "Load LoRA, once converted")
        first = kind_of(header.tensors, first=True)
    return first or _of_names(Source(path))


def _low_bit(file: QuantizedFile) -> Kind:
    """A low-bit model, whoever wrote it."""
    if file.metadata.get("format") != "nibble":
        opens = "Load SVDQuant Model" if "Nunchaku" in file.kind else _OURS
        return Kind(f"a diffusion model, {file.family}, {file.kind}", "diffusion_models", opens)
    method = method_of(file.files[0].header)
    if method == "vq":
        bits = file.fact("recipe").get("bits", "few")
        how = f"Nibble's VQ, {bits} bits"
    else:
        how = "Nibble's SVDQuant, 4 bits"
    return Kind(f"a diffusion model, {file.family}, {how}", "diffusion_models", _OURS)


def _of_names(source: Source) -> Kind:
    """A model that can be quantized, or what else has tensors of these names."""
    try:
        family = recognise(source.shapes, source.name)
    except FileRefused:
        return kind_of(source.shapes) or _unknown(source.shapes)
    what = f"{family.name}, {source.stored_as}"
    if family.encoder:
        return Kind(f"a text encoder, {what}", "text_encoders", "Load CLIP")
    if source.left_out:
        whole = f"a checkpoint: a diffusion model, {what}, with its VAE or text encoder"
        return Kind(whole, "checkpoints", "Load Checkpoint")
    if source.is_one_file:
        return Kind(f"a diffusion model, {what}", "diffusion_models", "Load Diffusion Model")
    form = f"a diffusion model in a form that Nibble quantizes, {what}"
    return Kind(form, "diffusion_models", "the quantize nodes")


def _unknown(names: Collection[str]) -> Kind:
    few = ", ".join(sorted(names)[:3]) or "none"
    return Kind(
        f"not known to Nibble ({len(names)} tensors, the first of them {few})",
        "",
        "the program that it was made for",
    )
