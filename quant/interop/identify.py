"""What a file of ComfyUI's folders is, in one line: any that ComfyUI or Nibble reads.

Nibble's own            by its metadata
other programs' 4 bits  opening.py
diffusion models        architectures.py, known or guessed, with what their matrices are stored as
the rest                kinds.py, by the names of the tensors
no safetensors          by their first bytes, without being read
"""

from __future__ import annotations

import json
import os
from collections import Counter
from pathlib import Path

from ..files.architectures import recognise
from ..files.checkpoint import QuantizedFile
from ..files.errors import FileRefused, reading
from ..files.kinds import Kind, kind_of, own_kind
from ..files.safetensors import DTYPE_NAMES, Header, SafetensorsFile
from ..files.source import PREFIXES
from .nunchaku_folder import parts_of
from .nunchaku_lora import is_nunchaku_lora
from .opening import is_4bit, method_of, open_4bit

_OURS = "Load SVDQuant Model, Load Diffusion Model"
_STARTS = {
    b"GGUF": Kind("a GGUF file, quantized as llama.cpp does", "", "a node pack for GGUF"),
    b"PK\x03\x04": Kind(
        "a PyTorch pickle, which can run code when it is opened and is not read here",
        "",
        "the loader of its folder",
    ),
}
_STARTS[b"\x80"] = _STARTS[b"PK\x03\x04"]
_BESIDE = ("first_stage_model.", "cond_stage_model.", "conditioner.", "vae.", "text_encoders.")
_PARTS = ("transformer_blocks", "unquantized_layers", "diffusion_pytorch_model")
_LONGEST_JSON = 2**26  # bytes
_MOST_FORMATS = 2000  # layers whose JSON is looked at: all of them say the same, or nearly


def identify(path: str | os.PathLike) -> Kind:
    """What a file, or the folder of a model, is. Reads no weights. Raises FileRefused for a file
    that is damaged.
    """
    path = Path(path)
    with reading(path):
        if path.is_dir():
            return _low_bit(open_4bit(path)) if is_published(path) else _folder(path)
        if path.suffix == ".json":
            return _json(path)
        return _by_start(path) or _safetensors(path)


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


def _by_start(path: Path) -> Kind | None:
    """What a file is that is no safetensors file, from its first bytes."""
    if not path.exists():
        return None  # the reader of safetensors says so
    with open(path, "rb") as file:
        start = file.read(9)
    if start[8:] == b"{":  # a header's length may begin as anything
        return None
    return next((kind for begin, kind in _STARTS.items() if start.startswith(begin)), None)


def _folder(path: Path) -> Kind:
    if (path / "model_index.json").is_file():
        return Kind("a folder of diffusers, a whole pipeline", "diffusers", "diffusers")
    if (path / "config.json").is_file():
        return Kind("a folder of diffusers, one model of a pipeline", "", "diffusers")
    raise FileRefused(f"{path.name} is a folder without a model; choose one of its files.")


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
        return kind_of(header.tensors, first=True) or _model(stored) or _unknown(header)


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


def _model(stored: SafetensorsFile) -> Kind | None:
    """A diffusion model that is not quantized, or in a format of ComfyUI's; or what else."""
    header = stored.header
    prefix = _prefix(header)
    shapes = {
        name.removeprefix(prefix): info.shape
        for name, info in header.tensors.items()
        if name.startswith(prefix)
    }
    try:
        family = recognise(shapes, header.path.name).name
    except FileRefused:
        return kind_of(header.tensors)
    what = f"{family}, {_stored_as(stored, prefix)}"
    if any(name.startswith(_BESIDE) for name in header.tensors):
        whole = f"a checkpoint: a diffusion model, {what}, with its VAE or text encoder"
        return Kind(whole, "checkpoints", "Load Checkpoint")
    return Kind(f"a diffusion model, {what}", "diffusion_models", "Load Diffusion Model")


def _unknown(header: Header) -> Kind:
    few = ", ".join(sorted(header.tensors)[:3]) or "none"
    return Kind(
        f"not known to Nibble ({len(header.tensors)} tensors, the first of them {few})",
        "",
        "the program that it was made for",
    )


def _prefix(header: Header) -> str:
    """What stands before every name of the diffusion model in a file."""
    for prefix in PREFIXES:
        if sum(name.startswith(prefix) for name in header.tensors) > 5:
            return prefix
    return ""


def _stored_as(stored: SafetensorsFile, prefix: str) -> str:
    """What most of a model's matrices are stored as: a format of ComfyUI's, or a dtype."""
    tensors = stored.header.tensors
    formats = _formats(stored)
    size: Counter[str] = Counter()
    for name, info in tensors.items():
        module = name.removesuffix(".weight")
        if name.startswith(prefix) and name != module and len(info.shape) == 2:
            scaled = {f"{module}.scale_weight", f"{module}.weight_scale"} & tensors.keys()
            plain = DTYPE_NAMES[info.dtype] + " with scales" * bool(scaled)
            size[formats.get(module, plain)] += info.nbytes
    return size.most_common(1)[0][0] if size else "no matrices"


def _formats(stored: SafetensorsFile) -> dict[str, str]:
    """Module → its format, from its own JSON or the header's."""
    header = stored.header
    texts = [name for name in header.tensors if name.endswith(".comfy_quant")][:_MOST_FORMATS]
    told = {
        name.removesuffix(".comfy_quant"): json.loads(text)
        for name, text in stored.read_bytes(texts).items()
    }
    if "_quantization_metadata" in header.metadata:
        told |= json.loads(header.metadata["_quantization_metadata"])["layers"]
    return {module: _named(facts) for module, facts in told.items()}


def _named(facts: dict) -> str:
    """A format as files are called that hold it."""
    facts = facts | facts.get("params", {})
    return str(facts["format"]) + "_convrot" * bool(facts.get("convrot"))
