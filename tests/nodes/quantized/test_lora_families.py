"""LoRAs reach the 4-bit layers of other families than FLUX, under the names that their trainers
write: the same change as on 16-bit weights.
"""

import comfy.supported_models
import pytest
import torch
from comfy.model_patcher import ModelPatcher

from adapter_tensors import effective, normal, whole_load, with_file
from nibble.nodes.bridge.quantized import layouts
from nibble.nodes.bridge.quantized.linear import NibbleOperations
from published_files import random_linear

QWEN = {
    "image_model": "qwen_image",
    "in_channels": 64,
    "out_channels": 16,
    "num_layers": 1,
    "attention_head_dim": 32,
    "num_attention_heads": 2,
    "joint_attention_dim": 24,
    "axes_dims_rope": (8, 12, 12),
}
Z_IMAGE = {
    "image_model": "lumina2",
    "patch_size": 2,
    "in_channels": 16,
    "dim": 128,
    "cap_feat_dim": 24,
    "n_layers": 1,
    "n_refiner_layers": 1,
    "qk_norm": True,
    "n_heads": 4,
    "n_kv_heads": 4,
    "axes_dims": [16, 8, 8],
    "axes_lens": [64, 64, 64],
    "multiple_of": 32,
    "ffn_dim_multiplier": 1.0,
    "rope_theta": 10000.0,
    "z_image_modulation": True,
    "time_scale": 1000.0,
    "pad_tokens_multiple": 8,
}
FAMILIES = {"QwenImage": QWEN, "ZImage": Z_IMAGE}
PEFT, KOHYA = ("lora_B.weight", "lora_A.weight"), ("lora_up.weight", "lora_down.weight")
CASES = {  # family, layer, rows that the LoRA is for, the LoRA's stem and its suffixes
    "Qwen-Image, PEFT": (
        "QwenImage",
        "transformer_blocks.0.attn.to_q",
        None,
        "transformer.transformer_blocks.0.attn.to_q",
        PEFT,
    ),
    "Qwen-Image, without prefix": (
        "QwenImage",
        "transformer_blocks.0.img_mlp.net.0.proj",
        None,
        "transformer_blocks.0.img_mlp.net.0.proj",
        PEFT,
    ),
    "Qwen-Image, kohya": (
        "QwenImage",
        "transformer_blocks.0.attn.add_k_proj",
        None,
        "lora_unet_transformer_blocks_0_attn_add_k_proj",
        KOHYA,
    ),
    "Z-Image, q of the fused layer": (
        "ZImage",
        "layers.0.attention.qkv",
        (0, 128),
        "diffusion_model.layers.0.attention.to_q",
        PEFT,
    ),
    "Z-Image, v of the fused layer": (
        "ZImage",
        "layers.0.attention.qkv",
        (256, 384),
        "transformer.layers.0.attention.to_v",
        PEFT,
    ),
    "Z-Image, SimpleTuner": (
        "ZImage",
        "layers.0.attention.out",
        None,
        "lycoris_layers_0_attention_to_out_0",
        KOHYA,
    ),
    "Z-Image, feed-forward": (
        "ZImage",
        "layers.0.feed_forward.w1",
        None,
        "diffusion_model.layers.0.feed_forward.w1",
        PEFT,
    ),
}


def build(family: str, name: str) -> tuple[ModelPatcher, torch.nn.Module]:
    """A tiny model of the family with one 4-bit layer in it; the others have no weights, and
    nothing is computed with them.
    """
    config = getattr(comfy.supported_models, family)(dict(FAMILIES[family]))
    config.unet_config.update(FAMILIES[family])  # the class sets some for the full size
    config.set_inference_dtype(torch.float32, None)
    config.custom_operations = NibbleOperations
    model = config.get_model({}, "")
    linear = model.diffusion_model.get_submodule(name)
    n, k = linear.out_features, linear.in_features
    tensors = {part: tensor for part, tensor in random_linear(n, k, 0).items() if part != "bias"}
    linear.weight = layouts.live(layouts.pack(tensors, {"format": "svdquant_w4a4"}, torch.bfloat16))
    cpu = torch.device("cpu")
    return ModelPatcher(model, load_device=cpu, offload_device=cpu), linear


@pytest.mark.parametrize("case", CASES)
def test_a_lora_reaches_the_layer_and_only_its_rows(case):
    family, name, rows, stem, (up_name, down_name) = CASES[case]
    patcher, linear = build(family, name)
    base, rows = effective(linear), slice(*rows or (0, linear.out_features))
    up, down = normal(rows.stop - rows.start, 4) * 0.1, normal(4, linear.in_features) * 0.1
    whole_load(with_file(patcher, {f"{stem}.{up_name}": up, f"{stem}.{down_name}": down}, 1.0))
    change, wanted = effective(linear) - base, torch.zeros(base.shape)
    wanted[rows] = up @ down
    assert (change - wanted).norm() / wanted.norm() < 4e-3
    assert not change[wanted.abs().sum(1) == 0].any(), "not a bit of the other rows"
    whole_load(patcher)
    assert torch.equal(effective(linear), base)
