"""Prompts to calibrate on: Nibble's own, for a connected text encoder, and files of prompts for
`python -m nibble quantize --prompts`.
"""

from __future__ import annotations

from typing import Any

import torch

from ....quant.calibration.pictures import ENOUGH_PROMPTS
from ....quant.files import prompts as prompts_file
from ....quant.files.errors import FileRefused
from ..host import folders

FOLDER, ENDING = "calibration_prompts", ".safetensors"
# people, places, things, light, styles, lettering, and lengths from three words to thirty
OWN = (
    "a portrait photo of an old fisherman with a grey beard, soft window light, 85mm lens",
    "a red fox asleep in fresh snow",
    "a busy night market in Taipei after rain, neon signs reflected in puddles, wide angle",
    "watercolor of a lighthouse on a cliff, loose brush strokes, pale blue and ochre",
    'a coffee shop sign that says "OPEN LATE" in chalk lettering',
    "two children building a sandcastle on a windy beach, seen from behind",
    "macro photograph of a dragonfly on a blade of grass, dew drops, shallow depth of field",
    "isometric render of a small wooden house with a garden, clay material, studio light",
    "a woman in a yellow raincoat waits at a bus stop, film grain, overcast",
    "mountains at dawn",
    "a bowl of ramen with a soft egg, spring onions and steam, food photography from above",
    "oil painting of a ship in a storm, dark waves, a break of gold light in the clouds",
    "a robot reading a newspaper in a library, detailed illustration, warm lamps",
    "black and white street photograph of a cyclist passing a brick wall covered with posters",
    "an astronaut riding a horse across a salt flat under a huge moon",
    "product shot of a perfume bottle on wet black stone, rim light, reflections",
    "pixel art of a forest village with a river and a mill",
    "a close-up of two hands playing a piano, dramatic side light, dust in the air",
    "an anime girl with short blue hair on a rooftop at sunset, city skyline behind her",
    "aerial view of terraced rice fields, morning mist, a single path",
    "a tabby cat wearing a knitted scarf looks into the camera",
    "flat vector poster of a mountain railway, limited palette, bold shapes, no text",
    "interior of a concrete house with a large window to a pine forest, minimal furniture",
    "a crowd at a concert with raised hands, confetti, blue and magenta stage light, smoke",
)


def with_own(positive: list | None, clip: Any) -> list | None:
    """The user's prompts, and with a text encoder so many of Nibble's own that they are enough."""
    given = list(positive or [])
    if clip is None:
        return positive
    wanted = ENOUGH_PROMPTS if given else len(OWN)
    for text in OWN[: max(0, wanted - len(given))]:
        given += clip.encode_from_tokens_scheduled(clip.tokenize(text))
    return given


def save(positive: list, latent: dict | None, filename: str, overwrite: bool) -> str:
    """Writes prompts for the command line; returns the file's path. Raises FileRefused for
    conditioning that it cannot use.
    """
    pooled = [entry[1].get("pooled_output") for entry in positive]
    if not positive or any(vector is None for vector in pooled):
        raise FileRefused(
            "The command line runs FLUX.1 alone, which reads a pooled vector, and this conditioning"
            " has none; connect the prompts of a FLUX text encoder (DualCLIPLoader, type flux)."
        )
    size = None if latent is None else tuple(latent["samples"].shape[-2:])
    told = {entry[1].get("guidance") for entry in positive} - {None}
    if len(told) > 1:
        raise FileRefused("The prompts have different guidance; give all of them the same.")
    prompts = prompts_file.Prompts(
        [entry[0][0] for entry in positive],
        torch.cat([vector.reshape(1, -1) for vector in pooled]),
        size,
        float(told.pop()) if told else None,
    )
    name = folders.plain_name(filename, "prompts", FOLDER, ENDING)
    with folders.new_file(name, FOLDER, overwrite) as new:
        new.check()
        prompts_file.write(new.held, prompts)
        return str(new.path)


folders.register(FOLDER)
