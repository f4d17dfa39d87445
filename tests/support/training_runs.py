"""Prompts and an artist's Stop for the tests of training."""

import torch


def caption(seed: int = 1) -> list:
    draw = torch.Generator().manual_seed(seed)
    return [
        torch.randn(1, 5, 64, generator=draw),
        {"pooled_output": torch.randn(1, 64, generator=draw), "guidance": 3.5},
    ]


def latents(count: int = 2, side: int = 4, seed: int = 3) -> dict:
    return {
        "samples": torch.randn(count, 16, side, side, generator=torch.Generator().manual_seed(seed))
    }


class Stop(Exception):
    """Stands for ComfyUI's interrupt."""
