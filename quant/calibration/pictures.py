"""What is drawn while layers are watched, wherever the model runs: prompts and noise of no data,
the schedule of times, which pictures are held out, and what of it stands in the file.

ComfyUI's nodes and the command line draw the same, so that both make the same file of one model,
recipe and set of prompts, as far as two implementations of a network agree.
"""

import hashlib
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

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
ENOUGH_PICTURES = 16
MOST_FOLLOWED = 0.5  # share of a random prompt's variance that may be a given one's
MAD_TO_STD = 1.4826  # of a normal distribution
FEW_ROWS = 64  # so many tell as much of a channel's spread as that of all channels
ENOUGH_HELD = 4  # pictures to choose by and to report on; what more would tell is worth less
MOST_OFTEN, LEAST_OFTEN = 4, 8  # one picture in so many is held out, of few and of many


@dataclass(frozen=True)
class Conditioning:
    """A prompt as its text encoders gave it. tokens: (T, context); pooled: (vector,) | None."""

    tokens: Tensor
    pooled: Tensor | None = None


def order(prompts: int) -> list[int]:
    """The prompt of each picture by its index, where those of `like` follow the given ones: first
    as many of them as make the pictures enough, then each given one; a single one twice, from other
    noise, so that one of the two can be held out.
    """
    more = max(0, ENOUGH_PICTURES - prompts)
    given = [0, 0] if prompts == 1 else list(range(prompts))
    return [*range(prompts, prompts + more), *given]


def like(prompts: Sequence[Conditioning], seed: int) -> list[Conditioning]:
    """Prompts drawn at random like the given ones, as many as are missing to enough pictures.

    Few prompts point in few directions of the text's space, and what was fitted to those alone
    fails in the others. So a token is c + sqrt(w) (x - c) + sqrt(1 - w) s e, with x a given token,
    c and s the channels' centre and spread, e normal, and w at most MOST_FOLLOWED: the fewer
    prompts are given, the less it follows them.
    """
    missing = max(0, ENOUGH_PICTURES - len(prompts))
    if not missing:
        return []
    generator = torch.Generator().manual_seed(seed)
    follow = min(1.0, len(prompts) / ENOUGH_PROMPTS) * MOST_FOLLOWED
    tokens = _centre_and_spread(torch.cat([prompt.tokens.float() for prompt in prompts]))
    vectors = [prompt.pooled.float() for prompt in prompts if prompt.pooled is not None]
    pooled = _centre_and_spread(torch.stack(vectors)) if vectors else None

    def varied(given: Tensor, channels: tuple[Tensor, Tensor]) -> Tensor:
        centre, spread = channels
        noise = spread * torch.randn(given.shape, generator=generator)
        away = follow**0.5 * (given.float() - centre) + (1 - follow) ** 0.5 * noise
        return (centre + away).to(given.dtype)

    made = []
    for number in range(missing):
        given = prompts[number % len(prompts)]
        vector = None
        if given.pooled is not None and pooled is not None:
            vector = varied(given.pooled, pooled)
        made.append(Conditioning(varied(given.tokens, tokens), vector))
    return made


def _centre_and_spread(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Centre and standard deviation of each channel of rows (T, C), (C,) each: the median and the
    median absolute deviation, for a few tokens of large language models are a thousand times as
    large as the others; drawn to those of all channels where the rows are few.
    """
    count = len(rows)
    centre = rows.median(0).values
    variance = (MAD_TO_STD * (rows - centre).abs().median(0).values).square()
    common = variance.mean() if count > FEW_ROWS else rows.var()
    spread = ((count * variance + FEW_ROWS * common) / (count + FEW_ROWS)).sqrt()
    return count / (count + FEW_ROWS) * centre, spread


def is_held_out(numbers: Tensor, pictures: int) -> Tensor:
    """Whether pictures of these numbers, of so many that are drawn in all, are held out: the last
    one, and every fourth before it, of 20 and more pictures every fifth to eighth. What is held out
    is missed by the fit: with 30 pictures, a quarter of them costs a file for 8-bit activations
    0.8 dB of its pictures. None are where there is one picture, or it is not told how many.
    """
    if pictures < 2:
        return torch.zeros_like(numbers, dtype=torch.bool)
    stride = min(max(pictures // ENOUGH_HELD, MOST_OFTEN), LEAST_OFTEN)
    at_strides = ((pictures - 1 - numbers) % stride == 0) & (numbers >= stride - 1)
    return at_strides | (numbers == pictures - 1)


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
        f"measured on {prompts}, and {ENOUGH_PICTURES - count} more drawn at random like them:"
        " errors of other prompts may be larger than those told here;"
        f" {ENOUGH_PROMPTS} or more tell what the model reads (the node adds its own where 'clip'"
        " is connected)"
    )
