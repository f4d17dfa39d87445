"""Nunchaku's INT4 files (written by deepcompressor): a linear's tensors and their meaning there,
turned into Nibble's own.

    SVDQuant   qweight int8 (N, K/2) · wscales (K/64, N) · smooth_factor (K,) · proj_down (K, R) ·
      proj_up (N, R) · bias (N,), all tiled
    AWQ        qweight int32 (N/4, K/2) · wscales, wzeros (K/64 and padding, N) · bias (N,); W = q *
      wscales + wzeros

The first files came as a folder of two, later ones as one; older names are put in today's words
first. The input of a layer behind a GELU is unsigned, with the shift folded into its bias, as in
Nibble. AWQ rows of a modulation lie interleaved, with the 1 of "1 + scale" in the
bias: both are undone. q, k and v are one module; FLUX's single blocks keep as two modules what
    ComfyUI has as one (see `joining`).

Diffusers' own dialect (Nunchaku Lite, quantization/nunchaku in its documentation) packs single
linears of diffusers' models in the same way: q, k and v stay apart, with a smoothing each, all
inputs are signed, and modulations have their natural rows and bias.
"""

import re
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from fnmatch import fnmatchcase
from pathlib import Path

import torch
from torch import Tensor

from ..files.checkpoint import QuantizedFile
from ..files.errors import reader
from ..files.safetensors import Header, SafetensorsFile, TensorInfo, TensorSpec
from ..weights.awq_w4a16 import W4A16Weight
from ..weights.base import StoredWeight, json_tensor
from ..weights.formats import FourBitWeight
from ..weights.fuse import join_columns, join_rows, smoothings
from ..weights.svdquant_w4a4 import SVDQuantWeight
from . import swizzle
from .names import SUFFIXES, Part, Recipe, checkpoint_prefix, family_of, modern
from .nunchaku_affine import centred_zeros, shift_of_one
from .nunchaku_check import SUFFIXES_OF_LAYERS, fault_of
from .nunchaku_folder import folder_metadata
from .unfuse_norms import find_fused, unfused

# metadata that Nunchaku's own programs read
FACTS = ("config", "comfy_config", "model_class", "quantization_config")
_OWN = {*SUFFIXES_OF_LAYERS, *SUFFIXES, "smooth_factor_orig", "bias", "wtscale", "wcscales"}
_FLOAT_SCALES = ("wtscale", "wcscales")  # of NVFP4, see nunchaku_fp4.py
_UNREAD = ("smooth_factor_orig",)  # of no use at run time
_MARKS = (".qweight", ".wscales")
_LITE = "nunchaku_lite"
_SEPARATE = (".attn.to_q.qweight", ".attn.add_q_proj.qweight", ".attention.to_q.qweight")


def is_nunchaku(header: Header) -> bool:
    """Whether a file holds linears in Nunchaku's format, from its header."""
    return any(name.endswith(_MARKS) for name in header.tensors)


class NunchakuFile(QuantizedFile):
    """An opened file, or files; see QuantizedFile. folder: where JSON files tell what the headers
    do not.
    """

    kind = "Nunchaku INT4"
    built_by: dict[str, str] = {}  # its "config" is diffusers' (see FACTS)

    def __init__(self, files: list[SafetensorsFile], folder: Path | None = None):
        with ExitStack() as opened:
            for stored in files:
                opened.enter_context(stored)
            super().__init__(files, {})
            self._folder = folder
            self._folder_metadata = folder_metadata(folder) if folder else {}
            for stored in files:
                self.metadata |= stored.header.metadata
            self.metadata |= self._folder_metadata
            self._index()

    @reader
    def _index(self) -> None:
        """Finds the layers' tensors and what they are put together of, and checks their shapes."""
        stored = {name: file for file in self.files for name in file.header.tensors}
        prefix = checkpoint_prefix(stored)
        raw = [(name.removeprefix(prefix), (file, name)) for name, file in stored.items()]
        self._family = family_of((name for name, _ in raw), self.path.name)
        self._stored = {modern(name, self._family): found for name, found in raw}
        if len(self._stored) != len(raw):
            raise self.refusal(
                "holds some layers twice, under old and new names; download it again"
            )
        self._modules = {name.rpartition(".")[0] for name in self._stored}
        self._quantized = {
            name.removesuffix(".qweight") for name in self._stored if name.endswith(".qweight")
        }
        self._lite = any(_LITE in self.metadata.get(key, "") for key in FACTS) or any(
            name.endswith(_SEPARATE) for name in self._stored
        )
        self.kind = "Nunchaku Lite INT4 (diffusers)" if self._lite else type(self).kind
        self._check()
        self._fused = find_fused(
            self._family, self._quantized, self._read, self._stored.__contains__
        )
        self._recipes = self._find_recipes()
        self.layers = {
            name: self._facts(name, recipe)
            for name, recipe in self._recipes.items()
            if self._is_quantized(name, recipe)
        }

    @property
    def family(self) -> str:
        return self._family.name

    def is_current(self) -> bool:
        same = self._folder is None or folder_metadata(self._folder) == self._folder_metadata
        return same and super().is_current()

    # ---- what is where

    def _info(self, name: str) -> TensorInfo:
        file, stored = self._stored[name]
        return file.header.tensors[stored]

    def _read(self, name: str) -> Tensor:
        file, stored = self._stored[name]
        return file.read(stored)

    def _check(self) -> None:
        """What can be wrong with single modules, before anything is put together."""
        if not self._quantized:
            raise self.refusal("holds no quantized layers; download the 4-bit file again")
        for module in sorted(self._quantized):
            infos = {
                suffix: self._info(f"{module}.{suffix}")
                for suffix in (*SUFFIXES_OF_LAYERS, "bias", *_FLOAT_SCALES)
                if f"{module}.{suffix}" in self._stored
            }
            fault = self._faults(module, infos)
            if fault:
                raise self.refusal(fault)

    def _faults(self, module: str, infos: Mapping[str, TensorInfo]) -> str | None:
        """What to refuse a module for, as the rest of a sentence; None for a sound one."""
        return fault_of(module, infos, self._int4())

    def _int4(self) -> str:
        """What to download instead."""
        name = re.sub(r"(?i)(nv)?fp4", "int4", self.path.name)
        return (
            f"download {name if name != self.path.name else 'the file with int4 in its name'}:"
            " Nibble runs it on every GPU"
        )

    def _find_recipes(self) -> dict[str, Recipe]:
        recipes = self._family.resolve(self._modules)
        used = {part.module for recipe in recipes.values() for part in recipe.parts}
        left = sorted(self._modules - used)
        if left and not self._family.rest:
            raise self.refusal(
                f"holds {left[0]}, which is no part of {self.family}; choose a file of"
                f" {self.family} alone"
            )
        return recipes | {module: Recipe((Part(module),)) for module in left}

    def _is_quantized(self, name: str, recipe: Recipe) -> bool:
        states = {part.module in self._quantized for part in recipe.parts}
        if len(states) > 1:
            raise self.refusal(f"has {name} half in 4 and half in 16 bits; download it again")
        return states.pop()

    # ---- facts and sizes, without reading weights

    def _facts(self, name: str, recipe: Recipe) -> dict:
        parts = [part.module for part in recipe.parts]
        if f"{parts[0]}.wzeros" in self._stored:
            if len(parts) > 1:
                raise self.refusal(
                    f"has {name} in several pieces of 4-bit weights only, which no known program"
                    " writes; download it again"
                )
            return {"format": W4A16Weight.FORMAT}
        unsigned = [self._is_unsigned(part) for part in parts]
        widths = [2 * self._info(f"{part}.qweight").shape[1] for part in parts]
        first = widths[0] if recipe.axis == 1 and unsigned == [False, True] else 0
        options = (
            {"act_unsigned": True} if all(unsigned) else {"unsigned_from": first} if first else {}
        )
        if any(unsigned) and not options:
            raise self.refusal(
                f"has {name} in pieces whose inputs have different signs; download it again"
            )
        return (
            {"format": SVDQuantWeight.FORMAT, "rank": self._rank(parts, recipe.axis)}
            | options
            | self._several_smoothings(recipe)
        )

    def _is_unsigned(self, module: str) -> bool:
        return not self._lite and self._family.is_unsigned(module)

    def _splits(self, module: str) -> int:
        return 0 if self._lite else self._family.splits(module)

    def _several_smoothings(self, recipe: Recipe) -> dict:
        """{"smooth_rows": heights} where parts one above another smooth their input each in its own
        way.
        """
        if recipe.axis or len(recipe.parts) == 1:
            return {}
        heights = [
            (self._info(f"{part.module}.qweight").shape[0] // part.pieces,) for part in recipe.parts
        ]
        factors = [self._read(f"{part.module}.smooth_factor") for part in recipe.parts]
        if len({factor.shape for factor in factors}) > 1:
            return {}  # they read different inputs: refused when they are joined
        rows = smoothings(factors, heights)[1]
        return {"smooth_rows": list(rows)} if rows else {}

    def _rank(self, parts: list[str], axis: int) -> int:
        """The sum of the parts' ranks, or that of the factor which they share."""
        suffix = "proj_up" if axis else "proj_down"
        ranks = [self._info(f"{part}.{suffix}").shape[1] for part in parts]
        if len(parts) > 1 and len({self._info(f"{part}.{suffix}").shape for part in parts}) == 1:
            first = self._read(f"{parts[0]}.{suffix}")
            if all(torch.equal(self._read(f"{part}.{suffix}"), first) for part in parts[1:]):
                return ranks[0]
        return sum(ranks)

    @property
    def units(self) -> Iterable[str]:
        return self._recipes

    @reader
    def specs(self, name: str) -> list[TensorSpec]:
        # small, or with zero points whose dtype depends on their values
        if self.layers.get(name, {}).get("format") != SVDQuantWeight.FORMAT:
            return [
                TensorSpec(key, tensor.dtype, tuple(tensor.shape))
                for key, tensor in self.unit(name).items()
            ]
        recipe, facts = self._recipes[name], self.layers[name]
        heights = [
            self._info(f"{part.module}.qweight").shape[0] // part.pieces for part in recipe.parts
        ]
        widths = [2 * self._info(f"{part.module}.qweight").shape[1] for part in recipe.parts]
        n, k = (sum(heights), widths[0]) if recipe.axis == 0 else (heights[0], sum(widths))
        part, r = recipe.parts[0].module, facts["rank"]
        smooth = (len(facts["smooth_rows"]), k) if "smooth_rows" in facts else (k,)
        rows = [
            ("weight", "qweight", (n, k // 2)),
            ("weight_scale", "wscales", (k // 64, n)),
            ("weight_proj_down", "proj_down", (k, r)),
            ("weight_proj_up", "proj_up", (n, r)),
            ("weight_smooth_factor", "smooth_factor", smooth),
        ]
        biased = next((p.module for p in recipe.parts if f"{p.module}.bias" in self._stored), None)
        specs = [
            TensorSpec(f"{name}.{own}", self._info(f"{part}.{theirs}").dtype, shape)
            for own, theirs, shape in rows
        ]
        specs += (
            [TensorSpec(f"{name}.bias", self._info(f"{biased}.bias").dtype, (n,))] if biased else []
        )
        return [
            *specs,
            TensorSpec(f"{name}.comfy_quant", torch.uint8, tuple(json_tensor(facts).shape)),
        ]

    # ---- tensors

    @reader
    def unit(self, name: str) -> dict[str, Tensor]:
        recipe = self._recipes[name]
        with self:
            if name in self.layers:
                return self._layer(name, recipe)
            return self._plain(name, recipe)

    def _layer(self, name: str, recipe: Recipe) -> dict[str, Tensor]:
        try:
            weight: StoredWeight
            if self.layers[name]["format"] == W4A16Weight.FORMAT:
                weight = self._in_order(name, self._w4a16(recipe.parts[0]))
            else:
                weight = self._joined(name, recipe)
        except ValueError as error:
            raise self.refusal(
                f"has pieces of {name} that do not fit together ({error})"
            ) from error
        if weight.facts() != self.layers[name]:
            raise self.refusal(f"changed while {name} was read; close the program that writes it")
        return weight.tensors(name)

    def _joined(self, name: str, recipe: Recipe) -> StoredWeight:
        join = join_columns if recipe.axis else join_rows
        return self._in_order(name, join([self._w4a4(part) for part in recipe.parts]))

    def _in_order(self, name: str, weight: FourBitWeight) -> FourBitWeight:
        """The weight, its halves exchanged where the file has them the other way round."""
        if name not in self._family.swapped:
            return weight
        n = weight.shape[0]
        return weight.cat([weight.rows(n // 2, n), weight.rows(0, n // 2)])

    def _w4a4(self, part: Part) -> SVDQuantWeight:
        def tensor(suffix: str) -> Tensor:
            return self._read(f"{part.module}.{suffix}")

        bias = (
            swizzle.vector_from_nunchaku(tensor("bias"))
            if f"{part.module}.bias" in self._stored
            else None
        )
        whole = SVDQuantWeight(
            swizzle.weight_from_nunchaku(tensor("qweight")),
            swizzle.scale_from_nunchaku(tensor("wscales")),
            swizzle.down_from_nunchaku(tensor("proj_down")),
            swizzle.up_from_nunchaku(tensor("proj_up")),
            swizzle.vector_from_nunchaku(tensor("smooth_factor")),
            bias,
            self._is_unsigned(part.module),
        )
        if part.module in self._fused:
            whole = unfused(whole, self._fused[part.module])
        return _piece(whole, part)

    def _w4a16(self, part: Part) -> W4A16Weight:
        splits = self._splits(part.module)
        groups = self._info(f"{part.module}.qweight").shape[1] // 32
        codes = swizzle.awq_from_nunchaku(self._read(f"{part.module}.qweight"))
        scale, zeros = (
            self._read(f"{part.module}.{suffix}")[:groups] for suffix in ("wscales", "wzeros")
        )
        bias = self._read(f"{part.module}.bias") if f"{part.module}.bias" in self._stored else None
        if splits:
            codes, scale, zeros = (
                swizzle.rows_from_adanorm(t, splits) for t in (codes, scale.t(), zeros.t())
            )
            scale, zeros = scale.t(), zeros.t()
            bias = (
                None
                if bias is None
                else shift_of_one(swizzle.rows_from_adanorm(bias, splits), splits, -1)
            )
        return _piece(
            W4A16Weight(codes, scale.contiguous(), centred_zeros(zeros, scale), bias), part
        )

    def _plain(self, name: str, recipe: Recipe) -> dict[str, Tensor]:
        """What was left in 16 bit: every tensor of the module."""
        first = recipe.parts[0].module
        suffixes = [
            key[len(first) :].lstrip(".") for key in self._stored if key.rpartition(".")[0] == first
        ]
        return {
            self._plain_name(name, suffix): self._plain_tensor(name, recipe, suffix)
            for suffix in suffixes
            if suffix not in _UNREAD
        }

    def _plain_name(self, name: str, suffix: str) -> str:
        scale = suffix == "weight" and any(
            fnmatchcase(name, pattern) for pattern in self._family.scale
        )
        return ".".join(filter(None, [name, "scale" if scale else suffix]))

    def _plain_tensor(self, name: str, recipe: Recipe, suffix: str) -> Tensor:
        pieces = []
        for part in recipe.parts:
            key = ".".join(filter(None, [part.module, suffix]))
            if key not in self._stored:
                raise self.refusal(f"lacks {key}; the file is damaged: download it again")
            pieces.append(self._read(key).chunk(part.pieces)[part.piece])
        if recipe.axis == 1 and pieces[0].dim() == 1:
            raise self.refusal(
                f"has {name} in pieces with a bias each, in 16 bit; download it again"
            )
        tensor = torch.cat(pieces, recipe.axis) if len(pieces) > 1 else pieces[0].contiguous()
        return torch.cat(tensor.chunk(2)[::-1]) if name in self._family.swapped else tensor


def _piece(weight: FourBitWeight, part: Part) -> FourBitWeight:
    height = weight.shape[0] // part.pieces
    return (
        weight if part.pieces == 1 else weight.rows(part.piece * height, (part.piece + 1) * height)
    )
