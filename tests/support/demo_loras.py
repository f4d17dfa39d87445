"""LoRAs of the demo model, as files in a server's folder."""

import torch
from safetensors.torch import load_file, save_file

from demo_graphs import FLUX, WEIGHTS

STYLE, OTHER, SEED = "intlora-style.safetensors", "intlora-other.safetensors", 1


def style(seed: int, size: float = 4.0, rank: int = 8) -> dict[str, torch.Tensor]:
    """A LoRA on attention, feed-forward and modulation, with kohya's and with diffusers' names (a
    part of a fused layer).
    """
    draw, weights, tensors = (
        torch.Generator().manual_seed(seed),
        load_file(WEIGHTS / "diffusion_models" / FLUX),
        {},
    )

    def pair(n, k):
        return (
            torch.randn(n, rank, generator=draw) * size / rank**0.5,
            torch.randn(rank, k, generator=draw) / k**0.5,
        )

    for layer in (
        "double_blocks.0.img_attn.qkv",
        "double_blocks.0.img_mlp.0",
        "double_blocks.1.img_mlp.2",
        "double_blocks.0.img_mod.lin",
    ):
        up, down = pair(*weights[f"{layer}.weight"].shape)
        name = f"lora_unet_{layer.replace('.', '_')}"
        tensors |= {
            f"{name}.lora_up.weight": up * (0.1 if "mod" in layer else 1.0),
            f"{name}.lora_down.weight": down,
        }
    hidden = weights["img_in.weight"].shape[0]
    up, down = pair(hidden, hidden)
    name = "transformer.single_transformer_blocks.1.attn.to_v"
    return tensors | {f"{name}.lora_B.weight": up, f"{name}.lora_A.weight": down}


LAYERS = tuple(
    f"double_blocks.{i}.{layer}"
    for i in range(2)
    for layer in ("img_attn.qkv", "txt_attn.qkv", "img_mlp.0", "img_mlp.2")
) + tuple(f"single_blocks.{i}.{layer}" for i in range(4) for layer in ("linear1", "linear2"))
SIZE = 4.0  # of what a LoRA adds, beside the weight's own norm: enough for another picture


def lora_file(server, name: str, seed: int, kind: str = "lora", size: float = SIZE) -> str:
    """A file in models/loras that changes the picture visibly."""
    draw, weights, tensors = (
        torch.Generator().manual_seed(seed),
        load_file(WEIGHTS / "diffusion_models" / FLUX),
        {},
    )
    for layer in LAYERS:
        n, k = weights[f"{layer}.weight"].shape
        stem = f"lora_unet_{layer.replace('.', '_')}"
        scale = size * weights[f"{layer}.weight"].float().norm() / (n * k * 8) ** 0.5
        up, down = torch.randn(n, 8, generator=draw) * scale, torch.randn(8, k, generator=draw)
        tensors |= {
            f"{stem}.lora_up.weight": up,
            f"{stem}.lora_down.weight": down,
            f"{stem}.alpha": torch.tensor(8.0),
        }
        if kind == "dora":
            tensors[f"{stem}.dora_scale"] = (
                weights[f"{layer}.weight"].float().norm(dim=1, keepdim=True) * 1.1
            )
    save_file(tensors, server.folder("loras") / f"{name}.safetensors")
    return f"{name}.safetensors"
