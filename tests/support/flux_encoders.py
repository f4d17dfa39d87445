"""The text encoders of FLUX.1 in their real sizes with random weights, as files: T5-XXL in 4 bits
as Nibble writes it, and CLIP-L in 16.

    encoders = flux_encoders.files(folder)      [t5xxl-int4.safetensors, clip_l.safetensors]
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

import encoder_shapes
from nibble.quant.files.safetensors import read_header
from nibble.quant.files.source import StateDictSource
from nibble.quant.svdquant.quantize import quantize_checkpoint
from nibble.quant.svdquant.recipe import Recipe

BLOCKS = 24
_FIRST = "encoder.block.0."


def files(folder: Path) -> list[Path]:
    """Both files, made if they are not there (2.8 GB)."""
    folder.mkdir(parents=True, exist_ok=True)
    made = {"t5xxl-int4.safetensors": t5_xxl, "clip_l.safetensors": clip_l}
    for name, make in made.items():
        if not (folder / name).exists():
            make(folder / name)
    return [folder / name for name in made]


def t5_xxl(path: Path) -> None:
    """T5-XXL as the node and the command line make it. One block is quantized and stands for all:
    what a file takes does not depend on its numbers.
    """
    shapes = encoder_shapes.t5(1, 4096, 4096, 10240, 32128, 64)
    one = path.with_name("one-block.safetensors")
    recipe = Recipe.from_preset("fast", format="svdquant_w4a8", rank=0)
    quantize_checkpoint(StateDictSource(_random(shapes)), one, recipe)
    metadata, state = read_header(one).metadata, load_file(one)
    for name in [name for name in state if name.startswith(_FIRST)]:
        if "relative_attention_bias" not in name:
            for block in range(1, BLOCKS):
                other = name.replace(_FIRST, f"encoder.block.{block}.")
                state[other] = state[name].clone()
    save_file(state, path, {"format": metadata["format"]})
    one.unlink()


def clip_l(path: Path) -> None:
    """CLIP-L."""
    import comfy
    from comfy.clip_model import CLIPTextModel

    place = Path(comfy.sd.__file__).with_name("sd1_clip_config.json")
    config = json.loads(place.read_text("utf-8"))
    model = CLIPTextModel(config, torch.float16, torch.device("meta"), comfy.ops.manual_cast)
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    save_file(_random(shapes), path)


def _random(shapes: dict[str, tuple[int, ...]]) -> dict[str, torch.Tensor]:
    """Random float16 weights that neither die nor grow; T5's queries are not scaled in attention,
    so they are small.
    """
    generator, state = torch.Generator().manual_seed(0), {}
    for name, shape in shapes.items():
        if "norm" in name:
            state[name] = torch.ones(shape).half()
            continue
        scale = shape[-1] ** -0.5 / (8 if ".SelfAttention.q." in name else 1)
        state[name] = torch.randn(shape, generator=generator).mul_(scale).half()
    return state
