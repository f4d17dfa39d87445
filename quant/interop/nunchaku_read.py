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
from fnmatch import fnmatchcase
from pathlib import Path

import torch
from torch import Tensor

from ..files.checkpoint import DTYPES, FileRefused, Header, read_header, read_tensor
from ..files.source import PREFIXES
from ..files.writer import TensorSpec
from ..weights.awq_w4a16 import W4A16Weight
from ..weights.base import json_tensor
from ..weights.fuse import join_columns, join_rows, smoothings
from ..weights.svdquant_w4a4 import SVDQuantWeight
from . import swizzle
from .model import PublishedFile
from .names import SUFFIXES, Part, Recipe, family_of, modern
from .unfuse_norms import find_fused, unfused

BLOCKS, OTHERS = "transformer_blocks.safetensors", "unquantized_layers.safetensors"
# metadata that Nunchaku's own programs read
FACTS = ("config", "comfy_config", "model_class", "quantization_config")
_W4A4 = ("qweight", "wscales", "smooth_factor", "proj_down", "proj_up")
_W4A16 = ("qweight", "wscales", "wzeros")
_OWN = {*_W4A4, *_W4A16, *SUFFIXES, "smooth_factor_orig", "bias", "wtscale", "wcscales"}
_UNREAD = ("smooth_factor_orig",)  # of no use at run time
_MARKS = (".qweight", ".wscales")
_FLOATS = (torch.float16, torch.bfloat16, torch.float32)
_LITE, _SEPARATE = (
    "nunchaku_lite",
    (".attn.to_q.qweight", ".attn.add_q_proj.qweight", ".attention.to_q.qweight"),
)
_SHARDS = re.compile(r"diffusion_pytorch_model(?:-(\d{5})-of-(\d{5}))?\.safetensors")


def is_nunchaku(header: Header) -> bool:
    """Whether a file holds linears in Nunchaku's format, from its header."""
    return any(name.endswith(_MARKS) for name in header.tensors)


def open_nunchaku(path: Path, header: Header | None = None) -> "NunchakuFile":
    """Opens a file, or a folder of the first version. Raises FileRefused with the reason."""
    folder = path if path.is_dir() else path.parent
    if _SHARDS.fullmatch(path.name) or (
        path.is_dir() and not (path / BLOCKS).is_file() and _shards(path)
    ):
        return NunchakuFile(
            [read_header(shard) for shard in _shards(folder)], _folder_facts(folder)
        )
    if path.is_dir() or path.name in (BLOCKS, OTHERS):
        missing = [name for name in (BLOCKS, OTHERS) if not (folder / name).is_file()]
        if missing:
            raise FileRefused(
                f"The folder {folder.name} lacks {' and '.join(missing)}; download the whole folder"
                " again."
            )
        return NunchakuFile(
            [read_header(folder / BLOCKS), read_header(folder / OTHERS)], _folder_facts(folder)
        )
    return NunchakuFile([header or read_header(path)], {})


def _shards(folder: Path) -> list[Path]:
    """The file or files of a model that diffusers saved in a folder. Raises FileRefused where one
    is missing.
    """
    found = {
        path: _SHARDS.fullmatch(path.name)
        for path in sorted(folder.glob("diffusion_pytorch_model*.safetensors"))
    }
    found = {path: match for path, match in found.items() if match}
    wanted = max((int(match[2] or 1) for match in found.values()), default=0)
    if len(found) != wanted:
        raise FileRefused(
            f"The folder {folder.name} has {len(found)} of the {wanted} parts"
            " diffusion_pytorch_model-*.safetensors; download it again."
        )
    return list(found)


def _folder_facts(folder: Path) -> dict[str, str]:
    files = {"config": "config.json", "comfy_config": "comfy_config.json"}
    return {
        key: (folder / name).read_text(encoding="utf-8")
        for key, name in files.items()
        if (folder / name).is_file()
    }


class NunchakuFile(PublishedFile):
    """An opened file; see PublishedFile."""

    kind = "Nunchaku INT4"

    def __init__(self, headers: list[Header], facts: Mapping[str, str]):
        self.path, self.size = headers[0].path, sum(header.size for header in headers)
        self.metadata = {
            key: value for header in headers for key, value in header.metadata.items()
        } | dict(facts)
        raw = _without_prefix({name: header for header in headers for name in header.tensors})
        self._family = family_of((name for name, _ in raw), self.path.name)
        self.family = self._family.name
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

    # ---- what is where

    def _info(self, name: str):
        header, stored = self._stored[name]
        return header.tensors[stored]

    def _read(self, name: str) -> Tensor:
        header, stored = self._stored[name]
        return read_tensor(header, stored)

    def _check(self) -> None:
        """What can be wrong with single modules, before anything is put together."""
        fp4 = [
            name
            for name in self._stored
            if name.endswith((".wtscale", ".wcscales"))
            or (name.endswith(".wscales") and self._info(name).dtype == DTYPES["F8_E4M3"])
        ]
        if fp4:
            raise self.refusal(
                f"is an NVFP4 file, for which Nibble has no arithmetic; {self._int4()}"
            )
        if not self._quantized:
            raise self.refusal("holds no quantized layers; download the 4-bit file again")
        for module in sorted(self._quantized):
            self._check_module(module)

    def _int4(self) -> str:
        """What to download instead."""
        name = re.sub(r"(?i)(nv)?fp4", "int4", self.path.name)
        return (
            f"download {name if name != self.path.name else 'the file with int4 in its name'}:"
            " Nibble runs it on every GPU"
        )

    def _check_module(self, module: str) -> None:
        awq = f"{module}.wzeros" in self._stored
        wanted = _W4A16 if awq else _W4A4
        missing = [suffix for suffix in wanted if f"{module}.{suffix}" not in self._stored]
        if not awq and {"proj_down", "proj_up"} & set(missing):
            raise self.refusal(
                f"has no low-rank branch (rank 0) in {module}, so it is no SVDQuant file; choose"
                " another"
            )
        if missing:
            raise self.refusal(
                f"lacks {module}.{missing[0]}; the file is damaged: download it again"
            )
        shapes = {suffix: self._info(f"{module}.{suffix}").shape for suffix in wanted}
        if shapes != self._expected(module, awq, shapes):
            raise self.refusal(
                f"has a layer of unknown shape, {module} ({shapes}); it was damaged, or written by"
                " a program that differs"
            )
        bad = [
            suffix
            for suffix in wanted
            if suffix != "qweight" and self._info(f"{module}.{suffix}").dtype not in _FLOATS
        ]
        if bad or self._info(f"{module}.qweight").dtype != (torch.int32 if awq else torch.int8):
            raise self.refusal(
                f"stores {module}.{(bad or ['qweight'])[0]} in a way that Nibble cannot read;"
                f" {self._int4()}"
            )

    @staticmethod
    def _expected(
        module: str, awq: bool, shapes: Mapping[str, tuple[int, ...]]
    ) -> dict[str, tuple[int, ...]] | None:
        if len(shapes["qweight"]) != 2:
            return None
        n, k = shapes["qweight"][0] * (4 if awq else 1), shapes["qweight"][1] * 2
        if awq:
            groups = shapes["wscales"][0]
            fits = k % 64 == 0 and groups in (k // 64, swizzle.awq_groups(k))
            return (
                {"qweight": (n // 4, k // 2), "wscales": (groups, n), "wzeros": (groups, n)}
                if fits
                else None
            )
        rank = (*shapes["proj_down"], 0, 0)[1]
        fits = n % 128 == 0 and k % 128 == 0 and rank % 16 == 0 and rank > 0
        return (
            {
                "qweight": (n, k // 2),
                "wscales": (k // 64, n),
                "smooth_factor": (k,),
                "proj_down": (k, rank),
                "proj_up": (n, rank),
            }
            if fits
            else None
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

    def unit(self, name: str) -> dict[str, Tensor]:
        recipe = self._recipes[name]
        if name not in self.layers:
            return self._plain(name, recipe)
        try:
            if self.layers[name]["format"] == W4A16Weight.FORMAT:
                weight = self._w4a16(recipe.parts[0])
            else:
                weight = (join_columns if recipe.axis else join_rows)(
                    [self._w4a4(part) for part in recipe.parts]
                )
            if name in self._family.swapped:
                n = weight.shape[0]
                weight = weight.cat([weight.rows(n // 2, n), weight.rows(0, n // 2)])
        except ValueError as error:
            raise self.refusal(
                f"has pieces of {name} that do not fit together ({error})"
            ) from error
        if weight.facts() != self.layers[name]:
            raise self.refusal(f"changed while {name} was read; close the program that writes it")
        return weight.tensors(name)

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
        splits, groups = (
            self._splits(part.module),
            self._info(f"{part.module}.qweight").shape[1] // 32,
        )
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


def centred_zeros(zeros: Tensor, scale: Tensor) -> Tensor:
    """W = q * scale + zeros → W = (q - 8) * scale + result: exact, in the scale's dtype where that
    can hold it, else in float32.
    """
    exact = zeros.float() + 8 * scale.float()
    short = exact.to(scale.dtype)
    return (short if torch.equal(short.float(), exact) else exact).contiguous()


def shift_of_one(bias: Tensor, splits: int, sign: int) -> Tensor:
    """Adds sign to the scales of a modulation's bias (its second vector and the last but one),
    float32.
    """
    rows = bias.float().reshape(splits, -1).clone()
    for row in {1, splits - 2}:
        rows[row] += sign
    return rows.reshape(-1)


def _piece(weight, part: Part):
    height = weight.shape[0] // part.pieces
    return (
        weight if part.pieces == 1 else weight.rows(part.piece * height, (part.piece + 1) * height)
    )


def _without_prefix(names: Mapping[str, Header]) -> list[tuple[str, tuple[Header, str]]]:
    """(name without the prefix of a checkpoint, where it is)."""
    prefix = next(
        (
            p
            for p in ("transformer.", *PREFIXES)
            if sum(name.startswith(p) for name in names) > len(names) // 2
        ),
        "",
    )
    return [(name.removeprefix(prefix), (header, name)) for name, header in names.items()]
