"""ComfyUI's own vision-language text encoders, so small that a test can run them: random weights,
its tokenizer, its CLIP object.
"""

from unittest import mock

import comfy.sd
import comfy.text_encoders.llama
import comfy.text_encoders.qwen3vl
import comfy.text_encoders.qwen_image
import comfy.text_encoders.qwen_vl
import torch

LAYERS, WIDTH, HIDDEN = 8, 64, 96
SIZES = dict(
    hidden_size=WIDTH,
    intermediate_size=HIDDEN,
    num_hidden_layers=LAYERS,
    num_attention_heads=2,
    num_key_value_heads=1,
)
QWEN3 = dict(hidden_size=64, intermediate_size=64, depth=3, deepstack_visual_indexes=[0, 1, 2])
TOWER = comfy.text_encoders.qwen_vl.Qwen2VLVisionTransformer


def small_tower(hidden_size, **sizes):
    """Qwen2.5-VL's vision tower with two narrow layers."""
    return TOWER(hidden_size=64, intermediate_size=64, num_heads=2, num_layers=2, **sizes)


class Target:
    """What comfy.sd.CLIP builds from."""

    def __init__(self, clip, tokenizer):
        self.clip, self.tokenizer, self.params = clip, tokenizer, {}


def build(target: Target, name: str, state: dict | None = None):
    """A CLIP of these tensors, or with random weights, the same every time, that neither die nor
    grow.
    """
    with (
        mock.patch.object(comfy.text_encoders.qwen_vl, "Qwen2VLVisionTransformer", small_tower),
        mock.patch.dict(comfy.text_encoders.qwen3vl.QWEN3VL_VISION, {"qwen3vl_8b": QWEN3}),
    ):
        clip = comfy.sd.CLIP(
            target,
            model_options={f"{name}_model_config": SIZES, "dtype": torch.float32},
            state_dict=[] if state is None else [dict(state)],
        )
    if state is not None:
        return clip
    generator = torch.Generator().manual_seed(0)
    for key, weight in clip.cond_stage_model.named_parameters():
        if "norm" in key and key.endswith("weight"):
            weight.data.fill_(1)
        else:
            scale = 1 if "embed_tokens" in key or weight.ndim < 2 else 1 / weight[0].numel() ** 0.5
            weight.data.copy_(torch.randn(weight.shape, generator=generator) * scale)
    return clip


def qwen_image(state: dict | None = None):
    """Qwen-Image-Edit's encoder: Qwen2.5-VL with 8 layers."""
    found = comfy.sd.llama_detect([state or {}])
    return build(
        Target(
            comfy.text_encoders.qwen_image.te(**found),
            comfy.text_encoders.qwen_image.QwenImageTokenizer,
        ),
        "qwen25_7b",
        state,
    )


def qwen3_vl():
    """Qwen3-VL with 8 layers, the first three of which get the picture again (DeepStack)."""
    return build(
        Target(comfy.text_encoders.qwen3vl.te(), comfy.text_encoders.qwen3vl.tokenizer()),
        "qwen3vl_8b",
    )


def image(height: int, width: int, seed: int = 0) -> torch.Tensor:
    """A random picture (1, height, width, 3)."""
    return torch.rand(1, height, width, 3, generator=torch.Generator().manual_seed(seed))
