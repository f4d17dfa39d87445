"""What the layers of a 16-bit model see while it draws: recorded inside ComfyUI, with its own
sampler.

Two ways: on the user's prompts (preset "best"), or on random conditioning of the right widths
(preset "fast", when the model fits in memory). The sampler repeats its pictures exactly, so that
layers can be recorded in as many passes as the memory cap demands.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable
from dataclasses import dataclass, replace

import comfy.model_management
import comfy.sample
import comfy.samplers
import torch
from comfy.model_patcher import ModelPatcher

from ....quant.calibration import pictures as drawn
from ....quant.calibration.pictures import PROMPTS, RANDOM
from ....quant.calibration.recorder import UNTOLD, Shown, collect
from ....quant.calibration.statistics import InputStats
from ..host.prefix import forget_prefix
from ..host.progress import Progress

log = logging.getLogger("nibble")

# Where ComfyUI's transformers take their text in, in order of trial; the width of the first that
# exists is the conditioning's.
_TOKEN_INPUTS = (
    "txt_in",
    "txt_in.input_embedder",
    "context_embedder",
    "text_embedding.0",
    "cap_embedder.1",
    "caption_projection.linear_1",
)
_POOLED_INPUTS = ("vector_in.in_layer", "y_embedder.mlp.0")
HEADROOM = 2 << 30  # bytes of RAM left free beside a model that is loaded only to be measured


@dataclass
class Pictures:
    """What to draw while recording."""

    prompts: list[list]  # ComfyUI conditionings, one entry each
    latent: torch.Tensor  # (1, C, …, h, w): zeros, or a picture's latent
    steps: int
    seed: int
    kind: str  # "prompts" | "random conditioning"

    def filled(self) -> Pictures:
        """The same for measurements: with pictures of prompts like the user's where those are few.
        Random conditioning is left as it is.
        """
        if self.kind != PROMPTS:
            return self
        given = []
        for [entry] in self.prompts:
            vector = entry[1].get("pooled_output")
            given.append(
                drawn.Conditioning(
                    entry[0][0].cpu(), None if vector is None else vector.reshape(-1).cpu()
                )
            )
        more = [
            _conditioning(self.prompts[i % len(given)], made)
            for i, made in enumerate(drawn.like(given, self.seed))
        ]
        prompts = [*self.prompts, *more]
        return replace(self, prompts=[prompts[i] for i in drawn.order(len(given))])

    def provenance(self) -> dict:
        """What the recording depends on, for the file's metadata."""
        conditioning = []
        for [entry] in self.prompts:
            others = [entry[1][key] for key in sorted(entry[1])]
            tensors = [value for value in others if isinstance(value, torch.Tensor)]
            conditioning.append([entry[0], *tensors])
        latent = list(self.latent.shape)
        return drawn.provenance(self.kind, conditioning, self.steps, self.seed, latent)


def _conditioning(given: list, made: drawn.Conditioning) -> list:
    """ComfyUI's form of a prompt that was made like a given one, whose other facts it shares."""
    [[_, extras]] = given
    if made.pooled is not None:
        extras = extras | {"pooled_output": made.pooled[None]}
    return [[made.tokens[None], extras]]


@dataclass(frozen=True)
class Recording:
    """A 16-bit model, and what to draw with it while its layers are watched."""

    patcher: ModelPatcher
    pictures: Pictures


class DrawingFailed(ValueError):
    """The 16-bit model cannot be run, or not to a finite result. reason: as NotMeasured's."""

    def __init__(self, reason: str):
        super().__init__(
            f"{reason[:1].upper()}{reason[1:]}. Choose the preset 'fast', which quantizes from the"
            " weights alone where the model cannot be measured."
        )
        self.reason = reason


@dataclass(frozen=True)
class NotMeasured:
    """Why the 16-bit model is not run, and what would change that."""

    reason: str
    advice: str = ""

    @property
    def note(self) -> str:
        """For the report of a quantization that does without."""
        note = f"{self.reason}, so the weights alone were used"
        return f"{note}; {self.advice}" if self.advice else note


def pictures_of(
    patcher: ModelPatcher, positive: list, latent: dict | None, steps: int, seed: int
) -> Pictures:
    """The user's own: each entry of a CONDITIONING is a prompt; a LATENT gives the size."""
    samples = (
        latent["samples"][:1] if latent is not None else empty_latent(patcher, drawn.PROMPT_PIXELS)
    )
    return Pictures(
        prompts=[[entry] for entry in positive],
        latent=comfy.sample.fix_empty_latent_channels(patcher, samples),
        steps=steps,
        seed=seed,
        kind=PROMPTS,
    )


def random_pictures(
    patcher: ModelPatcher,
    seed: int,
    prompts: int = drawn.RANDOM_PROMPTS,
    steps: int = drawn.STEPS,
    latent: dict | None = None,
) -> Pictures | NotMeasured:
    """Random conditioning for a model, or the reason why there is none. A LATENT gives the size."""
    tokens = _input_width(patcher, _TOKEN_INPUTS)
    pooled = _input_width(patcher, _POOLED_INPUTS)
    if tokens is None:
        return NotMeasured(
            f"Nibble does not know how {type(patcher.model).__name__} takes its prompt"
        )
    wants_mask = _requires_mask(patcher)

    def prompt(text: torch.Tensor, vector: torch.Tensor | None) -> list:
        extras = {}
        if wants_mask:
            extras["attention_mask"] = torch.ones(text.shape[:2], dtype=torch.long)
        if vector is not None:
            extras["pooled_output"] = vector
        return [[text, extras]]

    samples = (
        latent["samples"][:1] if latent is not None else empty_latent(patcher, drawn.RANDOM_PIXELS)
    )
    return Pictures(
        prompts=[prompt(*made) for made in drawn.random_prompts(prompts, tokens, pooled, seed)],
        latent=comfy.sample.fix_empty_latent_channels(patcher, samples),
        steps=steps,
        seed=seed,
        kind=RANDOM,
    )


def _input_width(patcher: ModelPatcher, names: tuple[str, ...]) -> int | None:
    """Inputs of the first of these modules that the model has as a linear."""
    modules = dict(patcher.model.diffusion_model.named_modules())
    for name in names:
        if hasattr(modules.get(name), "in_features"):
            return modules[name].in_features
    return None


def _requires_mask(patcher: ModelPatcher) -> bool:
    """Whether the model cannot be called without the mask that its text encoder gives (LTX)."""
    forward = inspect.signature(patcher.model.diffusion_model.forward)
    mask = forward.parameters.get("attention_mask")
    return mask is not None and mask.default is inspect.Parameter.empty


def empty_latent(patcher: ModelPatcher, pixels: int) -> torch.Tensor:
    """Zeros (1, C, [1,] h, w) for a square picture in the model's own latent space."""
    form = patcher.get_model_object("latent_format")
    side = pixels // (getattr(form, "spacial_downscale_ratio", None) or 8)
    return torch.zeros(1, form.latent_channels, *[1] * (form.latent_dimensions - 2), side, side)


def fits_in_memory(nbytes: int) -> bool:
    """Whether a 16-bit model of so many bytes can be run here without pushing the system
    into swap.
    """
    cpu = torch.device("cpu")
    # the CPU computes in float32
    doubled = comfy.model_management.is_device_cpu(comfy.model_management.get_torch_device())
    return nbytes * (2 if doubled else 1) + HEADROOM < comfy.model_management.get_free_memory(cpu)


def record(
    recording: Recording, names: list[str], cap: int, progress: Progress
) -> dict[str, InputStats]:
    """Statistics of the named layers' inputs over all pictures, at most `cap` bytes of them in work
    at a time. Raises DrawingFailed.
    """
    recording = replace(recording, pictures=recording.pictures.filled())
    pictures = recording.pictures
    count = len(pictures.prompts)
    total = count * pictures.steps
    state = {"pass": 0, "step": 0}

    def now() -> range:
        number = state["step"] // pictures.steps
        return range(number, number + 1)

    def stepped(*_) -> None:
        state["step"] += 1
        progress(min(state["step"], total), total, f"pass {state['pass'] + 1}")

    def passed(done: int, passes: int) -> None:
        state.update({"pass": done, "step": 0})
        progress.at(0.0, f"pass {done} of {passes} done")

    statistics = collect(
        recording.patcher.model.diffusion_model,
        names,
        lambda: draw(recording, stepped),
        cap,
        passed,
        seed=pictures.seed,
        shown=Shown(count, now) if pictures.kind == PROMPTS else UNTOLD,
    )
    for name, found in statistics.items():
        if not found.mean_square.isfinite().all():
            raise DrawingFailed(
                f"the 16-bit model overflows where it is measured: what {name} reads is not finite"
            )
    return statistics


def draw(recording: Recording, stepped: Callable) -> None:
    """Every picture once, the same each time: Euler, the model's own time schedule, no CFG. Raises
    DrawingFailed, and ComfyUI's interrupt.
    """
    try:
        _draw(recording, stepped)
    except (comfy.model_management.InterruptProcessingException, MemoryError, DrawingFailed):
        raise
    except Exception as error:
        # whatever a model of somebody else's raises on inputs that it was not made for
        log.warning("the 16-bit model could not be run", exc_info=error)
        said = str(error).strip().partition("\n")[0]
        raise DrawingFailed(
            f"the 16-bit model could not be run ({type(error).__name__}: {said})"
        ) from error


def _draw(recording: Recording, stepped: Callable) -> None:
    patcher, pictures = recording.patcher, recording.pictures
    for index, prompt in enumerate(pictures.prompts):
        forget_prefix(patcher.model.diffusion_model)  # every pass sees it computed
        noise = comfy.sample.prepare_noise(pictures.latent, pictures.seed + index)
        sigmas = comfy.samplers.calculate_sigmas(
            patcher.get_model_object("model_sampling"), "simple", pictures.steps
        )
        guider = comfy.samplers.CFGGuider(patcher)
        guider.inner_set_conds({"positive": prompt})
        guider.sample(
            noise,
            pictures.latent,
            comfy.samplers.sampler_object("euler"),
            sigmas,
            callback=stepped,
            disable_pbar=True,
            seed=pictures.seed + index,
        )
