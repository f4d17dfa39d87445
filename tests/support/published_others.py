"""More files of other programs, made as `published_files.py` makes its own: diffusers' dialect of
FLUX.1 (Nunchaku Lite), a small SDXL, and a FLUX.1 whose attention's output smoothing was fused into
its values.
"""

from __future__ import annotations

import torch
from torch import Tensor

from nunchaku_packers import pack_vector
from published_files import RandomFlux, _stored, awq, random_linear, svdquant

LITE_CONFIG = (
    '{"_class_name": "FluxTransformer2DModel", "quantization_config": {"quant_method":'
    ' "nunchaku_lite", "compute_dtype": "bfloat16"}}'
)


class LiteFlux(RandomFlux):
    """A 4-bit FLUX as diffusers has it: q, k, v and the MLP apart, each with its own smoothing, all
    inputs signed, modulation in natural order.
    """

    def __init__(self):
        super().__init__()
        h = self.hidden
        widths = {
            "ff.net.0.proj": (4 * h, h),
            "ff.net.2": (h, 4 * h),
            "ff_context.net.0.proj": (4 * h, h),
            "ff_context.net.2": (h, 4 * h),
            "proj_mlp": (4 * h, h),
            "proj_out": (h, 5 * h),
        }
        double = [
            f"attn.{name}"
            for name in (
                "to_q",
                "to_k",
                "to_v",
                "add_q_proj",
                "add_k_proj",
                "add_v_proj",
                "to_out.0",
                "to_add_out",
            )
        ]
        names = [
            f"transformer_blocks.{i}.{name}"
            for i in range(self.double)
            for name in [*double, *list(widths)[:4]]
        ]
        names += [
            f"single_transformer_blocks.{i}.{name}"
            for i in range(self.single)
            for name in ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp", "proj_out")
        ]
        self.parts = {
            name: random_linear(
                *next((w for key, w in widths.items() if name.endswith(f".{key}")), (h, h)),
                7000 + 10 * i,
            )
            for i, name in enumerate(names)
        }

    def lite(self) -> dict[str, Tensor]:
        """The file's tensors."""
        norms, others = self.nunchaku_plain()
        out = norms | others
        for name, part in self.parts.items():
            out |= svdquant(name, part, True)
        for name, part in self.mods.items():
            out |= awq(name, part, 1)
        return out

    def nibble(self) -> dict[str, Tensor]:
        out = dict(self.plain)
        for i in range(self.double):
            block, own = f"transformer_blocks.{i}", f"double_blocks.{i}"
            out |= self._joined(f"{own}.img_attn.qkv", [f"{block}.attn.to_{c}" for c in "qkv"])
            out |= self._joined(
                f"{own}.txt_attn.qkv", [f"{block}.attn.add_{c}_proj" for c in "qkv"]
            )
            single = {
                "img_attn.proj": "attn.to_out.0",
                "txt_attn.proj": "attn.to_add_out",
                "img_mlp.0": "ff.net.0.proj",
                "img_mlp.2": "ff.net.2",
                "txt_mlp.0": "ff_context.net.0.proj",
                "txt_mlp.2": "ff_context.net.2",
            }
            for ours, theirs in single.items():
                out |= _stored(f"{own}.{ours}", self.parts[f"{block}.{theirs}"])
            for theirs, ours in (("norm1", "img_mod"), ("norm1_context", "txt_mod")):
                out |= _stored(f"{own}.{ours}.lin", self.mods[f"{block}.{theirs}.linear"])
        for i in range(self.single):
            block, own = f"single_transformer_blocks.{i}", f"single_blocks.{i}"
            out |= self._joined(
                f"{own}.linear1", [*(f"{block}.attn.to_{c}" for c in "qkv"), f"{block}.proj_mlp"]
            )
            out |= _stored(f"{own}.linear2", self.parts[f"{block}.proj_out"]) | _stored(
                f"{own}.modulation.lin", self.mods[f"{block}.norm.linear"]
            )
        return out

    def _joined(self, name: str, parts: list[str]) -> dict[str, Tensor]:
        """Parts one above another, each with its own smoothing."""
        of = [self.parts[part] for part in parts]
        one = {
            "weight": torch.cat([p["weight"] for p in of]),
            "weight_scale": torch.cat([p["weight_scale"] for p in of], 1),
            "weight_proj_down": torch.cat([p["weight_proj_down"] for p in of], 1),
            "weight_proj_up": torch.block_diag(*(p["weight_proj_up"] for p in of)),
            "weight_smooth_factor": torch.stack([p["weight_smooth_factor"] for p in of]),
            "bias": torch.cat([p["bias"] for p in of]),
        }
        return _stored(name, one, {"smooth_rows": [p["weight"].shape[0] for p in of]})


def fused_flux(flux: RandomFlux, s: Tensor) -> dict[str, Tensor]:
    """The file of a FLUX whose attention outputs were smoothed by s (hidden,), with that fused into
    the values: V rows / s, proj_down * s, smooth all ones and s in smooth_orig. Made from the plain
    file's numbers, of which s (powers of two) loses no bit.
    """
    blocks, others = flux.nunchaku()
    s = s.bfloat16()
    for name, part in flux.parts.items():
        module = name.rpartition(".")[2]
        if module.startswith("qkv_proj"):
            rows = torch.cat([torch.ones(2 * len(s)), s.float()])
            blocks |= svdquant(
                name,
                part
                | {
                    "weight_scale": (part["weight_scale"].float() / rows).bfloat16(),
                    "bias": (part["bias"].float() / rows).bfloat16(),
                    "weight_proj_up": (part["weight_proj_up"].float() / rows[:, None]).bfloat16(),
                },
            )
        if module.startswith("out_proj"):
            fused = part | {
                "weight_proj_down": (
                    (part["weight_proj_down"].float() * s.float()[:, None]).bfloat16()
                ),
                "weight_smooth_factor": torch.ones_like(s),
            }
            blocks |= svdquant(name, fused) | {f"{name}.smooth_orig": pack_vector(s)}
    return blocks | others


# ---- SDXL: ComfyUI's names beside diffusers', spelled out here by hand from the two U-Nets' code


def sdxl_modules() -> dict[str, str]:
    """Diffusers' module → ComfyUI's, of everything outside the transformer blocks; an attention's
    blocks keep their names.
    """
    out = {
        "conv_in": "input_blocks.0.0",
        "time_embedding.linear_1": "time_embed.0",
        "time_embedding.linear_2": "time_embed.2",
        "add_embedding.linear_1": "label_emb.0.0",
        "add_embedding.linear_2": "label_emb.0.2",
        "conv_norm_out": "out.0",
        "conv_out": "out.2",
    }
    place = 1
    # two resnets a level, each with an attention but for the first level's, and a smaller picture
    # behind all but the last
    for level in range(3):
        for j in range(2):
            out |= _resnet(
                f"down_blocks.{level}.resnets.{j}", f"input_blocks.{place}.0", j == 0 and level > 0
            )
            out |= (
                _attention(f"down_blocks.{level}.attentions.{j}", f"input_blocks.{place}.1")
                if level
                else {}
            )
            place += 1
        if level < 2:
            out[f"down_blocks.{level}.downsamplers.0.conv"] = f"input_blocks.{place}.0.op"
            place += 1
    out |= _resnet("mid_block.resnets.0", "middle_block.0", False) | _resnet(
        "mid_block.resnets.1", "middle_block.2", False
    )
    out |= _attention("mid_block.attentions.0", "middle_block.1")
    for level in range(3):
        for j in range(3):
            out |= _resnet(
                f"up_blocks.{level}.resnets.{j}", f"output_blocks.{3 * level + j}.0", True
            )
            out |= (
                _attention(f"up_blocks.{level}.attentions.{j}", f"output_blocks.{3 * level + j}.1")
                if level < 2
                else {}
            )
        if level < 2:
            out[f"up_blocks.{level}.upsamplers.0.conv"] = f"output_blocks.{3 * level + 2}.2.conv"
    return out


def _resnet(theirs: str, ours: str, shortcut: bool) -> dict[str, str]:
    pairs = {
        "norm1": "in_layers.0",
        "conv1": "in_layers.2",
        "time_emb_proj": "emb_layers.1",
        "norm2": "out_layers.0",
        "conv2": "out_layers.3",
    }
    pairs |= {"conv_shortcut": "skip_connection"} if shortcut else {}
    return {f"{theirs}.{a}": f"{ours}.{b}" for a, b in pairs.items()}


def _attention(theirs: str, ours: str) -> dict[str, str]:
    return {f"{theirs}.{name}": f"{ours}.{name}" for name in ("norm", "proj_in", "proj_out")}


QUANTIZED = (
    "attn1.to_q",
    "attn1.to_k",
    "attn1.to_v",
    "attn1.to_out.0",
    "attn2.to_q",
    "attn2.to_out.0",
    "ff.net.0.proj",
    "ff.net.2",
)


def sdxl_file(state: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """(a published file, Nibble's own) of a U-Net in ComfyUI's names: random numbers in its blocks'
    linears, its own everywhere else.
    """
    theirs = {ours: name for name, ours in sdxl_modules().items()}
    published, own = {}, {}
    for number, (key, tensor) in enumerate(sorted(state.items())):
        module, _, suffix = key.rpartition(".")
        stem, _, rest = module.partition(".transformer_blocks.")
        if not rest or rest.partition(".")[2] not in QUANTIZED:
            name = (
                f"{theirs[f'{stem}.norm'].removesuffix('.norm')}.transformer_blocks.{rest}"
                if rest
                else theirs[module]
            )
            published[f"{name}.{suffix}"], own[key] = tensor.bfloat16(), tensor.bfloat16()
        elif suffix == "weight":
            part = random_linear(*tensor.shape, 9000 + 10 * number)
            if rest.partition(".")[2].split(".")[-1] in ("to_q", "to_k", "to_v"):
                del part["bias"]
            own |= _stored(module, part)
    for module in [
        key.removesuffix(".comfy_quant") for key in own if key.endswith("attn1.to_q.comfy_quant")
    ]:
        _share(own, module.removesuffix("to_q"))
    for module in sorted(
        key.removesuffix(".comfy_quant") for key in own if key.endswith(".comfy_quant")
    ):
        stem, _, rest = module.partition(".transformer_blocks.")
        name = f"{theirs[f'{stem}.norm'].removesuffix('.norm')}.transformer_blocks.{rest}"
        part = {
            key[len(module) + 1 :]: own[key]
            for key in own
            if key.startswith(f"{module}.") and not key.endswith("comfy_quant")
        }
        if rest.endswith("attn1.to_q"):
            parts = [
                {key[len(other) + 1 :]: own[key] for key in own if key.startswith(f"{other}.")}
                for other in (f"{module[:-1]}{c}" for c in "qkv")
            ]
            part = part | {
                "weight": torch.cat([p["weight"] for p in parts]),
                "weight_scale": torch.cat([p["weight_scale"] for p in parts], 1),
                "weight_proj_up": torch.cat([p["weight_proj_up"] for p in parts]),
            }
            published |= svdquant(f"{name[:-1]}qkv", part)
        elif not rest.endswith(("attn1.to_k", "attn1.to_v")):
            published |= svdquant(name, part)
    return published, own


def _share(own: dict[str, Tensor], stem: str) -> None:
    """q, k and v share one smoothing and one low-rank factor, as where they were one."""
    for c in "kv":
        for suffix in ("weight_smooth_factor", "weight_proj_down"):
            own[f"{stem}to_{c}.{suffix}"] = own[f"{stem}to_q.{suffix}"].clone()
