"""An IntLoRA adapter on disk: one small safetensors file.

For each layer X (or part of a fused layer, X@start-stop) `X.lora_A` int8|int16 (r, K),
`X.lora_A_scale` bf16 (K,), `X.lora_B` (N, r), `X.lora_B_scale` bf16 (N,); or `X.delta`
int8|int16|int32 (N, K), SHIFT-ADD's addend. MUL adds `X.u_scale` f32 (N,) and `X.u_zero` int16
(N,); the auxiliary matrix, where there is one, is `X.r_scale` f32 (N,) and a seed. A layer whose
base is a 16-bit model's weight, rounded, adds `X.base_scale` f32 (G, N): such files have version 2,
all others version 1. The metadata: format "intlora", intlora_version, `layers` (each layer's
variant, its k, bits or window, its seed, its base's bits and digest), `facts`, and the tensors'
checksums.
"""

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path

import torch

from ..files.errors import FileRefused, reading
from ..files.integrity import HEADER_SUM, SUMS, check_header, check_tensor
from ..files.safetensors import Header, TensorSpec, read_header, read_tensor
from ..files.writer import Writer, check_target, metadata_room
from ..merge.integer_grid import IntBase
from .adapter import Adapter, LayerAdapter, module_of
from .auxiliary import Noise
from .factors import Factors
from .rounding import Rounding
from .variants import MAX_K, Mul, Rule, Shift, ShiftAdd

VERSION = 2  # 1: no layer is rounded
# of each variant, besides _OTHERS
_OPTIONS = {"shift_add": {"k"}, "mul": {"bits"}, "shift": {"window"}}
_METADATA = {"format", "intlora_version", "layers", "facts", SUMS, HEADER_SUM}
_OTHERS = {"variant", "base", "rank", "seed", "noise", "base_bits", "base_odd"}
_INTEGERS = (torch.int8, torch.int16)
_AGAIN = "copy it again or make it anew"


def save(adapter: Adapter, target: str | os.PathLike) -> None:
    """Writes an adapter: to a temporary name first, then in its place. Raises FileRefused for a
    target that cannot be written or is another file.
    """
    check_target(None, target, kind="intlora")
    if not adapter.layers:
        raise FileRefused(
            f"{Path(target).name} would hold no layer: the adapter is empty; train it or convert a"
            " LoRA that fits the model."
        )
    layers = {key: _described(layer) for key, layer in adapter.layers.items()}
    metadata = {
        "format": "intlora",
        "intlora_version": str(1 if adapter.rounded_bits is None else VERSION),
        "layers": json.dumps(layers),
        "facts": json.dumps(adapter.facts),
    }
    tensors = {
        f"{key}.{name}": tensor
        for key, layer in adapter.layers.items()
        for name, tensor in layer.tensors().items()
    }
    specs = [
        TensorSpec(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()
    ]
    # small: begun anew each time
    with Writer(target, specs, identity=None, room=metadata_room(metadata)) as writer:
        writer.write("all", tensors, {})
        writer.finish([metadata])


def _described(layer: LayerAdapter) -> dict:
    noise = getattr(layer.rule, "noise", None)
    options = {name: getattr(layer.rule, name) for name in _OPTIONS[layer.rule.NAME]}
    aside: dict = {} if noise is None else {"seed": noise.seed, "noise": noise.name}
    if layer.rounding is not None:
        aside |= {"base_bits": layer.rounding.bits, "base_odd": layer.rounding.odd}
    return {"variant": layer.rule.NAME, "base": layer.base, "rank": layer.rank, **options, **aside}


def read(path: str | os.PathLike) -> Adapter:
    """Reads and checks an adapter. Raises FileRefused, naming the file and the fix, for anything
    that is not one, whole and of a known version.
    """
    with reading(path, _AGAIN):
        return _read(path)


def _read(path: str | os.PathLike) -> Adapter:
    header = read_header(path)
    _check_kind(header)
    check_header(header, _AGAIN)
    _check_metadata(header)
    try:
        layers = json.loads(header.metadata["layers"])
        facts = json.loads(header.metadata.get("facts", "{}"))
        sums = json.loads(header.metadata["checksums"])
        if not (
            layers
            and isinstance(layers, dict)
            and isinstance(facts, dict)
            and isinstance(sums, dict)
        ):
            raise ValueError("empty")
    except (KeyError, ValueError, RecursionError) as error:
        raise FileRefused(f"{header.path.name} has damaged metadata; {_AGAIN}.") from error
    return Adapter(
        {key: _layer(header, key, described, sums) for key, described in layers.items()}, facts
    )


def _check_kind(header: Header) -> None:
    name, version = header.path.name, header.metadata.get("intlora_version", "")
    if header.metadata.get("format") != "intlora":
        ordinary = any(
            part in key
            for key in header.tensors
            for part in (".lora_up", ".lora_down", ".lora_A", ".lora_B")
        )
        fix = (
            "is an ordinary LoRA; use Load LoRA, or Convert LoRA to IntLoRA"
            if ordinary
            else (
                "is no IntLoRA adapter; choose a file made by Train IntLoRA or Convert LoRA to"
                " IntLoRA"
            )
        )
        raise FileRefused(f"{name} {fix}.")
    if version not in map(str, range(1, VERSION + 1)):
        raise FileRefused(
            f"{name} has the IntLoRA version {version[:20]!r} and this Nibble reads up to"
            f" {VERSION}; update Nibble."
        )


def _check_metadata(header: Header) -> None:
    unknown = header.metadata.keys() - _METADATA
    if unknown:
        raise FileRefused(
            f"{header.path.name} uses {', '.join(sorted(unknown))} in its metadata, which this"
            " Nibble does not know; update Nibble."
        )


def _layer(header: Header, key: str, described: dict, sums: dict) -> LayerAdapter:
    name = header.path.name
    try:
        variant, digest = described["variant"], described["base"]
        unknown = described.keys() - _OPTIONS[variant] - _OTHERS
    except (KeyError, TypeError, AttributeError) as error:
        raise FileRefused(
            f"{name} has a layer of an unknown variant, {key}; update Nibble."
        ) from error
    if unknown:
        raise FileRefused(
            f"{name} uses {', '.join(sorted(unknown))} in {key}, which this Nibble does not know;"
            " update Nibble."
        )
    tensors = {}
    for suffix in (
        "lora_A",
        "lora_A_scale",
        "lora_B",
        "lora_B_scale",
        "delta",
        "u_scale",
        "u_zero",
        "r_scale",
        "base_scale",
    ):
        full = f"{key}.{suffix}"
        if full in header.tensors:
            tensors[suffix] = read_tensor(header, full)
            check_tensor(header, full, tensors[suffix], str(sums.get(full)), _AGAIN)
    try:
        return _built(key, described, tensors, digest)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise FileRefused(
            f"{name} has a damaged layer, {key} ({_because(error)}); {_AGAIN}."
        ) from error


def _because(error: Exception) -> str:
    return f"{error} is missing" if isinstance(error, KeyError) else str(error)


def _built(key: str, described: dict, tensors: dict, digest: str) -> LayerAdapter:
    factors = dense = None
    if "delta" in tensors:
        dense = tensors["delta"]
        n, k = dense.shape
        _expect(dense.dtype in (*_INTEGERS, torch.int32), f"delta is {dense.dtype}")
    else:
        factors = Factors(
            tensors["lora_A"], tensors["lora_B"], tensors["lora_A_scale"], tensors["lora_B_scale"]
        )
        n, k = factors.shape
        _expect(
            factors.a.dtype == factors.b.dtype
            and factors.a_scale.dtype == factors.b_scale.dtype == torch.bfloat16,
            "dtypes of the factors differ",
        )
        _expect(
            factors.rank == described.get("rank") and factors.rank > 0,
            f"the factors have rank {factors.rank}, not {described.get('rank')}",
        )
    rows = None
    if "@" in key:
        start, _, stop = key.partition("@")[2].partition("-")
        rows = int(start), int(stop)
    _expect(type(digest) is str, "it does not say which base it was made for")
    rounding = None
    if "base_bits" in described:
        rounding = Rounding(
            described["base_bits"], tensors["base_scale"], described.get("base_odd", False)
        )
        groups, outputs = rounding.scale.shape
        _expect(outputs == n and groups > 0 and k % groups == 0, "base_scale has another shape")
    return LayerAdapter(_rule(described, tensors, n), digest, factors, dense, rows, rounding)


def _rule(described: dict, tensors: dict, n: int) -> Rule:
    noise = None
    if "r_scale" in tensors:
        _expect(
            tensors["r_scale"].shape == (n,) and tensors["r_scale"].dtype == torch.float32,
            "r_scale has another shape or dtype",
        )
        _expect(
            type(described.get("seed")) is int and type(described.get("noise")) is str,
            "the seed of its auxiliary matrix is missing",
        )
        noise = Noise(described["seed"], described["noise"], tensors["r_scale"])
    if described["variant"] == "shift_add":
        _expect(
            type(described["k"]) is int and 0 <= described["k"] <= MAX_K, f"k is {described['k']}"
        )
        return ShiftAdd(described["k"])
    if described["variant"] == "shift":
        _expect(type(described["window"]) is int, f"window is {described['window']}")
        return Shift(described["window"], noise)
    _expect(
        type(described["bits"]) is int and 2 <= described["bits"] <= 8,
        f"bits are {described['bits']}",
    )
    _expect(
        tensors["u_scale"].shape == (n,) == tensors["u_zero"].shape,
        "u_scale or u_zero has another shape",
    )
    _expect(
        tensors["u_scale"].dtype == torch.float32 and tensors["u_zero"].dtype == torch.int16,
        "u_scale or u_zero has another dtype",
    )
    return Mul(tensors["u_scale"], tensors["u_zero"], described["bits"], noise)


def _expect(condition: bool, otherwise: str) -> None:
    if not condition:
        raise ValueError(otherwise)


def check_bases(
    adapter: Adapter,
    bases: Mapping[str, IntBase],
    file: str,
    model: str = "the model",
    digest: Callable[[str, tuple[int, int]], str] | None = None,
) -> None:
    """Refuses an adapter that was not made for these integers, before anything is changed. bases:
    by module name, as in the adapter;
    digest: of (module, rows), where it is known already.

    Raises FileRefused for no layer in common, a layer that the model lacks, another shape, another
    base.
    """
    known = [key for key in adapter.layers if module_of(key) in bases]
    if not known:
        raise FileRefused(
            f"{file} fits no layer of {model} (it has {', '.join(list(adapter.layers)[:3])}, the"
            f" model {', '.join(list(bases)[:3])}); choose the model that it was made for."
        )
    for key, layer in adapter.layers.items():
        base = bases.get(module_of(key))
        if base is None:
            raise FileRefused(
                f"{file} has the layer {key}, which {model} lacks or keeps in 16 bit; choose the"
                " model that it was made for."
            )
        n, k = base.shape
        start, stop = layer.rows or (0, n)
        if layer.shape != (stop - start, k) or not 0 <= start < stop <= n:
            raise FileRefused(
                f"{file} has {key} as {' x '.join(map(str, layer.shape))}, {model} as {n} x {k};"
                " choose the model that it was made for."
            )
        if (
            base.rows(start, stop).digest()
            if digest is None
            else digest(module_of(key), (start, stop))
        ) != layer.base:
            raise FileRefused(
                f"{file} was made for another 4-bit file than {model} ({key} has other integers);"
                " choose the file that it was made for, or convert or train it again on this one."
            )
