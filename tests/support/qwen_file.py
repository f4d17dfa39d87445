"""A Qwen-Image of one block, as Nunchaku publishes it."""

import torch
from safetensors.torch import save_file

from published_files import awq, random_linear, random_w4a16, svdquant


def qwen(tmp_path, **parts):
    h, block = 128, "transformer_blocks.0"
    tensors = svdquant(f"{block}.attn.to_qkv", random_linear(3 * h, h, 1), True) | svdquant(
        f"{block}.attn.add_qkv_proj", random_linear(3 * h, h, 2), True
    )
    for i, name in enumerate(("attn.to_out.0", "attn.to_add_out")):
        tensors |= svdquant(f"{block}.{name}", random_linear(h, h, 3 + i), True)
    for i, stream in enumerate(("img", "txt")):
        tensors |= svdquant(
            f"{block}.{stream}_mlp.net.0.proj", random_linear(4 * h, h, 5 + i), True
        )
        tensors |= svdquant(f"{block}.{stream}_mlp.net.2", random_linear(h, 4 * h, 7 + i), True)
        tensors |= awq(f"{block}.{stream}_mod.1", random_w4a16(6 * h, h, 9 + i), 6)
    tensors |= {
        "txt_norm.weight": torch.ones(h),
        "img_in.weight": torch.ones(h, 64),
        f"{block}.attn.norm_q.weight": torch.ones(128),
    }
    save_file(tensors | parts, tmp_path / "model.safetensors")
    return tmp_path / "model.safetensors"
