"""Tables of seconds, which ComfyUI builds Stable Audio with and reads beside the diffusion model:
random ones, under a checkpoint's names.
"""

from __future__ import annotations

import torch

_CONDITIONERS = "conditioner.conditioners."


def tables() -> dict[str, torch.Tensor]:
    """Stable Audio 1's."""
    one = {"0.weights": (128,), "1.weight": (768, 257), "1.bias": (768,)}
    return _random(
        {
            f"{_CONDITIONERS}seconds_{end}.embedder.embedding.{key}": shape
            for end in ("start", "total")
            for key, shape in one.items()
        }
    )


def tables_3() -> dict[str, torch.Tensor]:
    """Stable Audio 3's."""
    embedding = f"{_CONDITIONERS}seconds_total.embedder.embedding."
    return _random(
        {
            f"{embedding}1.weight": (768, 256),
            f"{embedding}1.bias": (768,),
            f"{_CONDITIONERS}prompt.padding_embedding": (768,),
        }
    )


def _random(shapes: dict[str, tuple[int, ...]]) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    return {key: torch.randn(shape, generator=generator) / 16 for key, shape in shapes.items()}
