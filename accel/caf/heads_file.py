"""A `CAFAdapter` on disk: a safetensors file of both heads.

    velocity.<layer>.{down, up} or .difference, acceleration.<the same>     the branches
    acceleration.extra                                                      the weight for v0

Its metadata hold `format` and, under `caf`, h, rank, input layer, middle and the facts of the
training as JSON.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

from safetensors.torch import save
from torch import Tensor

from ...quant.files import atomic
from ...quant.files.errors import FileRefused
from ...quant.files.safetensors import Header, read_header, read_tensor
from .adapter import CAFAdapter, Head

FORMAT = "nibble-caf/1"
ENDING = ".caf.safetensors"


def save_file(adapter: CAFAdapter, path: str | os.PathLike) -> None:
    """Writes the adapter, whole or not at all. Raises FileRefused where the disk does not
    take it.
    """
    path = Path(path)
    tensors = {
        f"{kind}.{name}": tensor.detach().cpu().contiguous()
        for kind in ("velocity", "acceleration")
        for name, tensor in adapter.head(kind).tensors().items()
    }
    about = {
        "h": adapter.h,
        "rank": adapter.rank,
        "input_layer": adapter.input_layer,
        "middle": adapter.middle,
        "facts": adapter.facts,
    }
    atomic.write(path, save(tensors, {"format": FORMAT, "caf": json.dumps(about)}))


def read_file(path: str | os.PathLike) -> CAFAdapter:
    """The adapter in a file, on the CPU in the file's dtypes. Raises FileRefused for anything that
    is not one.
    """
    header = read_header(path)
    name = Path(path).name
    if header.metadata.get("format") != FORMAT:
        raise FileRefused(f"{name} is no CAF file ({FORMAT}); choose one that Train CAF has made.")
    try:
        about = json.loads(header.metadata["caf"])
        velocity, acceleration = (
            _head(header, f"{kind}.") for kind in ("velocity", "acceleration")
        )
        return CAFAdapter(
            velocity=velocity,
            acceleration=acceleration,
            h=float(about["h"]),
            rank=int(about["rank"]),
            input_layer=str(about["input_layer"]),
            middle=float(about["middle"]),
            facts=about["facts"],
        )
    except FileRefused:
        raise
    except (KeyError, TypeError, ValueError) as error:
        raise FileRefused(f"{name} is damaged ({error}); download or train it again.") from error


def _head(header: Header, prefix: str) -> Head:
    layers: dict[str, dict[str, Tensor]] = {}
    extra = None
    for key in header.tensors:
        if key == prefix + "extra":
            extra = read_tensor(header, key)
        elif key.startswith(prefix):
            layer, kind = key.removeprefix(prefix).rsplit(".", 1)
            layers.setdefault(layer, {})[kind] = read_tensor(header, key)
    for layer, tensors in layers.items():
        if set(tensors) not in ({"down", "up"}, {"difference"}) or any(
            tensor.ndim != 2 for tensor in tensors.values()
        ):
            raise ValueError(f"{layer} has {', '.join(sorted(tensors))}")
    return Head(layers, extra)
