"""Files of other programs, made here with nunchaku_packers.py. Nothing of the package's own readers
or writers is used, so they can be tested against it.
"""

from __future__ import annotations

import json

import numpy as np
import torch
from torch import Tensor

from nunchaku_packers import (
    codes_of,
    pack_awq,
    pack_down,
    pack_scale,
    pack_up,
    pack_vector,
    pack_weight,
)

SHIFT = 0.171875
HIDDEN, CONTEXT, RANK = 128, 64, 16
# Nunchaku's first names, then ComfyUI's; in the single blocks two modules are one of ComfyUI's.
DOUBLE = [
    ("qkv_proj", "img_attn.qkv"),
    ("qkv_proj_context", "txt_attn.qkv"),
    ("out_proj", "img_attn.proj"),
    ("out_proj_context", "txt_attn.proj"),
    ("mlp_fc1", "img_mlp.0"),
    ("mlp_fc2", "img_mlp.2"),
    ("mlp_context_fc1", "txt_mlp.0"),
    ("mlp_context_fc2", "txt_mlp.2"),
]
PLAIN = {
    "x_embedder": "img_in",
    "context_embedder": "txt_in",
    "proj_out": "final_layer.linear",
    "time_text_embed.timestep_embedder.linear_1": "time_in.in_layer",
    "time_text_embed.timestep_embedder.linear_2": "time_in.out_layer",
    "time_text_embed.text_embedder.linear_1": "vector_in.in_layer",
    "time_text_embed.text_embedder.linear_2": "vector_in.out_layer",
    "time_text_embed.guidance_embedder.linear_1": "guidance_in.in_layer",
    "time_text_embed.guidance_embedder.linear_2": "guidance_in.out_layer",
    "norm_out.linear": "final_layer.adaLN_modulation.1",
}


def svdquant(prefix: str, part: dict[str, Tensor], modern: bool = False) -> dict[str, Tensor]:
    """A linear in Nunchaku's form; `part` has weight, weight_scale, … as Nibble's files
    name them.
    """
    names = (
        ("proj_down", "proj_up", "smooth_factor") if modern else ("lora_down", "lora_up", "smooth")
    )
    smooth = pack_vector(part["weight_smooth_factor"])
    bias = {f"{prefix}.bias": pack_vector(part["bias"])} if "bias" in part else {}
    return bias | {
        f"{prefix}.qweight": pack_weight(part["weight"]),
        f"{prefix}.wscales": pack_scale(part["weight_scale"]),
        f"{prefix}.{names[0]}": pack_down(part["weight_proj_down"]),
        f"{prefix}.{names[1]}": pack_up(part["weight_proj_up"]),
        f"{prefix}.{names[2]}": smooth,
        f"{prefix}.{names[2]}_orig": smooth.clone(),
    }


def awq(prefix: str, part: dict[str, Tensor], splits: int) -> dict[str, Tensor]:
    """A modulation in AWQ's form: row s * D + c of the model is row c * splits + s there, and its
    scales' bias has 1 added.
    """
    N, groups = part["weight"].shape[0], part["weight_scale"].shape[0]
    D, padded = N // splits, -(-groups // 16) * 16
    order = torch.tensor([s * D + c for c in range(D) for s in range(splits)])
    scale, zeros, bias = (torch.zeros(padded, N, dtype=torch.bfloat16) for _ in range(3))
    scale[:groups], zeros[:groups] = (
        part["weight_scale"][:, order],
        (-7 * part["weight_scale"])[:, order],
    )
    ones = torch.tensor([float(s in (1, splits - 2)) for s in range(splits)]).repeat_interleave(D)
    bias = (part["bias"].float() + ones).bfloat16()[order]
    return {
        f"{prefix}.qweight": pack_awq(part["weight"][order]),
        f"{prefix}.wscales": scale,
        f"{prefix}.wzeros": zeros,
        f"{prefix}.bias": bias,
    }


# ---- a whole FLUX --------------------------------------------------------------------------------


def random_linear(
    n: int, k: int, seed: int, rank: int = RANK, dtype: torch.dtype = torch.bfloat16
) -> dict[str, Tensor]:
    """Random tensors of an SVDQuant linear, under the suffixes of Nibble's files."""
    draw = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=draw)

    return {
        "weight": torch.randint(-128, 128, (n, k // 2), generator=draw, dtype=torch.int8),
        "weight_scale": ((normal(k // 64, n).abs() + 0.5) * 0.1 / k**0.5).to(dtype),
        "weight_proj_down": (normal(k, rank) * 0.5 / k**0.5).to(dtype),
        "weight_proj_up": (normal(n, rank) * 0.3).to(dtype),
        "weight_smooth_factor": (torch.rand(k, generator=draw) + 0.5).to(dtype),
        "bias": (normal(n) * 0.02).to(dtype),
    }


def random_w4a16(n: int, k: int, seed: int) -> dict[str, Tensor]:
    """Random tensors of a 4-bit modulation whose codes and zero points are Nunchaku's; its bias
    plus 1 is exact in bfloat16.
    """
    part = random_linear(n, k, seed)
    codes = torch.randint(
        0, 15, (n, k), generator=torch.Generator().manual_seed(seed + 1), dtype=torch.int8
    )
    weight = (codes[:, ::2].view(torch.uint8) | codes[:, 1::2].view(torch.uint8) << 4).view(
        torch.int8
    )
    scale = part["weight_scale"]
    zeros = ((-7 * scale).float() + 8 * scale.float()).bfloat16()
    return {
        "weight": weight,
        "weight_scale": scale,
        "weight_zeros": zeros,
        "bias": (part["bias"].float() * 128).round().bfloat16() / 128,
    }


def _folded(part: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same linear with its bias as for unsigned inputs: minus SHIFT times the sums of
    its rows.
    """
    codes = codes_of(part["weight"]).astype(np.int64)
    codes = torch.from_numpy(np.where(codes > 7, codes - 16, codes)).float()
    rows = (
        codes
        * part["weight_scale"].float().t().repeat_interleave(64, 1)
        / part["weight_smooth_factor"].float()
    )
    return part | {"bias": (part["bias"].float() - SHIFT * rows.sum(1)).to(part["bias"].dtype)}


class RandomFlux:
    """The same random 4-bit FLUX in every form: `parts` by Nunchaku's first names, `mods` likewise,
    `plain` by ComfyUI's names.
    """

    def __init__(
        self,
        hidden: int = HIDDEN,
        context: int = CONTEXT,
        double: int = 1,
        single: int = 2,
        guidance: bool = True,
    ):
        self.hidden, self.double, self.single = hidden, double, single
        self.parts: dict[str, dict[str, Tensor]] = {}
        self.mods: dict[str, dict[str, Tensor]] = {}
        h, seed = hidden, 100
        widths = {
            "qkv_proj": (3 * h, h),
            "out_proj": (h, h),
            "mlp_fc1": (4 * h, h),
            "mlp_fc2": (h, 4 * h),
        }
        for i in range(double):
            for name, _ in DOUBLE:
                seed += 10
                part = random_linear(*widths[name.replace("_context", "")], seed)
                self.parts[f"transformer_blocks.{i}.{name}"] = (
                    _folded(part) if name.endswith("fc2") else part
                )
            for name in ("norm1", "norm1_context"):
                seed += 10
                self.mods[f"transformer_blocks.{i}.{name}.linear"] = random_w4a16(6 * h, h, seed)
        for i in range(single):
            block = f"single_transformer_blocks.{i}"
            for name, (n, k) in widths.items():
                seed += 10
                part = random_linear(n, k, seed)
                self.parts[f"{block}.{name}"] = _folded(part) if name == "mlp_fc2" else part
            self.parts[f"{block}.mlp_fc1"]["weight_smooth_factor"] = self.parts[
                f"{block}.qkv_proj"
            ]["weight_smooth_factor"].clone()
            self.parts[f"{block}.out_proj"]["bias"].zero_()
            self.mods[f"{block}.norm.linear"] = random_w4a16(3 * h, h, seed + 5)
        self.plain = self._plain_tensors(context, guidance)

    def _plain_tensors(self, context: int, guidance: bool) -> dict[str, Tensor]:
        h, draw = self.hidden, torch.Generator().manual_seed(1)
        widths = {
            "img_in": (h, 64),
            "txt_in": (h, context),
            "final_layer.linear": (64, h),
            "final_layer.adaLN_modulation.1": (2 * h, h),
        }
        for name, width in {"time_in": 256, "guidance_in": 256, "vector_in": context}.items():
            if guidance or name != "guidance_in":
                widths |= {f"{name}.in_layer": (h, width), f"{name}.out_layer": (h, h)}
        out = {}
        for name, shape in widths.items():
            out[f"{name}.weight"] = (
                torch.randn(shape, generator=draw) * 0.7 / shape[1] ** 0.5
            ).bfloat16()
            out[f"{name}.bias"] = (torch.randn(shape[0], generator=draw) * 0.02).bfloat16()
        norms = [
            f"double_blocks.{i}.{side}_attn.norm"
            for i in range(self.double)
            for side in ("img", "txt")
        ]
        norms += [f"single_blocks.{i}.norm" for i in range(self.single)]
        return out | {
            f"{n}.{kind}_norm.scale": (torch.rand(128, generator=draw) + 0.5).bfloat16()
            for n in norms
            for kind in ("query", "key")
        }

    def nunchaku(self, modern: bool = False) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """(the transformer blocks, all other tensors) in Nunchaku's form, with its first names or
        today's.
        """
        blocks: dict[str, Tensor] = {}
        for name, part in self.parts.items():
            blocks |= svdquant(_modern(name) if modern else name, part, modern)
        for name, part in self.mods.items():
            blocks |= awq(name, part, 3 if name.startswith("single") else 6)
        norms, others = self.nunchaku_plain("attn." if modern else "")
        return blocks | norms, others

    def nunchaku_plain(self, attn: str = "attn.") -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """(norms of the blocks, all tensors outside them) under diffusers' names."""
        blocks: dict[str, Tensor] = {}
        for i in range(self.double):
            for side, added in (("img", ""), ("txt", "added_")):
                for kind in ("query", "key"):
                    tensor = self.plain[f"double_blocks.{i}.{side}_attn.norm.{kind}_norm.scale"]
                    blocks[f"transformer_blocks.{i}.{attn}norm_{added}{kind[0]}.weight"] = (
                        tensor.clone()
                    )
        for i in range(self.single):
            for kind in ("query", "key"):
                blocks[f"single_transformer_blocks.{i}.{attn}norm_{kind[0]}.weight"] = self.plain[
                    f"single_blocks.{i}.norm.{kind}_norm.scale"
                ].clone()
        others = {
            f"{theirs}.{end}": self.plain[f"{ours}.{end}"].clone()
            for theirs, ours in PLAIN.items()
            for end in ("weight", "bias")
            if f"{ours}.{end}" in self.plain
        }
        for end in ("weight", "bias"):  # (scale, shift) there, (shift, scale) in ComfyUI
            others[f"norm_out.linear.{end}"] = torch.cat(
                others[f"norm_out.linear.{end}"].chunk(2)[::-1]
            )
        return blocks, others

    def nibble(self) -> dict[str, Tensor]:
        """The same in Nibble's form, put together here by hand."""
        out = dict(self.plain)
        for i in range(self.double):
            for theirs, ours in DOUBLE:
                unsigned = {"act_unsigned": True} if theirs.endswith("fc2") else {}
                out |= _stored(
                    f"double_blocks.{i}.{ours}",
                    self.parts[f"transformer_blocks.{i}.{theirs}"],
                    unsigned,
                )
            for theirs, ours in (("norm1", "img_mod"), ("norm1_context", "txt_mod")):
                out |= _stored(
                    f"double_blocks.{i}.{ours}.lin",
                    self.mods[f"transformer_blocks.{i}.{theirs}.linear"],
                )
        for i in range(self.single):
            block = f"single_transformer_blocks.{i}"
            qkv, fc1, attn, fc2 = (
                self.parts[f"{block}.{name}"]
                for name in ("qkv_proj", "mlp_fc1", "out_proj", "mlp_fc2")
            )
            out |= _stored(
                f"single_blocks.{i}.linear1",
                {
                    "weight": torch.cat([qkv["weight"], fc1["weight"]]),
                    "weight_scale": torch.cat([qkv["weight_scale"], fc1["weight_scale"]], 1),
                    "weight_proj_down": torch.cat(
                        [qkv["weight_proj_down"], fc1["weight_proj_down"]], 1
                    ),
                    "weight_proj_up": torch.block_diag(
                        qkv["weight_proj_up"], fc1["weight_proj_up"]
                    ),
                    "weight_smooth_factor": qkv["weight_smooth_factor"],
                    "bias": torch.cat([qkv["bias"], fc1["bias"]]),
                },
            )
            out |= _stored(
                f"single_blocks.{i}.linear2",
                {
                    "weight": torch.cat([attn["weight"], fc2["weight"]], 1),
                    "weight_scale": torch.cat([attn["weight_scale"], fc2["weight_scale"]]),
                    "weight_proj_down": torch.block_diag(
                        attn["weight_proj_down"], fc2["weight_proj_down"]
                    ),
                    "weight_proj_up": torch.cat([attn["weight_proj_up"], fc2["weight_proj_up"]], 1),
                    "weight_smooth_factor": torch.cat(
                        [attn["weight_smooth_factor"], fc2["weight_smooth_factor"]]
                    ),
                    "bias": fc2["bias"],
                },
                {"unsigned_from": self.hidden},
            )
            out |= _stored(f"single_blocks.{i}.modulation.lin", self.mods[f"{block}.norm.linear"])
        return out


METADATA = {"format": "nibble", "nibble_version": "1", "method": "svdquant"}


def _stored(name: str, part: dict[str, Tensor], options: dict | None = None) -> dict[str, Tensor]:
    facts = (
        {"format": "svdquant_w4a4", "rank": part["weight_proj_down"].shape[1]}
        if "weight_proj_down" in part
        else {"format": "awq_w4a16"}
    )
    text = torch.tensor(list(json.dumps(facts | (options or {})).encode()), dtype=torch.uint8)
    return {f"{name}.{suffix}": tensor.contiguous() for suffix, tensor in part.items()} | {
        f"{name}.comfy_quant": text
    }


def _modern(name: str) -> str:
    block, module = ".".join(name.split(".")[:2]), name.split(".")[2]
    if block.startswith("single"):
        renamed = {"qkv_proj": "attn.to_qkv", "out_proj": "attn.to_out"}
        return f"{block}.{renamed.get(module, module)}"
    return (
        f"{block}."
        + {
            "qkv_proj": "attn.to_qkv",
            "qkv_proj_context": "attn.add_qkv_proj",
            "out_proj": "attn.to_out.0",
            "out_proj_context": "attn.to_add_out",
            "mlp_fc1": "ff.net.0.proj",
            "mlp_fc2": "ff.net.2",
            "mlp_context_fc1": "ff_context.net.0.proj",
            "mlp_context_fc2": "ff_context.net.2",
        }[module]
    )
