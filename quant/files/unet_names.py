"""diffusers' names of SDXL's U-Net ↔ ComfyUI's, which are those of its authors.

    diffusers                       ComfyUI, with n layers in a block
    down_blocks.i.resnets.j         input_blocks.(1 + i (n + 1) + j).0; its attention: .1
    down_blocks.i.downsamplers.0    input_blocks.((i + 1) (n + 1)).0, its conv: op
    mid_block.resnets.0, 1          middle_block.0, 2; the attention between them: 1
    up_blocks.i.resnets.j           output_blocks.(i (n + 1) + j).0; its attention: .1
    up_blocks.i.upsamplers.0        output_blocks.(i (n + 1) + n).1, or .2 behind an attention

Inside an attention the names are the same; nothing is split or turned round.
"""

from collections.abc import Collection, Iterable

_AROUND = {
    "conv_in": "input_blocks.0.0",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
_IN_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}


def is_sdxl(names: Collection[str]) -> bool:
    """Whether these are the tensors of an SDXL's U-Net under diffusers' names: of the U-Nets, it
    alone adds an embedding of the picture's sizes.
    """
    return {"add_embedding.linear_1.weight", "down_blocks.0.resnets.0.conv1.weight"} <= set(names)


def to_comfyui(names: Iterable[str]) -> dict[str, str]:
    """diffusers' name → ComfyUI's, of all tensors of such a U-Net; one that is not known keeps
    its own.
    """
    known = list(names)
    parts = {tuple(name.split(".")[:4]) for name in known}
    layers = len({part[3] for part in parts if part[:3] == ("down_blocks", "0", "resnets")})
    attentive = {part[1] for part in parts if part[0] == "up_blocks" and part[2] == "attentions"}
    return {name: _ours(name, layers, attentive) for name in known}


def _ours(name: str, layers: int, attentive: Collection[str]) -> str:
    module, _, parameter = name.rpartition(".")
    if module in _AROUND:
        return f"{_AROUND[module]}.{parameter}"
    first, *rest = name.split(".")
    if first == "mid_block":
        kind, number, *inner = rest
        return f"middle_block.{1 if kind == 'attentions' else 2 * int(number)}.{_inside(inner)}"
    if first not in ("down_blocks", "up_blocks"):
        return name
    block, kind, number, *inner = rest
    before = int(block) * (layers + 1)
    if kind == "downsamplers":
        return f"input_blocks.{before + layers + 1}.0.op.{parameter}"
    if kind == "upsamplers":
        return f"output_blocks.{before + layers}.{1 + (block in attentive)}.conv.{parameter}"
    place = before + int(number)
    blocks = f"input_blocks.{1 + place}" if first == "down_blocks" else f"output_blocks.{place}"
    return f"{blocks}.{1 if kind == 'attentions' else 0}.{_inside(inner)}"


def _inside(inner: list[str]) -> str:
    """The name within a resnet or an attention."""
    return ".".join([_IN_RESNET.get(inner[0], inner[0]), *inner[1:]])
