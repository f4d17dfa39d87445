"""FLUX.1 at work outside ComfyUI: its velocity, Euler's method, and what its layers read meanwhile.

    dx/dt = v(x, t), from noise at t = 1 to a latent at t = 0
    t = e^s / (e^s + 1/u - 1)      u: evenly from 1 to 0; s: the shift (FLUX.1's reference sampler)

Packing of latents and the schedule are written out: diffusers' FluxPipeline cannot be imported
without transformers, and FlowMatchEulerDiscreteScheduler rounds its times otherwise.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import diffusers
import torch
from torch import Tensor, nn

from ..calibration import pictures, recorder
from ..calibration.statistics import InputStats
from ..calibration.teacher import Teacher
from .load import flux_transformer
from .names import diffusers_parts

GUIDANCE = 3.5  # of FLUX.1 dev, where none is said, as in ComfyUI
LATENT_CHANNELS = 16
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
    guidance: float = GUIDANCE,
    shift: float = SHIFT,
    report: Callable[[int], None] = lambda step: None,
) -> Tensor:
    """Euler's method for the rectified flow dx/dt = velocity, from noise (batch, 16, h, w) at t = 1
    to latents at t = 0.
    """

    def flow(x: Tensor, t: Tensor) -> Tensor:
        return velocity(flux, x, t, tokens, pooled, x.new_full((len(x),), guidance))

    return _integrated(flow, noise, schedule(steps, shift), report)


def _integrated(
    flow: Callable[[Tensor, Tensor], Tensor],
    x: Tensor,
    times: Tensor,
    report: Callable[[int], None] = lambda step: None,
) -> Tensor:
    """x (batch, …) at the first of the times (steps + 1,), led along dx/dt = flow(x, t) to the
    last.
    """
    times = times.to(x)
    for i in range(len(times) - 1):
        x = x + (times[i + 1] - times[i]) * flow(x, times[i].expand(len(x)))
        report(i + 1)
    return x


@dataclass(frozen=True)
class Drawing:
    """What a FLUX.1 draws while it is watched.

    tokens, pooled  conditioning, a prompt an entry: (T, context) each, and (P, vector)
    kind   "prompts" | "random conditioning"
    size   (height, width) of the latents: 64 is a picture of 512 pixels
    shift  of the time schedule
    guidance  the distilled scale
    batch  pictures at a time; their tokens are of one length then
    """

    tokens: Sequence[Tensor]
    pooled: Tensor
    kind: str = pictures.PROMPTS
    size: tuple[int, int] = (pictures.PROMPT_PIXELS // 8,) * 2
    steps: int = pictures.STEPS
    shift: float = SHIFT
    guidance: float = GUIDANCE
    seed: int = 0
    batch: int = 1

    @classmethod
    def without_data(
        cls, state: Mapping[str, Tensor], prompts: int = pictures.RANDOM_PROMPTS, **changes
    ) -> "Drawing":
        """Random conditioning for a FLUX.1 of such a state dict; changes: other fields."""
        widths = state["txt_in.weight"].shape[1], state["vector_in.in_layer.weight"].shape[1]
        made = list(pictures.random_prompts(prompts, *widths, changes.get("seed", 0)))
        given: dict[str, Any] = {
            "kind": pictures.RANDOM,
            "size": (pictures.RANDOM_PIXELS // 8,) * 2,
            "shift": shift_of(state),
        }
        tokens = [tokens[0] for tokens, _ in made]
        return cls(tokens, torch.cat([p for _, p in made if p is not None]), **given | changes)

    def filled(self) -> "Drawing":
        """The same for measurements: with pictures of prompts like the given ones where those are
        few. Random conditioning is left as it is.
        """
        if self.kind != pictures.PROMPTS:
            return self
        given = [
            pictures.Conditioning(*pair) for pair in zip(self.tokens, self.pooled, strict=True)
        ]
        prompts = [*given, *pictures.like(given, self.seed)]
        drawn = [prompts[i] for i in pictures.order(len(given))]
        pooled = torch.stack([prompt.pooled for prompt in drawn if prompt.pooled is not None])
        return replace(self, tokens=[prompt.tokens for prompt in drawn], pooled=pooled)

    def provenance(self) -> dict:
        """What a recording depends on, for the file's metadata."""
        # the shape of a prompt's tensors is not told apart from ComfyUI's (1, T, context)
        conditioning = [list(pair) for pair in zip(self.tokens, self.pooled, strict=True)]
        latent = [1, LATENT_CHANNELS, *self.size]
        return pictures.provenance(self.kind, conditioning, self.steps, self.seed, latent)

    def run(
        self, model: diffusers.FluxTransformer2DModel, shown: Callable[[range], None]
    ) -> Callable[[], None]:
        """A function that draws all pictures, the same each time it is called. shown(numbers of
        the pictures) is called before each batch.
        """
        times = pictures.schedule(self.steps, self.shift)
        shape = (1, model.config.in_channels // 4, *self.size)

        @torch.no_grad()
        def run() -> None:
            for first in range(0, len(self.tokens), self.batch):
                numbers = range(first, min(first + self.batch, len(self.tokens)))
                shown(numbers)
                noise = torch.cat([pictures.noise(shape, self.seed, n) for n in numbers])
                given = [
                    torch.stack([part[n] for n in numbers]) for part in (self.tokens, self.pooled)
                ]
                given.append(noise.new_full((len(noise),), self.guidance))

                def flow(x: Tensor, t: Tensor, given=given) -> Tensor:
                    return velocity(model, x, t, *given)

                _integrated(flow, noise, times)

        return run


def shift_of(state: Mapping[str, Tensor]) -> float:
    """The shift of a FLUX.1's own schedule in ComfyUI: dev's, or none for schnell, which takes no
    guidance.
    """
    return SHIFT if "guidance_in.in_layer.weight" in state else 0.0


def flux_teacher(state: Mapping[str, Tensor], drawing: Drawing, cap: int = 2 << 30) -> Teacher:
    """A 16-bit FLUX.1 at work, to calibrate codewords on. cap: as in `record_inputs`."""
    model = flux_transformer(dict(state)).eval()
    return Teacher(model, drawing.run(model, lambda numbers: None), diffusers_parts, cap)


def record_inputs(
    state: Mapping[str, Tensor],
    names: Iterable[str],
    drawing: Drawing,
    cap: int = 4 << 30,
    report: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, InputStats]:
    """What the named linears of a 16-bit FLUX.1 read while it draws.

    state  its weights under Black Forest Labs' names
    cap    bytes of statistics to hold at once: more layers than fit are recorded in several runs
    Returns name → InputStats under the names given.
    """
    model = flux_transformer(dict(state)).eval()
    drawing = drawing.filled()
    drawn: list[range] = []
    told = drawing.kind == pictures.PROMPTS
    shown = recorder.Shown(len(drawing.tokens), lambda: drawn[-1]) if told else recorder.UNTOLD
    return recorder.collect(
        model,
        names,
        drawing.run(model, drawn.append),
        cap,
        report,
        seed=drawing.seed,
        shown=shown,
        # parts joined in one layer read the same input
        module_of=lambda name: diffusers_parts(name)[0],
    )
