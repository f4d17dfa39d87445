"""What a low-bit linear is on disk, in each format: the shapes and dtypes of its tensors and the
options of its JSON, `X.comfy_quant`.

N outputs, K inputs, G = K/64 groups or H = K/group of another size, R rank, L = 16 levels, V runs
of columns; C codewords of D weights, P = K/D indices of log2(C) bits in bytes.
"""

import json
from typing import Any

import torch

from .errors import FileRefused
from .safetensors import Header, TensorInfo

# format → (the tensors that a linear must have, the options that its JSON may hold)
FORMATS = {
    "svdquant_w4a4": (
        {
            "weight": "N,K/2",
            "weight_scale": "G,N",
            "weight_proj_down": "K,R",
            "weight_proj_up": "N,R",
            "weight_smooth_factor": "K",
        },
        {"format", "rank", "act_unsigned", "rotation", "unsigned_from", "smooth_rows", "act_bits"},
    ),
    "svdquant_w4a8": (
        {
            "weight": "N,K/2",
            "weight_scale": "H,N",
            "weight_channel_scale": "N",
            "weight_table": "L",
            "weight_smooth_factor": "K",
        },
        {"format", "group", "rank", "rotation"},
    ),
    "svdquant_nvfp4": (
        {
            "weight": "N,K/2",
            "weight_scale": "N,K/16",
            "weight_scale_2": "V,N",
            "weight_proj_down": "K,R",
            "weight_proj_up": "N,R",
            "weight_smooth_factor": "K",
        },
        {"format", "rank", "scale_columns", "rounded"},
    ),
    "awq_w4a16": ({"weight": "N,K/2", "weight_scale": "G,N"}, {"format", "rank"}),
    "vq": (
        {"weight": "N,P", "weight_codebook": "C,D"},
        {"format", "codewords", "vector", "rotation", "rank"},
    ),
    # ComfyUI's own: tables of embeddings, heads and vision towers of text encoders
    "int8_tensorwise": ({"weight": "N,K", "weight_scale": "N,U"}, {"format"}),
}
# Tensors that a layer may have besides: without zero points it is symmetric, without a scale its
# rows share the codebook's, without factors it has no low-rank branch.
OPTIONAL = {
    "svdquant_w4a8": {"weight_proj_down": "K,R", "weight_proj_up": "N,R"},
    "awq_w4a16": {"weight_zeros": "G,N", "weight_proj_down": "K,R", "weight_proj_up": "N,R"},
    "vq": {"weight_scale": "N", "weight_proj_down": "K,R", "weight_proj_up": "N,R"},
}
_WEIGHT_DTYPES = {"vq": torch.uint8}  # of X.weight; int8 else
# of tensors besides X.weight that cannot be any float
_OWN_DTYPES = {
    ("svdquant_w4a8", "weight_scale"): torch.int8,
    ("svdquant_w4a8", "weight_table"): torch.int8,
    ("svdquant_nvfp4", "weight_scale"): torch.float8_e4m3fn,
    ("int8_tensorwise", "weight_scale"): torch.float32,
}
FLOATS = (torch.float16, torch.bfloat16, torch.float32)  # of all others
GROUPS = (16, 32, 64)  # columns that share a scale of svdquant_w4a8
ACT_BITS = (4, 8)  # of activations that a layer can be fitted for
# powers of two, so that every index that a file can hold is one of the codebook
CODEWORDS = tuple(1 << bits for bits in range(1, 17))


def layer_json(header: Header, name: str, text: bytes) -> dict:
    """A layer's JSON. Raises FileRefused for a format, an option or a value that is not known."""
    try:
        config = json.loads(text)
        known = FORMATS[config["format"]][1]
    except (ValueError, LookupError, TypeError, RecursionError) as error:
        raise FileRefused(
            f"{header.path.name} has a layer of an unknown format, {name}; update Nibble or"
            " quantize again."
        ) from error
    if config.keys() - known:
        raise FileRefused(
            f"{header.path.name} uses {', '.join(sorted(config.keys() - known))} in {name}, which"
            " this Nibble does not know; update Nibble."
        )
    wrong = [key for key, value in config.items() if key != "format" and not _can_be(key, value)]
    if wrong:
        raise FileRefused(
            f"{header.path.name} has a damaged layer: {name} says {wrong[0]}="
            f"{str(config[wrong[0]])[:40]}; copy the file again or quantize again."
        )
    return config


def _can_be(option: str, value: Any) -> bool:
    """Whether an option of a layer's JSON can have a value."""
    if option in ("act_unsigned", "rounded"):
        return type(value) is bool
    if option == "act_bits":
        return type(value) is int and value in ACT_BITS
    if option == "group":
        return type(value) is int and value in GROUPS
    if option in ("smooth_rows", "scale_columns"):
        return isinstance(value, list) and all(type(rows) is int and rows > 0 for rows in value)
    return type(value) is int and value >= 0


def check_layer(header: Header, name: str, config: dict) -> None:
    """Raises FileRefused for a layer whose tensors do not fit its JSON in number, shape or
    dtype.
    """
    found = {
        suffix: header.tensors[f"{name}.{suffix}"]
        for suffix in ("weight", *_rules(config, header, name))
        if f"{name}.{suffix}" in header.tensors
    }
    shapes = {suffix: info.shape for suffix, info in found.items()}
    sizes = layer_sizes(config, *(*shapes.get("weight", ()), 0, 0)[:2])
    for suffix, rule in _rules(config, header, name).items():
        if sizes is None or shapes.get(suffix) != tuple(
            sizes[letter] for letter in rule.split(",")
        ):
            raise FileRefused(
                f"{header.path.name} has a damaged layer: {name}.{suffix} is missing or has the"
                f" shape {shapes.get(suffix)}; copy the file again or quantize again."
            )
    _check_dtypes(header, name, config, found)


def _rules(config: dict, header: Header, name: str) -> dict[str, str]:
    """Suffix → its shape, in letters, of every tensor that a layer has or should have."""
    optional = {
        suffix: rule
        for suffix, rule in (OPTIONAL.get(config["format"], {}) | {"bias": "N"}).items()
        if f"{name}.{suffix}" in header.tensors or ("R" in rule.split(",") and "rank" in config)
    }
    return FORMATS[config["format"]][0] | optional | smoothing_rule(config)


def smoothing_rule(config: dict) -> dict[str, str]:
    """The shape of the smoothing where runs of rows have one each; {} for one of all rows."""
    return {"weight_smooth_factor": "P,K"} if config.get("smooth_rows") else {}


def _check_dtypes(header: Header, name: str, config: dict, found: dict[str, TensorInfo]) -> None:
    for suffix, info in found.items():
        allowed = dtypes_of(config["format"], suffix)
        if info.dtype not in allowed:
            wanted = " or ".join(str(dtype).removeprefix("torch.") for dtype in allowed)
            raise FileRefused(
                f"{header.path.name} has a damaged layer: {name}.{suffix} is not {wanted}; copy the"
                " file again or quantize again."
            )


def dtypes_of(kind: str, suffix: str) -> tuple[torch.dtype, ...]:
    """The dtypes that a layer's tensor can have, by format and suffix."""
    if suffix == "weight":
        return (_WEIGHT_DTYPES.get(kind, torch.int8),)
    own = _OWN_DTYPES.get((kind, suffix))
    return FLOATS if own is None else (own,)


def layer_sizes(config: dict, n: int, width: int) -> dict[str, int] | None:
    """What the letters of `FORMATS` stand for in a layer whose weight has the shape (n, width);
    None where no layer can be so.
    """
    if config["format"] == "int8_tensorwise":
        return {"N": n, "K": width, "U": 1}
    if config["format"] != "vq":
        if width % 32:
            return None
        return {
            "N": n,
            "K/2": width,
            "K": 2 * width,
            "G": 2 * width // 64,
            "H": 2 * width // (config.get("group") or 64),
            "L": 16,
            "R": config.get("rank", 0),
            "P": len(config.get("smooth_rows", ())),
            "K/16": width // 8,
            "V": len(config.get("scale_columns", ())) or 1,
        }
    c, d, r = config.get("codewords"), config.get("vector", 0), config.get("rank", 0)
    if c not in CODEWORDS or d < 1 or width * 8 % (c.bit_length() - 1):
        return None
    return {"N": n, "P": width, "K": width * 8 // (c.bit_length() - 1) * d, "C": c, "D": d, "R": r}
