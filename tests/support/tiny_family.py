"""How a tiny model of a family is described, and what several families share."""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Callable

import torch

TOKENS = 7


@dataclasses.dataclass(frozen=True)
class Family:
    """How to build a tiny model of one architecture: ComfyUI's configuration class, its options,
    and the inputs that it takes.
    """

    config: str  # class in comfy.supported_models
    options: dict
    latent: tuple  # shape without the batch; several shapes for a model of several streams
    context: tuple[int, ...]  # of a prompt's embedding, without the batch
    # name → shape with batch, or a callable that makes the value
    extras: dict = dataclasses.field(default_factory=dict)
    # parts that ComfyUI builds in one size: (module, class, sizes to give it or its stand-in)
    smaller: tuple[tuple[str, str, dict | type], ...] = ()
    # what the class reads from a checkpoint beside the diffusion model
    beside: Callable[[], dict[str, torch.Tensor]] = dict

    def parts(self) -> list[tuple[object, str, object]]:
        """(module, name, what stands there while the tiny model is built)."""
        return [_smaller(*part) for part in self.smaller]


def _smaller(name: str, part: str, instead: dict | type) -> tuple[object, str, object]:
    module = importlib.import_module(name)
    cls = getattr(module, part)

    def made(*arguments, **options):
        if isinstance(instead, type):
            return instead()
        return cls(*arguments, **(options | instead))

    return module, part, made


HUNYUAN = dict(
    image_model="hunyuan_video",
    in_channels=16,
    out_channels=16,
    patch_size=[1, 2, 2],
    vec_in_dim=20,
    axes_dim=[8, 12, 12],
    context_in_dim=24,
    hidden_size=64,
    mlp_ratio=2.0,
    num_heads=2,
    depth=2,
    depth_single_blocks=2,
    theta=256,
    qkv_bias=True,
    guidance_embed=True,
    byt5=False,
    meanflow=False,
    use_cond_type_embedding=False,
    vision_in_dim=None,
    meanflow_sum=False,
)

KANDINSKY = dict(
    image_model="kandinsky5",
    in_visual_dim=16,
    out_visual_dim=16,
    in_text_dim=24,
    in_text_dim2=20,
    time_dim=32,
    model_dim=64,
    ff_dim=128,
    visual_embed_dim=64,
    num_text_blocks=1,
    num_visual_blocks=3,
    axes_dims=(8, 12, 12),
)


def masks() -> torch.Tensor:
    return torch.ones(1, TOKENS, dtype=torch.long)
