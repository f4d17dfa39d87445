"""The layer of the tests' FLUX that tests of codewords look at, and relative errors."""

import torch

LAYER = "double_blocks.0.img_mlp.0"


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    """||a - b|| / ||b||."""
    return ((a - b).float().norm() / b.float().norm()).item()
