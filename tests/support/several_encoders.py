"""Small encoders of the models that have several: FLUX (CLIP-L, T5), SD3 (CLIP-L, CLIP-G, T5) and
HiDream (those and Llama 3.1), as files in models/text_encoders that ComfyUI's own loaders open.

ComfyUI's classes and what it joins their outputs to are its own; sizes differ, and Llama's words,
whose list is large, have numbers of their own:

    wide   T5 of 4096 channels, which SD3 joins CLIP's to, with the first 1000 words
    deep   T5 of 24 layers, by which HiDream tells it from Llama
    demo   T5 of 64 channels, as many as the demo FLUX reads
"""

import contextlib
import json
from functools import partial
from pathlib import Path
from unittest import mock

import comfy.clip_model
import comfy.ops
import comfy.sd
import comfy.sd1_clip
import comfy.text_encoders.hunyuan_video
import comfy.text_encoders.llama as llama
import comfy.text_encoders.t5
import torch
from safetensors.torch import save_file

from small_encoders import randomized

PROMPT = "the man in the house"  # of words among T5's first 1000
CLIP = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 2}
T5 = {
    "wide": {"d_model": 4096, "num_heads": 1, "d_ff": 64, "num_layers": 1, "vocab_size": 1000},
    "deep": {"d_model": 128, "num_heads": 2, "d_ff": 256, "num_layers": 24},
    "demo": {"d_model": 64, "num_heads": 1, "d_ff": 128, "num_layers": 3},
}
LLAMA = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}
# of each encoder: a key by which its file is known, the last one's is missing in all others
_KEYS = {
    comfy.sd.TEModel.CLIP_G: "text_model.encoder.layers.30.mlp.fc1.weight",
    comfy.sd.TEModel.CLIP_L: "text_model.encoder.layers.0.mlp.fc1.weight",
    comfy.sd.TEModel.T5_XXL: "encoder.final_layer_norm.weight",
    comfy.sd.TEModel.LLAMA3_8: "model.layers.0.self_attn.q_proj.weight",
}


class Words:
    """In place of Llama 3's tokenizer: a number for each letter."""

    def __init__(self, **_):
        pass

    def tokenize_with_weights(self, text: str, *_, **__) -> list[list[tuple[int, float]]]:
        return [[(128000, 1.0), *((ord(letter), 1.0) for letter in text)]]


@contextlib.contextmanager
def small(t5: str):
    """ComfyUI builds these encoders small; t5: one of T5."""
    read = json.load

    def sized(file):
        config = read(file)
        if isinstance(config, dict) and config.get("d_ff") == 10240:
            config.update(T5[t5])
        if isinstance(config, dict) and config.get("model_type") == "clip_text_model":
            config.update(CLIP)
        return config

    def detect(state):
        return next(kind for kind, key in _KEYS.items() if key in state)

    with (
        mock.patch.object(comfy.sd1_clip.json, "load", sized),
        mock.patch.object(comfy.sd, "detect_te_model", detect),
        mock.patch.object(llama, "Llama2Config", partial(llama.Llama2Config, **LLAMA)),
        mock.patch.object(comfy.text_encoders.hunyuan_video, "LLAMA3Tokenizer", Words),
    ):
        yield


def _config(name: str) -> dict:
    return json.loads(Path(comfy.sd1_clip.__file__).with_name(name).read_text()) | CLIP


def _t5(name: str) -> torch.nn.Module:
    home = Path(comfy.text_encoders.t5.__file__).parent
    config = json.loads((home / "t5_config_xxl.json").read_text()) | T5[name]
    return comfy.text_encoders.t5.T5(config, torch.float16, "cpu", comfy.ops.manual_cast)


def _clip(config: str) -> torch.nn.Module:
    return comfy.clip_model.CLIPTextModel(
        _config(config), torch.float16, "cpu", comfy.ops.manual_cast
    )


def _llama() -> torch.nn.Module:
    return llama.Llama2(LLAMA | {"vocab_size": 128256}, torch.float16, "cpu", comfy.ops.manual_cast)


_MAKE = {
    "clip_l": lambda: _clip("sd1_clip_config.json"),
    "clip_g": lambda: _clip("clip_config_bigg.json"),
    "wide": lambda: _t5("wide"),
    "deep": lambda: _t5("deep"),
    "demo": lambda: _t5("demo"),
    "llama": _llama,
}


def write(folder: Path, *names: str) -> list[Path]:
    """Files of random weights, NAME.safetensors each."""
    paths = [folder / f"{name}.safetensors" for name in names]
    for seed, (name, path) in enumerate(zip(names, paths, strict=True)):
        with small(name if name in T5 else "deep"):
            save_file(randomized(_MAKE[name](), seed), path)
    return paths
