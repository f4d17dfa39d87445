"""Files under comfy-kitchen's names: each layer says in its `comfy_quant` what it is, as in
Nibble's own files. Such are comfy-kitchen's, and what ComfyUI saves of a MODEL in any of Nibble's
formats, with what patches put beside its layers (`SIDE`).

Writers differ in small things, all read here: the low-rank factors and the smoothing are named
`X.weight_proj_down` or `X.proj_down`, zero points `weight_zeros` or `weight_zero`; weights lie in
natural order, or in tiles where the layer's JSON says "kitchen_tile_packed_w4a4". Where the JSON
does not say so, the layers behind Qwen-Image's GELUs have unsigned inputs, as ComfyUI takes them.
"""

import json
from fnmatch import fnmatchcase

import torch
from torch import Tensor

from ..files.checkpoint import QuantizedFile
from ..files.errors import FileRefused, reader
from ..files.layer_formats import FLOATS, FORMATS, OPTIONAL, dtypes_of, layer_sizes, smoothing_rule
from ..files.safetensors import Header, SafetensorsFile, TensorSpec
from ..files.source import PREFIXES
from ..weights.base import json_tensor
from ..weights.delta import SIDE
from ..weights.formats import FORMATS as WEIGHTS
from . import swizzle

_ALIASES = {
    "weight_proj_down": "proj_down",
    "weight_proj_up": "proj_up",
    "weight_smooth_factor": "smooth_factor",
    "weight_zeros": "weight_zero",
    "weight_scale": "wscales",
}
# the only values that are understood
_FIXED = {"group_size": 64, "lowrank_branch_input_basis": "raw", "proj_down_smooth_folded": True}
_UNSIGNED = "transformer_blocks.*_mlp.net.2"
# dtypes of X.weight
_BYTES = {
    "svdquant_w4a4": (torch.int8, torch.uint8),
    "svdquant_nvfp4": (torch.int8, torch.uint8),
    "awq_w4a16": (torch.int8, torch.uint8),
    "svdquant_w4a8": (torch.int8,),
    "vq": (torch.uint8,),
}
_BESIDE = dict(SIDE.values())  # name → shape


def is_kitchen(header: Header) -> bool:
    """Whether a file holds SVDQuant or VQ linears under comfy-kitchen's names, from its header."""
    return any(name.endswith(".comfy_quant") for name in header.tensors) and (
        any(name.endswith(("proj_down", ".weight_table")) for name in header.tensors)
        or has_codebooks(header)
    )


def has_codebooks(header: Header) -> bool:
    """Whether a file holds VQ linears under Nibble's names, from its header."""
    return any(name.endswith(".weight_codebook") for name in header.tensors)


class KitchenFile(QuantizedFile):
    """An opened file; see QuantizedFile."""

    kind = "comfy-kitchen SVDQuant"

    def __init__(self, stored: SafetensorsFile):
        with stored:
            super().__init__([stored], stored.header.metadata)
            self._index(stored.header)

    @reader
    def _index(self, header: Header) -> None:
        """Finds the layers' tensors and checks their shapes; reads the layers' JSON."""
        self._header = header
        self._prefix = next(
            (
                p
                for p in PREFIXES
                if sum(name.startswith(p) for name in header.tensors) > len(header.tensors) // 2
            ),
            "",
        )
        self._names = {
            name.removeprefix(self._prefix): name
            for name in header.tensors
            if name.startswith(self._prefix)
        }
        texts = [name for name in self._names if name.endswith(".comfy_quant")]
        found = self.files[0].read_bytes(self._names[name] for name in texts)
        self._json = {
            name.removesuffix(".comfy_quant"): self._parsed(name, found[self._names[name]])
            for name in texts
        }
        self._places = {name: self._find(name) for name in self._json}
        self.layers = {name: self._facts(name) for name in self._json}
        for name in self.layers:
            self._check_shapes(name)
        owned = {key for places in self._places.values() for key in places.values()}
        self._plain = [name for name in self._names if name not in owned]
        for name in self._plain:
            self._refuse_unknown(name)
        # a model of no known family is refused at once
        _ = self.family

    def _refuse_unknown(self, name: str) -> None:
        """A tensor of a quantized layer that nobody here knows would be lost."""
        layer, _, suffix = name.rpartition(".")
        if layer in self.layers and suffix.startswith("weight_"):
            raise self.refusal(f"holds {name}, which this Nibble does not know; update Nibble")

    @property
    def patched(self) -> list[str]:
        return [name for name, places in self._places.items() if places.keys() & _BESIDE.keys()]

    def _read(self, name: str) -> Tensor:
        return self.files[0].read(self._names[name])

    def _parsed(self, name: str, text: bytes) -> dict:
        try:
            facts = json.loads(text)
            kind = facts["format"]
        except (ValueError, KeyError, TypeError) as error:
            raise self.refusal(
                f"has a layer whose JSON cannot be read, {name}; download it again"
            ) from error
        if kind not in WEIGHTS:
            raise self.refusal(
                f"stores {name.removesuffix('.comfy_quant')} as {kind} beside SVDQuant layers, and"
                " Nibble reads files of SVDQuant alone; choose such a file, or quantize the"
                " 16-bit one"
            )
        return facts

    def _find(self, name: str) -> dict[str, str]:
        """Nibble's suffix → the tensor's name in the file."""
        kind = self._json[name]["format"]
        places = {"comfy_quant": f"{name}.comfy_quant"}
        for suffix in [*FORMATS[kind][0], *OPTIONAL.get(kind, ()), *_BESIDE, "bias"]:
            known = [
                f"{name}.{spelling}"
                for spelling in (suffix, _ALIASES.get(suffix))
                if spelling and f"{name}.{spelling}" in self._names
            ]
            if known:
                places[suffix] = known[0]
            elif suffix in FORMATS[kind][0]:
                rank = " (rank 0: it is no SVDQuant layer)" if "proj" in suffix else ""
                raise self.refusal(
                    f"lacks {name}.{suffix}{rank}; download it again or choose another"
                )
        return places

    def _facts(self, name: str) -> dict:
        """The layer's JSON as Nibble writes it."""
        given = dict(self._json[name])
        kind = given.pop("format")
        for key, value in _FIXED.items():
            if given.pop(key, value) != value:
                raise self.refusal(
                    f"has {key}={self._json[name][key]!r} in {name}, and only {value!r} is"
                    " supported; choose another file"
                )
        if given.pop("layout", swizzle.KITCHEN_LAYOUT) != swizzle.KITCHEN_LAYOUT:
            raise self.refusal(
                f"stores {name} in the unknown layout {self._json[name]['layout']!r}; choose"
                " another file"
            )
        if given.keys() - FORMATS[kind][1]:
            unknown = ", ".join(sorted(given.keys() - FORMATS[kind][1]))
            raise self.refusal(
                f"uses {unknown} in {name}, which this Nibble does not know; update Nibble"
            )
        rank = self._rank(name)
        said = given.pop("rank", rank)
        if kind != "svdquant_w4a4" and not rank:
            return {"format": kind} | given
        if not rank or said != rank:
            raise self.refusal(
                f"has a low-rank branch of rank {rank} in {name}, which its JSON or the format"
                " forbids; choose another file"
            )
        if kind != "svdquant_w4a4":
            return {"format": kind} | given | {"rank": rank}
        unsigned = given.pop("act_unsigned", self._guesses_unsigned(name))
        return (
            {"format": kind, "rank": rank}
            | ({"act_unsigned": True} if unsigned else {})
            | {key: value for key, value in given.items() if value}
        )

    def _guesses_unsigned(self, name: str) -> bool:
        """Whether a layer whose JSON does not say so has unsigned inputs."""
        # comfy-kitchen knows no rotation
        return fnmatchcase(name, _UNSIGNED) and not self._json[name].get("rotation")

    def _rank(self, name: str) -> int:
        """Of the low-rank branch; 0 without one."""
        return self._last_size(name, "weight_proj_down")

    def _last_size(self, name: str, suffix: str) -> int:
        """Of a tensor's last dimension; 0 where there is none."""
        shape = self._shape(name, suffix) if suffix in self._places[name] else ()
        return shape[-1] if shape else 0

    def _shape(self, name: str, suffix: str) -> tuple[int, ...]:
        return self._header.tensors[self._names[self._places[name][suffix]]].shape

    def _tiled(self, name: str) -> bool:
        return self._json[name].get("layout") == swizzle.KITCHEN_LAYOUT

    def _natural_shape(self, name: str, suffix: str) -> tuple[int, ...]:
        shape = self._shape(name, suffix)
        if not self._tiled(name) or len(shape) < 3:
            return shape
        if suffix == "weight":
            return (shape[0] * 128, shape[1] * 32)
        return (
            (shape[0] * 128, shape[1]) if suffix == "weight_proj_up" else (shape[1], shape[0] * 128)
        )

    def _check_shapes(self, name: str) -> None:
        n, width = (*self._natural_shape(name, "weight"), 0, 0)[:2]
        facts, kind = self.layers[name], self.layers[name]["format"]
        sizes = layer_sizes(facts, n, width)
        if sizes is None:
            raise self.refusal(
                f"has a damaged layer: {name}.weight has the shape {(n, width)}, which is none of"
                f" {kind}; download it again"
            )
        sizes["S"] = self._last_size(name, "weight_side_up")
        rules = FORMATS[kind][0] | OPTIONAL.get(kind, {}) | smoothing_rule(facts) | _BESIDE
        rules["bias"] = "N"
        for suffix in self._places[name].keys() & rules.keys():
            wanted = tuple(sizes[letter] for letter in rules[suffix].split(","))
            shape = self._natural_shape(name, suffix)
            if shape != wanted:
                raise self.refusal(
                    f"has a damaged layer: {name}.{suffix} has the shape {shape} and needs"
                    f" {wanted}; download it again"
                )
            dtype = self._header.tensors[self._names[self._places[name][suffix]]].dtype
            if dtype not in self._allowed(kind, suffix):
                wanted_dtype = "floats" if self._allowed(kind, suffix) == FLOATS else "codes"
                raise self.refusal(
                    f"has a damaged layer: {name}.{suffix} holds"
                    f" {str(dtype).removeprefix('torch.')}, no {wanted_dtype}; download it again"
                )

    @staticmethod
    def _allowed(kind: str, suffix: str) -> tuple[torch.dtype, ...]:
        """The dtypes that a tensor of a layer may have."""
        return _BYTES[kind] if suffix == "weight" else dtypes_of(kind, suffix)

    @property
    def units(self) -> list[str]:
        return [*self._plain, *self.layers]

    @reader
    def specs(self, name: str) -> list[TensorSpec]:
        if name not in self.layers:
            info = self._header.tensors[self._names[name]]
            return [TensorSpec(name, info.dtype, info.shape)]
        if "weight_zeros" in self._places[name]:  # whether they stay depends on their values
            return [
                TensorSpec(key, tensor.dtype, tuple(tensor.shape))
                for key, tensor in self.unit(name).items()
            ]
        infos = {
            suffix: self._header.tensors[self._names[place]]
            for suffix, place in self._places[name].items()
            if suffix != "comfy_quant"
        }
        specs = [
            TensorSpec(
                f"{name}.{suffix}",
                self._dtype(name, suffix, info.dtype),
                self._natural_shape(name, suffix),
            )
            for suffix, info in infos.items()
        ]
        return [
            *specs,
            TensorSpec(
                f"{name}.comfy_quant", torch.uint8, tuple(json_tensor(self.layers[name]).shape)
            ),
        ]

    def _dtype(self, name: str, suffix: str, stored: torch.dtype) -> torch.dtype:
        """Of a tensor of a layer in Nibble's form: codes of 4 bits are int8."""
        is_4bit = self.layers[name]["format"] != "vq"
        return torch.int8 if suffix == "weight" and is_4bit else stored

    @reader
    def unit(self, name: str) -> dict[str, Tensor]:
        if name not in self.layers:
            return {name: self._read(name)}
        with self:
            out = {
                f"{name}.{suffix}": self._natural(name, suffix, self._read(place))
                for suffix, place in self._places[name].items()
            }
        out[f"{name}.comfy_quant"] = json_tensor(self.layers[name])
        if not out.get(f"{name}.weight_zeros", torch.ones(1)).any():
            del out[f"{name}.weight_zeros"]  # symmetric: Nibble says it by leaving them out
        beside = {key: out.pop(key) for key in [f"{name}.{part}" for part in _BESIDE] if key in out}
        try:
            weight = WEIGHTS[self.layers[name]["format"]].from_tensors(out, name)
            return weight.tensors(name) | beside
        except ValueError as error:
            raise FileRefused(
                f"{self.path.name} has a layer that cannot be used ({error}); download it again."
            ) from error

    def _natural(self, name: str, suffix: str, tensor: Tensor) -> Tensor:
        if suffix == "weight":
            tensor = tensor.view(self._dtype(name, suffix, tensor.dtype))
        if not self._tiled(name) or tensor.dim() < 3:
            return tensor
        if suffix == "weight":
            return swizzle.weight_from_kitchen(tensor)
        rows = swizzle.scale_from_kitchen(tensor)
        return rows.t().contiguous() if suffix == "weight_proj_up" else rows
