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

from torch import Tensor

from ...quant.files import small
from ...quant.files.errors import FileRefused
from ...quant.files.integrity import is_finite
from ...quant.files.safetensors import read_header
from ...quant.files.small import SmallFile
from .adapter import LARGEST_H, CAFAdapter, Head

FORMAT = "nibble-caf/1"
ENDING = ".caf.safetensors"
KINDS = ("velocity", "acceleration")
_AGAIN = "download or train it again"


def save_file(adapter: CAFAdapter, path: str | os.PathLike) -> None:
    """Writes the adapter, whole or not at all. Raises FileRefused where the disk does not take it,
    or another run writes the same file, and ValueError for heads that hold no numbers.
    """
    tensors = {
        f"{kind}.{name}": tensor.detach()
        for kind in KINDS
        for name, tensor in adapter.head(kind).tensors().items()
    }
    for name, tensor in tensors.items():
        if not is_finite(tensor):
            raise ValueError(
                f"{name} holds values that are not finite; train again with a lower learning rate."
            )
    about = {
        "h": adapter.h,
        "rank": adapter.rank,
        "input_layer": adapter.input_layer,
        "middle": adapter.middle,
        "facts": adapter.facts,
    }
    small.write(path, tensors, {"format": FORMAT, "caf": json.dumps(about, sort_keys=True)})


def read_file(path: str | os.PathLike) -> CAFAdapter:
    """The adapter in a file, on the CPU in the file's dtype. Raises FileRefused for anything that
    is not one, whole: checksums, finite numbers of one dtype, tensors that fit one another and what
    the metadata say.
    """
    if read_header(path).metadata.get("format") != FORMAT:
        raise FileRefused(
            f"{Path(path).name} is no CAF file ({FORMAT}); choose one that Train CAF has made."
        )
    file = SmallFile(path, _AGAIN)
    about = file.json("caf")
    try:
        adapter = _built(about, file.tensors())
    except small.WRONG as error:
        if isinstance(error, FileRefused):
            raise
        why = f"{error} is missing" if isinstance(error, KeyError) else str(error)
        raise file.damaged(why) from error
    return adapter


def _built(about: dict, tensors: dict[str, Tensor]) -> CAFAdapter:
    """Raises ValueError, KeyError and their like for what is no adapter."""
    h, rank, middle = about["h"], about["rank"], about["middle"]
    _expect(type(h) in (int, float) and 0 <= h <= LARGEST_H, f"h is {h}")
    _expect(type(rank) is int and rank >= 0, f"rank is {rank}")
    _expect(type(middle) in (int, float) and 0 <= middle <= 1, f"middle is {middle}")
    _expect(type(about["input_layer"]) is str, f"input_layer is {about['input_layer']}")
    _expect(isinstance(about["facts"], dict), "its facts are none")
    dtypes = {tensor.dtype for tensor in tensors.values()}
    _expect(len(dtypes) == 1 and dtypes <= set(small.FLOATS), f"its tensors are {dtypes}")
    left = dict(tensors)
    velocity, acceleration = (_head(left, f"{kind}.", rank) for kind in KINDS)
    _expect(not left, f"it holds {', '.join(sorted(left)[:3])}")
    _expect(velocity.extra is None, "its velocity head has a weight for an initial velocity")
    one, other = (
        {name: tensor.shape for name, tensor in head.tensors().items() if name != "extra"}
        for head in (velocity, acceleration)
    )
    _expect(bool(one) and one == other, "its heads are of other layers or shapes")
    return CAFAdapter(
        velocity=velocity,
        acceleration=acceleration,
        h=float(h),
        rank=rank,
        input_layer=about["input_layer"],
        middle=float(middle),
        facts=about["facts"],
    )


def _head(tensors: dict[str, Tensor], prefix: str, rank: int) -> Head:
    """The head of that prefix, whose tensors are taken out of `tensors`."""
    layers: dict[str, dict[str, Tensor]] = {}
    extra = tensors.pop(prefix + "extra", None)
    if extra is not None:
        _expect(extra.ndim in (2, 4, 5), f"extra has the shape {tuple(extra.shape)}")
    for key in [key for key in tensors if key.startswith(prefix)]:
        layer, _, kind = key.removeprefix(prefix).rpartition(".")
        layers.setdefault(layer, {})[kind] = tensors.pop(key)
    for layer, parts in layers.items():
        shapes = {kind: tuple(tensor.shape) for kind, tensor in sorted(parts.items())}
        if rank:
            fits = set(shapes) == {"down", "up"} and all(len(s) == 2 for s in shapes.values())
            fits = fits and shapes["down"][0] == shapes["up"][1] == rank
        else:
            fits = set(shapes) == {"difference"} and len(shapes["difference"]) == 2
        said = ", ".join(f"{kind} {shape}" for kind, shape in shapes.items())
        _expect(fits and bool(layer), f"{layer} has {said} at rank {rank}")
    return Head(layers, extra)


def _expect(condition: bool, otherwise: str) -> None:
    if not condition:
        raise ValueError(otherwise)
