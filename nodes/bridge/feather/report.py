"""What FEATHER kept, for the eye: the picture with its kept patches as an IMAGE and as a chart,
tokens and operations before and after.
"""

from __future__ import annotations

import base64
import io
from dataclasses import dataclass

import torch
from PIL import Image

from ....accel import feather
from ..host.progress import Progress
from .encoders import encoder_of
from .prune import PruneSettings, prune
from .record import KEY, Picture, Prompt

SIDE = 512  # pixels of the longer side of a picture in a chart
DIM = 0.22  # what is left of the light of a pruned patch


@dataclass(frozen=True)
class PruneChoice:
    """The node's widgets. first, second: layers; 0 is a quarter and a half of the depth."""

    keep: float
    mode: str
    criterion: str
    stride: int
    first: int = 0
    second: int = 0


def attach(clip, choice: PruneChoice, node_id: str | None) -> tuple[object, dict]:
    """(CLIP that prunes, chart of what it will do). Draws live in the node while it encodes."""
    encoder = encoder_of(clip)
    layers = len(encoder.transformer.model.layers)
    stages = feather.stages(
        layers,
        choice.keep,
        choice.stride if choice.criterion == "feather" else 0,
        choice.first,
        choice.second,
        encoder.first_layer,
    )
    progress = Progress("FEATHER", node_id)
    settings = PruneSettings(stages, choice.criterion, choice.mode)
    pruned = prune(clip, settings, lambda prompt: progress.show(chart(prompt)))
    first, second = stages
    if choice.keep == 1:
        keeps = "every token: the encoder stays as it is"
    else:
        grid = f" and one patch in {first.stride} in both directions" if first.stride else ""
        keeps = f"{first.keep:.0%}{grid}, then {second.keep:.1%} of those"
    width = encoder.transformer.model.config.hidden_size
    return pruned, {
        "kind": "facts",
        "title": "FEATHER",
        "subtitle": "The picture appears here when a prompt with an image is encoded.",
        "summary": [
            ["layers", f"prunes before {first.layer} and {second.layer} of {layers}"],
            ["keeps", keeps],
            ["encoder", f"{layers} layers of width {width}"],
        ],
    }


def prompts_of(conditioning: list) -> list[Prompt]:
    """The runs that a CONDITIONING tells of. Raises ValueError where there are none."""
    runs = [extras[KEY] for _, extras in conditioning if KEY in extras]
    if not runs:
        raise ValueError(
            "this conditioning does not come from an encoder that FEATHER pruned: connect FEATHER"
            " Prune Vision Tokens between the CLIP loader and the text encoding, with keep below 1,"
            " and give the prompt an image."
        )
    return [
        Prompt(**{**fields, "pictures": [Picture(**picture) for picture in fields["pictures"]]})
        for fields in runs
    ]


def report(conditioning: list) -> tuple[torch.Tensor, dict]:
    """(pictures (n, H, W, 3) with pruned patches dark, at the size of the first; chart)."""
    prompts = prompts_of(conditioning)
    drawn = [overlay(picture) for prompt in prompts for picture in prompt.pictures]
    size = drawn[0].shape[:2]
    return torch.stack(
        [
            torch.nn.functional.interpolate(one.movedim(-1, 0)[None], size, mode="bilinear")[
                0
            ].movedim(0, -1)
            for one in drawn
        ]
    ), chart(prompts[0])


def overlay(picture: Picture) -> torch.Tensor:
    """The picture (H, W, 3) float32 on the CPU: patches pruned at the last stage dark, those of the
    first stage half dark.
    """
    pixels = picture.pixels[0].float().cpu()
    light = torch.ones(picture.count)
    for mask in picture.masks:
        light *= torch.where(mask, 1.0, DIM ** (1 / len(picture.masks)))
    light[picture.kept()] = 1
    raster = light.reshape(1, 1, picture.height, picture.width)
    return (
        pixels
        * torch.nn.functional.interpolate(raster, pixels.shape[:2], mode="nearest")[0, 0, ..., None]
    )


def chart(prompt: Prompt) -> dict:
    """A chart of kind "patches" (`charts.py`)."""
    tokens, plain = prompt.tokens(), [prompt.length] * prompt.layers
    after, before = (
        feather.flops(counts, prompt.width, prompt.hidden) for counts in (tokens, plain)
    )
    kept, whole = (
        sum(each)
        for each in zip(*((int(p.kept().sum()), p.count) for p in prompt.pictures), strict=True)
    )
    rows = [feather.mean_row(p.kept(), p.height, p.width) for p in prompt.pictures]
    return {
        "kind": "patches",
        "title": f"{kept} of {whole} patches kept",
        "subtitle": f"{prompt.length - whole} tokens of text are never pruned",
        "tokens": tokens,
        "flops": [before, after],
        "stages": len(prompt.begins),
        "summary": [
            ["mean height", ", ".join(f"{row:.2f}" for row in rows) + " (0 top, 1 bottom)"]
        ],
        "pictures": [
            {"rows": p.height, "columns": p.width, "url": jpeg(p.pixels[0]), "stage": levels(p)}
            for p in prompt.pictures
        ],
    }


def levels(picture: Picture) -> list[int]:
    """How many stages each patch lasted, in raster order."""
    return (
        torch.stack(picture.masks).int().cumprod(0).sum(0).tolist()
        if picture.masks
        else [0] * picture.count
    )


def jpeg(pixels: torch.Tensor) -> str:
    """A picture (H, W, 3) in [0, 1] as a data URL, at most SIDE pixels long."""
    image = Image.fromarray((pixels.float().clamp(0, 1) * 255).round().byte().cpu().numpy())
    image.thumbnail((SIDE, SIDE))
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=80)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()
