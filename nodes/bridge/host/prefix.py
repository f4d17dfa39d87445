"""Models that keep the keys and values of their prompt from call to call, and know them again by
the prompt alone: HiDream-O1. Whatever changes the weights in between must make it forget them.
"""

from __future__ import annotations

import torch


def forget_prefix(network: torch.nn.Module) -> None:
    """Drops what a diffusion model keeps of its prompt, if it keeps anything."""
    clear = getattr(network, "clear_kv_cache", None)
    if clear is not None:
        clear()
