"""Which of ComfyUI's encoders FEATHER fits, and what it has to know of each: where a picture's
tokens come from, how they lie in the picture, and whether any can leave the conditioning.

    Qwen2.5-VL, Qwen3-VL  a tower that tells its grid of patches, merged two by two
    Gemma 3               SigLIP on the middle square of the picture, pooled to a square of tokens
    LLaVA-Llama 3         HunyuanVideo's: a CLIP vision output, which comes as tokens, not as pixels

Every other encoder is refused with the reason. ComfyUI gives Gemma 3's pictures to text generation
alone, and none at all to Mistral 3, Gemma 2, Jina CLIP and other encoders of text.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

from .record import Picture

GREY, PATCH = 0.5, 14  # what stands for a picture that came without pixels
FITTING = "connect a Qwen2.5-VL, Qwen3-VL or Gemma 3 text encoder, or HunyuanVideo's LLaVA-Llama 3"


@dataclass(frozen=True)
class Kind:
    """A class of encoders.

    fits: of the CLIP's model and a transformer in it; raster: (height, width) in tokens of an entry
    of embeds_info; pixels: (1, H, W, 3) of a picture in the prompt, as the encoder saw it; whole:
    why no token can leave the conditioning, or nothing.
    """

    fits: Callable[[torch.nn.Module, torch.nn.Module], bool]
    raster: Callable[[torch.nn.Module, dict], tuple[int, int]]
    pixels: Callable[[dict, int, int], torch.Tensor]
    whole: str = ""


@dataclass(frozen=True)
class Encoder:
    """An encoder in a CLIP. name: the attribute of the CLIP's model that holds it, or nothing where
    it is that model itself.
    """

    name: str
    transformer: torch.nn.Module
    kind: Kind

    @property
    def first_layer(self) -> int:
        """The first layer that tokens can be pruned before: Qwen3-VL adds to the image after each
        of its first layers (DeepStack).
        """
        tower = getattr(self.transformer, "visual", None)
        return max(1, len(getattr(tower, "deepstack_visual_indexes", ())))

    def path(self, attribute: str) -> str:
        """Where ComfyUI patches an attribute of the encoder."""
        return f"{self.name}.{attribute}".lstrip(".")

    def pictures(self, rows: list[list], info: list[dict]) -> list[Picture] | None:
        """The pictures of a prompt in order; None where ComfyUI left one of them out.

        rows: tokens, of which pictures are dicts; info: what ComfyUI says of all that it put in.
        Raises ValueError where the raster is not the tokens that were put in.
        """
        items = [item for row in rows for item in row if _is_picture(item)]
        types = {item["type"] for item in items}
        given = sorted((e for e in info if e["type"] in types), key=lambda e: e["index"])
        if len(items) != len(given):
            return None
        return [self._picture(item, e) for item, e in zip(items, given, strict=True)]

    def _picture(self, item: dict, info: dict) -> Picture:
        height, width = self.kind.raster(self.transformer, info)
        if height * width != info["size"]:
            raise ValueError(
                f"this encoder makes {info['size']} tokens of an image of {height} x {width}"
                " patches, which FEATHER cannot place; take FEATHER Prune Vision Tokens out of the"
                " workflow."
            )
        return Picture(info["index"], height, width, self.kind.pixels(item, height, width))


def _is_picture(item: object) -> bool:
    return isinstance(item, dict) and "image" in (item.get("type"), item.get("original_type"))


def _grid(_transformer, info: dict) -> tuple[int, int]:
    extra = info["extra"]
    grid = extra["grid"] if isinstance(extra, dict) else extra
    return int(grid[0][1]) // 2, int(grid[0][2]) // 2


def _pooled(transformer, _info: dict) -> tuple[int, int]:
    side = transformer.multi_modal_projector.tokens_per_side
    return side, side


def _square(_transformer, info: dict) -> tuple[int, int]:
    side = math.isqrt(info["size"])
    return side, side


def _all_of_it(item: dict, _height: int, _width: int) -> torch.Tensor:
    return item["data"][:1, ..., :3]


def _middle(item: dict, height: int, width: int) -> torch.Tensor:
    pixels = _all_of_it(item, height, width)
    side = min(pixels.shape[1:3])
    top, left = ((length - side) // 2 for length in pixels.shape[1:3])
    return pixels[:, top : top + side, left : left + side]


def _unseen(_item: dict, height: int, width: int) -> torch.Tensor:
    return torch.full((1, height * PATCH, width * PATCH, 3), GREY)


KINDS = (
    Kind(lambda _model, transformer: hasattr(transformer, "visual"), _grid, _all_of_it),
    Kind(
        lambda _model, transformer: hasattr(
            getattr(transformer, "multi_modal_projector", None), "tokens_per_side"
        ),
        _pooled,
        _middle,
    ),
    Kind(
        lambda model, _transformer: type(model).__name__.rstrip("_") == "HunyuanVideoClipModel",
        _square,
        _unseen,
        "HunyuanVideo cuts its conditioning out of the encoder's sequence at places that it counts",
    ),
)


def encoder_of(clip) -> Encoder:
    """The encoder of a CLIP that FEATHER fits. Raises ValueError with the reason for another."""
    model = clip.patcher.model
    why = "has no vision tower and layers that it knows"
    for name, part in [("", model), *model.named_children()]:
        transformer = getattr(part, "transformer", None)
        layers = getattr(getattr(transformer, "model", None), "layers", None)
        if layers is None:
            continue
        refused = _unfit(transformer, layers)
        kind = next((kind for kind in KINDS if kind.fits(model, transformer)), None)
        if kind is not None and not refused:
            return Encoder(name, transformer, kind)
        why = refused or "is given no pictures by ComfyUI, text alone"
    raise ValueError(
        f"FEATHER prunes visual tokens, and {type(model).__name__.rstrip('_')} {why}; {FITTING}."
    )


def _unfit(transformer: torch.nn.Module, layers: torch.nn.ModuleList) -> str:
    """Why no token can be taken out between these layers, or nothing."""
    if getattr(transformer.model, "fixed_kv", False):
        return (
            "keeps its layers' keys in caches of a fixed length, some of which later layers read"
            " again, so that no token can be taken out on the way"
        )
    if not all(hasattr(getattr(layer, "self_attn", None), "q_proj") for layer in layers):
        if any(hasattr(layer, "linear_attn") for layer in layers):
            return (
                "has layers of linear attention, which hold the whole sequence in one state, so"
                " that no token can be taken out and none is scored"
            )
        return "has layers whose attention it does not know"
    return "" if hasattr(layers[0], "input_layernorm") else "has layers that it does not know"
