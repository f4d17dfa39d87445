"""ComfyUI's own T5 with random weights, small, as a file, and opened by ComfyUI's classes or its
loaders.
"""

import contextlib
import json
from pathlib import Path
from unittest import mock

import comfy.sd
import comfy.sd1_clip
import comfy.text_encoders.sd3_clip as sd3
import torch
from safetensors.torch import load_file, save_file

from tiny_encoders import Target

T5 = {"d_model": 128, "d_kv": 64, "num_heads": 2, "d_ff": 256, "num_layers": 3}


def randomized(transformer: torch.nn.Module, seed: int = 0) -> dict[str, torch.Tensor]:
    """A state dict of random float16 weights that neither die nor grow; T5's queries are not
    scaled in attention, so they are small.
    """
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for name, tensor in transformer.state_dict().items():
        if "norm" in name:
            state[name] = torch.ones(tensor.shape).half()
            continue
        scale = tensor.shape[-1] ** -0.5 / (8 if ".SelfAttention.q." in name else 1)
        state[name] = (torch.randn(tensor.shape, generator=generator) * scale).half()
    return state


def t5(state: dict[str, torch.Tensor] | None = None) -> comfy.sd.CLIP:
    """SD3's CLIP of a T5 alone, as ComfyUI's loader builds it."""
    found = {} if state is None else sd3.t5_xxl_detect(state)
    made = sd3.sd3_clip(clip_l=False, clip_g=False, t5=True, **found)
    options = {"t5xxl_model_config": T5, "dtype": torch.float32}
    return comfy.sd.CLIP(
        Target(made, sd3.SD3Tokenizer),
        model_options=options,
        state_dict=[] if state is None else [dict(state)],
    )


def t5_file(path: Path) -> Path:
    """Its file."""
    save_file(randomized(t5().cond_stage_model.t5xxl.transformer), path)
    return path


def opened(path: Path) -> comfy.sd.CLIP:
    """`t5` of a file."""
    return t5(load_file(path))


@contextlib.contextmanager
def small_xxl():
    """ComfyUI's loaders take any T5 for T5-XXL, and build that as small as T5."""
    read = json.load

    def small(file):
        config = read(file)
        if isinstance(config, dict) and config.get("d_ff") == 10240:
            config.update(T5)
        return config

    known = comfy.sd.TEModel.T5_XXL
    with (
        mock.patch.object(comfy.sd1_clip.json, "load", small),
        mock.patch.object(comfy.sd, "detect_te_model", lambda state: known),
    ):
        yield


def conditioning(clip, text: str = "a red fox asleep in fresh snow") -> torch.Tensor:
    return clip.encode_from_tokens(clip.tokenize(text))


def db(plain: torch.Tensor, other: torch.Tensor) -> float:
    """Signal to noise."""
    ratio = plain.square().sum() / (other - plain).square().sum()
    return (10 * ratio.log10()).item()
