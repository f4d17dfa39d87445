"""What is drawn while layers are watched, wherever the model runs: prompts and noise of no data,
the schedule of times, which pictures are held out, and what of it stands in the file.

ComfyUI's nodes and the command line draw the same, so that both make the same file of one model,
recipe and set of prompts, as far as two implementations of a network agree.
"""

import hashlib
import math
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

ENOUGH_PROMPTS = 12  # from so many on, what was recorded is taken for what will be read
PROMPTS, RANDOM = "prompts", "random conditioning"  # kinds of pictures, as files have them
STEPS = 8
PROMPT_PIXELS, RANDOM_PIXELS = 512, 256  # sides, where nothing says another size
# random conditioning: how many, the length of a prompt, and the spread of T5's outputs
RANDOM_PROMPTS, TOKENS, TOKEN_STD = 4, 128, 0.25
TEACHER_PROMPTS = 8  # random ones of a zero-data calibration block by block
# notes of reports
ON_NOISE = "inputs were measured on noise and random conditioning"
ON_NOISE_CALIBRATED = "calibrated on noise and random conditioning"
_HELD = 4  # one picture in so many is held out


def drawn(prompts: int) -> list[int]:
    """The prompt of each picture: each prompt once; a single one twice, from other noise, so that
    one of the two can be held out.
    """
    return [0, 0] if prompts == 1 else list(range(prompts))


def is_held_out(numbers: Tensor, pictures: int) -> Tensor:
    """Whether pictures of these numbers, of so many that are drawn in all, are held out: the last
    one, and every fourth before it. None are where there is one picture, or it is not told how many
    there are.
    """
    if pictures < 2:
        return torch.zeros_like(numbers, dtype=torch.bool)
    fourth = ((pictures - 1 - numbers) % _HELD == 0) & (numbers >= _HELD - 1)
    return fourth | (numbers == pictures - 1)


def random_prompts(
    count: int, tokens: int, pooled: int | None, seed: int
) -> Iterator[tuple[Tensor, Tensor | None]]:
    """Conditioning of no prompt, for models whose text has so many channels: tokens (1, TOKENS,
    tokens), and pooled (1, pooled) where the model reads one.
    """
    generator = torch.Generator().manual_seed(seed)
    for _ in range(count):
        vector = None if pooled is None else torch.randn(1, pooled, generator=generator)
        yield torch.randn(1, TOKENS, tokens, generator=generator) * TOKEN_STD, vector


def noise(shape: Iterable[int], seed: int, number: int) -> Tensor:
    """Noise of a picture, by its number: float32 of a latent's shape (1, C, …, h, w), as ComfyUI
    draws it.
    """
    return torch.randn(tuple(shape), generator=torch.Generator().manual_seed(seed + number))


def schedule(steps: int, shift: float) -> Tensor:
    """Times of a flow from 1 to 0, float32 (steps + 1,): t = e^s / (e^s + 1/u - 1), u evenly from
    1 to 0 in units of 1/10000, as ComfyUI's scheduler "simple" has it.
    """
    u = torch.tensor([10000 - int(i * 10000 / steps) for i in range(steps)] + [0]) / 10000
    scale = math.exp(shift)
    return scale * u / (1 + (scale - 1) * u)


def provenance(
    kind: str, conditioning: Iterable[Iterable[Tensor]], steps: int, seed: int, latent: list[int]
) -> dict:
    """What a recording depends on, for the file's metadata. conditioning: each prompt's tensors,
    the tokens first; latent: shape (1, C, …, h, w) of a picture.
    """
    digest, prompts = hashlib.sha256(), 0
    for tensors in conditioning:
        prompts += 1
        for tensor in tensors:
            digest.update(tensor.detach().float().cpu().contiguous().numpy().tobytes())
    return {
        "kind": kind,
        "prompts": prompts,
        "fingerprint": digest.hexdigest()[:16],
        "steps": steps,
        "seed": seed,
        "latent": latent,
    }


def few_prompts(count: int) -> str:
    """A note for a measurement on fewer prompts than are enough."""
    prompts = "1 prompt" if count == 1 else f"{count} prompts"
    return (
        f"measured on {prompts} only: errors of other prompts may be larger than those told here;"
        f" {ENOUGH_PROMPTS} or more tell what the model reads (the node adds its own where 'clip'"
        " is connected)"
    )
