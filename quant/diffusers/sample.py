"""FLUX.1 at work outside ComfyUI: its velocity, Euler's method, and what its layers read meanwhile.

    dx/dt = v(x, t), from noise at t = 1 to a latent at t = 0
    t = e^s / (e^s + 1/u - 1)      u: evenly from 1 to 0; s: the shift (FLUX.1's reference sampler)

Packing of latents and the schedule are written out: diffusers' FluxPipeline cannot be imported
without transformers, and FlowMatchEulerDiscreteScheduler rounds its times otherwise.
"""

import math
from collections.abc import Callable, Iterable, Mapping

import diffusers
import torch
from torch import Tensor, nn

from ..calibration import recorder
from ..calibration.statistics import InputStats
from ..calibration.teacher import Teacher
from .load import flux_transformer
from .names import diffusers_parts

TOKEN_STD = 0.25  # of T5's outputs
SHIFT = 1.15  # of FLUX.1 dev's time schedule at small sizes, and ComfyUI's default for it


def velocity(
    flux: nn.Module, latents: Tensor, t: Tensor, tokens: Tensor, pooled: Tensor, guidance: Tensor
) -> Tensor:
    """FLUX's velocity for latents (batch, 16, h, w) at times t (batch,), 1 = noise; the same shape
    (of its output channels).

    tokens (batch, T, context) and pooled (batch, vector) are the prompt, guidance (batch,) the
    distilled scale.
    """
    batch, channels, height, width = latents.shape
    h, w = height // 2, width // 2
    packed = (
        latents.reshape(batch, channels, h, 2, w, 2)
        .permute(0, 2, 4, 1, 3, 5)
        .reshape(batch, h * w, channels * 4)
    )
    ids = torch.stack(
        [torch.zeros(h, w), *torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij")], -1
    )
    out = flux(
        hidden_states=packed,
        timestep=t,
        guidance=guidance,
        pooled_projections=pooled,
        encoder_hidden_states=tokens,
        txt_ids=torch.zeros(tokens.shape[1], 3).to(packed),
        img_ids=ids.reshape(h * w, 3).to(packed),
        return_dict=False,
    )[0]
    return (
        out.reshape(batch, h, w, -1, 2, 2)
        .permute(0, 3, 1, 4, 2, 5)
        .reshape(batch, -1, height, width)
    )


def schedule(steps: int, shift: float = SHIFT) -> Tensor:
    """Shifted times from 1 to 0, float32 (steps + 1,): t = e^s / (e^s + 1/u - 1), as in FLUX.1's
    reference sampler.
    """
    u, scale = torch.linspace(1, 0, steps + 1), math.exp(shift)
    return scale * u / (1 + (scale - 1) * u)


@torch.no_grad()
def euler(  # noqa: PLR0913 (a script's keywords)
    flux: nn.Module,
    noise: Tensor,
    tokens: Tensor,
    pooled: Tensor,
    steps: int,
    guidance: float = 3.5,
    shift: float = SHIFT,
    report: Callable[[int], None] = lambda step: None,
) -> Tensor:
    """Euler's method for the rectified flow dx/dt = velocity, from noise (batch, 16, h, w) at t = 1
    to latents at t = 0.
    """
    x, times = noise, schedule(steps, shift).to(noise)
    for i in range(steps):
        x = x + (times[i + 1] - times[i]) * velocity(
            flux, x, times[i].expand(len(x)), tokens, pooled, x.new_full((len(x),), guidance)
        )
        report(i + 1)
    return x


def drawing(  # noqa: PLR0913 (a script's keywords)
    model: diffusers.FluxTransformer2DModel,
    tokens: Tensor | None = None,
    pooled: Tensor | None = None,
    steps: int = 8,
    side: int = 32,
    seed: int = 0,
    batch: int = 4,
    shift: float = SHIFT,
    started: Callable[[int], None] = lambda first: None,
) -> Callable[[], None]:
    """A function that draws with a FLUX.1, the same each time it is called; arguments as in
    `record_inputs`. started(number of its first picture) is called before each batch.
    """
    generator = torch.Generator().manual_seed(seed)
    if tokens is None or pooled is None:
        config = model.config
        tokens = torch.randn(batch, 64, config.joint_attention_dim, generator=generator) * TOKEN_STD
        pooled = torch.randn(batch, config.pooled_projection_dim, generator=generator)
    noise = torch.randn(len(tokens), model.config.in_channels // 4, side, side, generator=generator)

    def run() -> None:
        for part in range(0, len(tokens), batch):
            chosen = slice(part, part + batch)
            started(part)
            euler(model, noise[chosen], tokens[chosen], pooled[chosen], steps, shift=shift)

    return run


def flux_teacher(  # noqa: PLR0913 (a script's keywords)
    state: Mapping[str, Tensor],
    tokens: Tensor | None = None,
    pooled: Tensor | None = None,
    cap: int = 2 << 30,
    steps: int = 8,
    side: int = 32,
    seed: int = 0,
    batch: int = 4,
    shift: float = SHIFT,
) -> Teacher:
    """A 16-bit FLUX.1 at work, to calibrate codewords on; arguments as in `record_inputs`. With
    random prompts it needs no data.
    """
    model = flux_transformer(dict(state)).eval()
    return Teacher(
        model, drawing(model, tokens, pooled, steps, side, seed, batch, shift), diffusers_parts, cap
    )


def record_inputs(  # noqa: PLR0913 (a script's keywords)
    state: Mapping[str, Tensor],
    names: Iterable[str],
    tokens: Tensor | None = None,
    pooled: Tensor | None = None,
    cap: int = 4 << 30,
    steps: int = 8,
    side: int = 32,
    seed: int = 0,
    batch: int = 4,
    report: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, InputStats]:
    """What the named linears of a 16-bit FLUX.1 read while it draws.

    state           its weights under Black Forest Labs' names
    tokens, pooled  prompts (P, T, context) and (P, vector); None draws them at random, spread like
      T5's and CLIP's outputs
    cap             bytes of statistics to hold at once: more layers than fit are recorded in
      several runs
    side            of the latents: 32 is a picture of 256 pixels
    batch           pictures at a time
    Returns name → InputStats under the names given.
    """
    model = flux_transformer(dict(state)).eval()
    first: list[int | None] = [None]  # of the pictures being drawn, where they are of prompts

    def started(picture: int) -> None:
        first[0] = None if tokens is None else picture

    run = drawing(model, tokens, pooled, steps, side, seed, batch, started=started)
    # parts joined in one module read the same input
    readers = {name: diffusers_parts(name)[0] for name in names}
    recorded = recorder.collect(
        model, readers.values(), run, cap, report, seed=seed, picture=lambda: first[0]
    )
    return {name: recorded[reader] for name, reader in readers.items()}
