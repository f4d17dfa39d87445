"""The prompts of tests/comfyui/prompts: graphs in API format that run on the demo model, one after
another, each with the files that the earlier ones left; and the folders that they find.
"""

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

import demo_graphs
from comfyui_server import ROOT, Server

COMFYUI_TESTS = ROOT / "tests" / "comfyui"
PROMPTS = COMFYUI_TESTS / "prompts"
LORA = "style.safetensors"
SEEKER_FLAGS = ("--whitelist-custom-nodes", "ComfyUI-Nibble", "seeker_nodes")


def add_seeker_nodes(home: Path) -> None:
    """Puts the nodes of tests/comfyui/seeker_nodes into a server's home; it has to be started with
    SEEKER_FLAGS.
    """
    (home / "custom_nodes").mkdir()
    (home / "custom_nodes" / "seeker_nodes").symlink_to(
        COMFYUI_TESTS / "seeker_nodes", target_is_directory=True
    )


def prompts() -> list[Path]:
    """The prompts in the order in which they are run; later ones use the files of earlier ones."""
    return sorted(PROMPTS.glob("*.json"))


def furnish(server: Server) -> None:
    """The demo model and a LoRA, as the prompts name them."""
    demo_graphs.furnish(server)
    draw, tensors = torch.Generator().manual_seed(5), {}
    base = load_file(demo_graphs.WEIGHTS / "diffusion_models" / demo_graphs.FLUX)
    for layer in (
        "double_blocks.0.img_attn.qkv",
        "double_blocks.0.img_mlp.0",
        "double_blocks.1.img_mlp.2",
        "double_blocks.0.img_mod.lin",
    ):
        rows, columns = base[f"{layer}.weight"].shape
        stem = f"lora_unet_{layer.replace('.', '_')}"
        size = 0.4 if "mod" in layer else 4.0
        tensors |= {
            f"{stem}.lora_up.weight": torch.randn(rows, 8, generator=draw) * size / 8**0.5,
            f"{stem}.lora_down.weight": torch.randn(8, columns, generator=draw) / columns**0.5,
        }
    save_file(tensors, server.folder("loras") / LORA)
