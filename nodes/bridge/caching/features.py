"""TeaCache's F: the input of the model whose change is measured, computed before the first block
runs. Which F belongs to which model is told by the source of its coefficients
(accel/caching/coefficients.json).
"""

from __future__ import annotations

from collections.abc import Callable

import torch

# among a block's arguments: what the family's `timestep` module gave in this call
TIMESTEP = "timestep's embedding"


def modulated(
    block: torch.nn.Module, image: torch.Tensor, vector: object, arguments: dict
) -> torch.Tensor | None:
    """The first block's norm of the image's tokens, scaled and shifted by the timestep, as each
    family names these things; None for others.
    """
    # LTX-Video
    if hasattr(block, "scale_shift_table"):
        table = block.scale_shift_table[None, None].to(image) + vector.reshape(
            image.shape[0], vector.shape[1], block.scale_shift_table.shape[0], -1
        )
        return (
            torch.nn.functional.rms_norm(image, image.shape[-1:]) * (1 + table[:, :, 1])
            + table[:, :, 0]
        )
    # Mochi
    if hasattr(block, "mod_x"):
        return torch.nn.functional.rms_norm(image, image.shape[-1:]) * (
            1 + block.mod_x(torch.nn.functional.silu(vector)).chunk(4, dim=1)[0].unsqueeze(1)
        )
    # Lumina 2, whose stream is the prompt's tokens and the image's
    if hasattr(block, "attention_norm1"):
        scale = block.adaLN_modulation(vector).chunk(4, dim=1)[0][: image.shape[0]]
        return block.attention_norm1(image) * (1 + scale.unsqueeze(1))
    # Cosmos 1: (T, H, W, B, D)
    if hasattr(block, "blocks"):
        part = block.blocks[0]
        lora = arguments.get("adaln_lora_B_3D")
        shift, scale, _ = (part.adaLN_modulation(vector) + (0 if lora is None else lora)).chunk(
            3, dim=1
        )
        return part.norm_state(image) * (1 + scale) + shift
    if not hasattr(block, "img_norm1"):
        return None
    modulation = vector[0] if isinstance(vector, (tuple, list)) else block.img_mod(vector)
    # FLUX, HunyuanVideo
    if isinstance(modulation, (tuple, list)):
        scale, shift = modulation[0].scale[:, :1], modulation[0].shift[:, :1]
        return block.img_norm1(image) * (1 + scale) + shift
    # Qwen-Image
    shift, scale, _ = modulation.chunk(2, dim=-1)[0].chunk(3, dim=-1)
    return block.img_norm1(image) * (1 + scale[: image.shape[0]].unsqueeze(1)) + shift[
        : image.shape[0]
    ].unsqueeze(1)


def embedding(
    block: torch.nn.Module, image: torch.Tensor, vector: object, arguments: dict
) -> torch.Tensor | None:
    """The embedding of the timestep that the first block receives."""
    return vector if isinstance(vector, torch.Tensor) else None


def timestep(
    block: torch.nn.Module, image: torch.Tensor, vector: object, arguments: dict
) -> torch.Tensor | None:
    """The embedding of the timestep alone: HiDream adds the pooled prompt to it, Wan makes each
    block's scales and shifts of it.
    """
    return arguments.get(TIMESTEP)


def tokens(
    block: torch.nn.Module, image: torch.Tensor, vector: object, arguments: dict
) -> torch.Tensor:
    """The image's tokens as they enter the first block."""
    return image


# "first_residual", what the first block adds, is not here: it takes that block's output, see
# wrap_blocks.
FEATURES: dict[str, Callable[..., torch.Tensor | None]] = {
    "modulated": modulated,
    "vector": embedding,
    "timestep": timestep,
    "tokens": tokens,
}
