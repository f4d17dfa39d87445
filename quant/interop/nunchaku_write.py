"""A 4-bit model as Nunchaku's programs read it: `nunchaku.py` the other way round, for the families
of names.json.
"""

import dataclasses
import json
from collections.abc import Iterable
from fnmatch import fnmatchcase
from typing import NamedTuple

import torch
from torch import Tensor

from ...kernels.reference import SHIFT
from ..files.checkpoint import QuantizedFile
from ..files.errors import FileRefused
from ..files.modelspec import modelspec_of
from ..files.safetensors import TensorSpec
from ..weights.awq_w4a16 import W4A16Weight
from ..weights.formats import weight_of
from ..weights.fuse import join_rows, split_columns, split_rows
from ..weights.svdquant_w4a4 import SVDQuantWeight
from . import swizzle
from .export import Export, kept_facts
from .names import SUFFIXES, Family, Part, families
from .nunchaku_affine import shift_of_one

_FIRST_SUFFIX = {new: old for old, new in SUFFIXES.items()}
GAIN = "quantize the 16-bit file again for it"


class _Provider(NamedTuple):
    """A layer of ComfyUI's that (a part of) a module of Nunchaku's comes from."""

    target: str
    parts: tuple[Part, ...]
    axis: int
    place: int  # of the part that it is


class ToNunchaku(Export):
    """One file with Nunchaku's names: FLUX.1 under its first, which every version reads, the others
    under today's.
    """

    W4A4 = SVDQuantWeight.FORMAT  # of layers with 4-bit activations

    def __init__(self, source: QuantizedFile):
        super().__init__(source)
        self._family = self._known_family()
        self._plain = {
            name: list(source.specs(name)) for name in source.units if name not in source.layers
        }
        self._providers = self._find_providers()
        self._check()
        self.rank = self._common_rank()

    def _known_family(self) -> Family:
        for family in families():
            if self.source.family.startswith(family.name):
                return family
        known = ", ".join(family.name for family in families())
        raise FileRefused(
            f"{self.source.path.name} is a {self.source.family}, which Nunchaku's format is not"
            f" written for; choose one of: {known}."
        )

    def _find_providers(self) -> dict[str, list[_Provider]]:
        """Nunchaku's module → where its rows come from, in order."""
        found: dict[str, list[_Provider]] = {}
        for name in self.source.layers:
            pattern, number = self._family.numbered(name)
            way = self._family.rows.get(pattern, [None])[0]
            parts = (
                (Part(name),)
                if way is None
                else tuple(p._replace(module=p.module.replace("#", number)) for p in way.parts)
            )
            for index, part in enumerate(parts):
                found.setdefault(part.module, []).append(
                    _Provider(name, parts, way.axis if way else 0, index)
                )
        return {
            module: sorted(made, key=lambda p: p.parts[p.place].piece)
            for module, made in found.items()
        }

    # ---- what cannot be said there

    def _check(self) -> None:
        quantized = {
            module: self.source.layers[made[0].target] for module, made in self._providers.items()
        }
        for module, facts in quantized.items():
            target = self._providers[module][0].target
            if len(self._providers[module]) != self._providers[module][0].parts[0].pieces:
                raise self.refused(target, "has only a part of a fused layer in 4 bits", GAIN)
            expected = self._family.splits(module) > 0
            if facts["format"] == W4A16Weight.FORMAT and facts.get("rank"):
                raise self.refused(
                    target,
                    "has a low-rank branch beside 4-bit weights",
                    "merge the LoRA again without its modulation part",
                )
            if facts.get("rotation"):
                raise self.refused(
                    target, "has a rotation", "quantize the 16-bit file again with --rotation off"
                )
            self.refuse_wide(target, facts)
            if expected != (facts["format"] == W4A16Weight.FORMAT) and (
                expected or self._is_four_bit(target)
            ):
                raise self.refused(target, f"has the format {facts['format']}", GAIN)
        self._check_kept()

    def _check_kept(self) -> None:
        kept = [
            name.removesuffix(".weight")
            for name in self._plain
            if name.endswith(".weight") and len(self._plain[name][0].shape) == 2
        ]
        kept = [name for name in kept if self._is_four_bit(name)]
        refiners = [name for name in self.source.layers if self._is_refiner(name)]
        wrong = [name for name in kept if refiners or not self._is_refiner(name)]
        if wrong:
            raise self.refused(
                wrong[0], "has 16-bit weights", "quantize the 16-bit file again without --keep"
            )
        self._skip_refiners = bool(kept)

    def _is_four_bit(self, name: str) -> bool:
        return any(fnmatchcase(name, pattern) for pattern in self._family.four_bit)

    def _is_refiner(self, name: str) -> bool:
        return self._is_four_bit(name) and any(
            fnmatchcase(name, pattern) for pattern in self._family.refiners
        )

    def _common_rank(self) -> int:
        """One rank for the whole file, as Nunchaku's programs want it: the largest, in
        steps of 16.
        """
        ranks = {self._weight(module).rank for module in self._providers if self._is_w4a4(module)}
        rank = -(-max(ranks, default=0) // 16) * 16
        if not rank:
            raise FileRefused(
                f"{self.source.path.name} has no low-rank branch (rank 0), which Nunchaku's"
                f" programs cannot run; {GAIN}."
            )
        if ranks != {rank}:
            self.notes.append(
                f"low-rank branches of {', '.join(map(str, sorted(ranks - {rank})))} were filled up"
                f" with zeros to {rank}"
            )
        return rank

    def _is_w4a4(self, module: str) -> bool:
        return self.source.layers[self._providers[module][0].target]["format"] == self.W4A4

    # ---- units

    @property
    def units(self) -> Iterable[str]:
        return [*self._plain_units(), *self._providers]

    def specs(self, name: str) -> list[TensorSpec]:
        return [
            TensorSpec(key, tensor.dtype, tuple(tensor.shape))
            for key, tensor in self.make(name).items()
        ]

    def make(self, name: str) -> dict[str, Tensor]:
        if name not in self._providers:
            return self._make_plain(name)
        if self._is_w4a4(name):
            return self._named(name, self._w4a4(name, self._weight(name)))
        target = self._providers[name][0].target
        weight = weight_of(self.source, target)
        if splits := self._family.splits(name):
            assert isinstance(weight, W4A16Weight)  # `_check` refuses any other
            return self._named(name, self._w4a16(weight, splits))
        if weight.scale is None:
            raise self.refused(target, f"has the format {weight.FORMAT}", GAIN)
        dtype = weight.scale.dtype
        self._note(f"{target}: 4-bit weights that Nunchaku keeps in 16 bit were written as such")
        bias = {} if weight.bias is None else {"bias": weight.bias.to(dtype)}
        return self._unquantized(target, {"weight": weight.dequantize().to(dtype)} | bias)

    def _named(self, module: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        renamed = _FIRST_SUFFIX if self._family.first_suffixes else {}
        first = self._family.first_name(module)
        return {
            f"{first}.{renamed.get(suffix, suffix)}": tensor for suffix, tensor in tensors.items()
        }

    def _weight(self, module: str) -> SVDQuantWeight:
        pieces = []
        for provider in self._providers[module]:
            target = provider.target
            weight = SVDQuantWeight.from_tensors(self.source.layer(target), target)
            if len(provider.parts) > 1:
                n, k = weight.shape
                # attention comes first: q, k and v, each as wide as the model; or their one result
                sizes = [n, k - n] if provider.axis else [3 * k, n - 3 * k]
                weight = (split_columns if provider.axis else split_rows)(weight, sizes)[
                    provider.place
                ]
            pieces.append(weight)
        try:
            weight = join_rows(pieces)
        except ValueError as error:
            raise self.refused(
                self._providers[module][0].target,
                "has q, k and v whose inputs differ in sign or rotation",
                GAIN,
            ) from error
        if weight.smooth_rows:
            raise self.refused(
                self._providers[module][0].target, "has q, k and v that differ in smoothing", GAIN
            )
        return weight

    def _w4a4(self, module: str, weight: SVDQuantWeight) -> dict[str, Tensor]:
        n, k = weight.shape
        if n % 128 or k % 128:
            raise self.refused(module, f"has {n} x {k} weights", "Nunchaku's need multiples of 128")
        if self._family.is_unsigned(module) != weight.act_unsigned:
            weight = self._with_unsigned_input(module, weight)
        down, up = (
            torch.nn.functional.pad(t, (0, self.rank - weight.rank))
            for t in (weight.proj_down, weight.proj_up)
        )
        dtype = weight.scale.dtype
        bias = (
            {}
            if weight.bias is None
            else {"bias": swizzle.vector_to_nunchaku(weight.bias.to(dtype))}
        )
        smooth = swizzle.vector_to_nunchaku(weight.smooth_factor.to(dtype))
        return {
            "qweight": swizzle.weight_to_nunchaku(weight.qweight),
            "wscales": swizzle.scale_to_nunchaku(weight.scale),
            "proj_down": swizzle.down_to_nunchaku(down),
            "proj_up": swizzle.up_to_nunchaku(up),
            "smooth_factor": smooth,
            "smooth_factor_orig": smooth.clone(),
        } | bias

    def _with_unsigned_input(self, module: str, weight: SVDQuantWeight) -> SVDQuantWeight:
        """Signed inputs behind a GELU become unsigned: finer steps, and the shift goes into the
        bias.
        """
        if weight.act_unsigned:
            raise self.refused(module, "has unsigned inputs", GAIN)
        self._note(
            "layers behind a GELU got unsigned inputs, as Nunchaku has them, and biases that go"
            " with these"
        )
        fold = weight.residual().double().sum(1) * SHIFT
        bias = -fold if weight.bias is None else weight.bias.double() - fold
        return dataclasses.replace(weight, bias=bias.to(weight.scale.dtype), act_unsigned=True)

    def _w4a16(self, weight: W4A16Weight, splits: int) -> dict[str, Tensor]:
        n, k = weight.shape
        zeros = (
            -8 * weight.scale.float()
            if weight.zeros is None
            else weight.zeros.float() - 8 * weight.scale.float()
        )
        bias = torch.zeros(n) if weight.bias is None else weight.bias
        padded = []
        for tensor in (weight.scale, zeros.to(weight.scale.dtype)):
            rows = swizzle.rows_to_adanorm(tensor.t(), splits).t()
            padded.append(
                torch.nn.functional.pad(
                    rows, (0, 0, 0, swizzle.awq_groups(k) - k // 64)
                ).contiguous()
            )
        bias = swizzle.rows_to_adanorm(shift_of_one(bias, splits, 1), splits).to(weight.scale.dtype)
        return {
            "qweight": swizzle.awq_to_nunchaku(swizzle.rows_to_adanorm(weight.qweight, splits)),
            "wscales": padded[0],
            "wzeros": padded[1],
            "bias": bias.contiguous(),
        }

    # ---- what stays in 16 bit

    def _plain_units(self) -> list[str]:
        """ComfyUI's tensors, each on its own but for those that Nunchaku's programs have as one."""
        return [name for name in self._plain if not name.endswith(".feed_forward.w3.weight")]

    def _make_plain(self, name: str) -> dict[str, Tensor]:
        out: dict[str, Tensor] = {}
        for key, tensor in self.source.unit(name).items():
            module, _, suffix = key.rpartition(".")
            out |= self._unquantized(module, {"weight" if suffix == "scale" else suffix: tensor})
        return out

    def _unquantized(self, target: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        pattern, number = self._family.numbered(target)
        ways = self._family.rows.get(pattern)
        if target in self._family.swapped:
            tensors = {
                suffix: torch.cat(tensor.chunk(2)[::-1]) for suffix, tensor in tensors.items()
            }
        if not ways:
            return {
                ".".join(filter(None, [target, suffix])): tensor
                for suffix, tensor in tensors.items()
            }
        if pattern.endswith(".attention.qkv"):  # three layers where it is not quantized
            parts = [part.module.replace("#", number) for part in ways[1].parts]
            return {
                f"{part}.{suffix}": piece.contiguous()
                for suffix, tensor in tensors.items()
                for part, piece in zip(parts, tensor.chunk(len(parts)), strict=True)
            }
        if pattern.endswith(".feed_forward.w1"):
            gate = self.source.unit(f"{target[:-1]}3.weight")[f"{target[:-1]}3.weight"]
            tensors = {"weight": torch.cat([gate, tensors["weight"]])}
        stem = ways[0].parts[0].module.replace("#", number)
        stem = self._family.first_name(stem)
        return {f"{stem}.{suffix}": tensor for suffix, tensor in tensors.items()}

    def _note(self, text: str) -> None:
        if text not in self.notes:
            self.notes.append(text)

    def metadata(self, bytes_after: int) -> dict[str, str]:
        facts = dict(kept_facts(self.source))
        group = {"dtype": "int4", "scale_dtype": None, "group_size": 64}
        config = {"method": "svdquant", "weight": group, "activation": group, "rank": self.rank}
        facts.setdefault(
            "quantization_config",
            json.dumps(config | ({"skip_refiners": True} if self._skip_refiners else {})),
        )
        facts.setdefault("model_class", self._family.model_class)
        for key, value in self._configs().items():
            facts.setdefault(key, json.dumps(value))
        if "config" not in facts:
            self._note(
                "no config was written: add the original model's config.json to the metadata for"
                " programs that ask for it"
            )
        return modelspec_of(self.source.metadata) | facts

    def _configs(self) -> dict[str, dict]:
        """FLUX.1's two descriptions, from shapes and names."""
        if self._family.name != "FLUX.1":
            return {}
        shapes = {spec.name: spec.shape for specs in self._plain.values() for spec in specs}
        double, single = (
            len({n.split(".")[1] for n in self.source.layers if n.startswith(f"{kind}_blocks.")})
            for kind in ("double", "single")
        )
        hidden, channels = shapes["img_in.weight"]
        guidance = "guidance_in.in_layer.weight" in shapes
        heads = hidden // 128
        context = shapes["txt_in.weight"][1]
        vector = shapes["vector_in.in_layer.weight"][1]
        config = {
            "_class_name": "FluxTransformer2DModel",
            "attention_head_dim": 128,
            "axes_dims_rope": [16, 56, 56],
            "guidance_embeds": guidance,
            "in_channels": channels,
            "joint_attention_dim": context,
            "num_attention_heads": heads,
            "num_layers": double,
            "num_single_layers": single,
            "out_channels": shapes["final_layer.linear.weight"][0] if channels != 64 else None,
            "patch_size": 1,
            "pooled_projection_dim": vector,
        }
        comfy = {
            "axes_dim": [16, 56, 56],
            "context_in_dim": context,
            "depth": double,
            "depth_single_blocks": single,
            "disable_unet_model_creation": True,
            "guidance_embed": guidance,
            "hidden_size": hidden,
            "image_model": "flux",
            "in_channels": channels // 4,
            "mlp_ratio": 4.0,
            "num_heads": heads,
            "out_channels": 16,
            "patch_size": 2,
            "qkv_bias": True,
            "theta": 10000,
            "vec_in_dim": vector,
        }
        return {
            "config": config,
            "comfy_config": {
                "model_class": "Flux" if guidance else "FluxSchnell",
                "model_config": comfy,
            },
        }
