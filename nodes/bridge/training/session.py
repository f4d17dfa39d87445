"""Training something small beside a MODEL's frozen weights, inside ComfyUI's own sampling; on
LATENTs and CONDITIONINGs, or anything else.

    loss = f(x0(x_t, t), x_0)     x_t = model_sampling.noise_scaling(sigma(t), noise, x_0),  t
      uniform in 0..1, x0 the model's denoised picture

the loss of ComfyUI's Train LoRA on `Pictures`; for a flow model x0 - x_0 = sigma (v* - v). The
training is a `Sampler`: ComfyUI itself loads the model, encodes the conditioning and calls the
model, so that whatever it can sample can be trained on.

The MODEL that came in is never touched: its file is loaded once more (most of it is the same pages
of memory), outside of inference mode, and that copy is trained beside and thrown away.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import comfy.model_management
import comfy.sample
import comfy.sampler_helpers
import comfy.samplers
import torch
from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import WrappersMP
from torch import Tensor

from ....quant.files.errors import FileRefused
from ....quant.training.loop import allowing_writes
from ..host.samplers import in_training, previewer

LOSSES = {
    "MSE": torch.nn.functional.mse_loss,
    "L1": torch.nn.functional.l1_loss,
    "Huber": torch.nn.functional.huber_loss,
    "SmoothL1": torch.nn.functional.smooth_l1_loss,
}
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32, "none": None}
PREVIEW_STEPS = 8
MOST_ENCODED = 64  # prompts whose encoded form is kept: 4 MB each for FLUX
# of a prompt for part of a call
_ALONE = {
    "area",
    "mask",
    "control",
    "gligen",
    "hooks",
    "strength",
    "timestep_start",
    "timestep_end",
    "default",
}
_KEY = "nibble_training"  # of this room's wrapper on the copy of the model
T = TypeVar("T")


# ---- a model to train beside


@dataclass(frozen=True)
class Settings:
    """batch: pictures a step; loss: a key of LOSSES; dtype: a key of DTYPES, what the model
    computes in; checkpointing: compute blocks twice and keep less; offloading: keep weights in RAM
    and stream them; seed: of previews (the training's own comes with each generator).
    """

    batch: int = 1
    loss: str = "MSE"
    dtype: str = "bf16"
    checkpointing: bool = True
    offloading: bool = False
    seed: int = 0


def blocks_of(model: torch.nn.Module) -> dict[str, torch.nn.Module]:
    """Name → each entry of a diffusion model's lists of blocks."""
    lists = {
        name: child
        for name, child in model.named_children()
        if isinstance(child, torch.nn.ModuleList)
    }
    return {
        f"{name}.{i}": block for name, blocks in lists.items() for i, block in enumerate(blocks)
    }


class Session:
    """A model that is loaded and frozen, and the prompts that it is trained with.

    model: the diffusion model, whose linears may be replaced; device: where it computes; captions:
        ComfyUI's conditioning entries, each of which is
    read and encoded when it is used. A latent is always meant in the model's own units (after its
    `process_latent_in`), on that device.
    """

    def __init__(
        self,
        guider: comfy.samplers.CFGGuider,
        captions: Sequence[list],
        settings: Settings,
        options: dict,
    ):
        self.guider, self.captions, self.settings, self._options = (
            guider,
            captions,
            settings,
            options,
        )
        self.inner, self.device = guider.inner_model, guider.model_patcher.load_device
        self.model: torch.nn.Module = self.inner.diffusion_model
        # (caption, latent shape) → conditioning, encoded for it
        self._encoded: OrderedDict[tuple, dict] = OrderedDict()
        # latent shape → the first latent of it, which conditionings are encoded for
        self._latents: dict[tuple, Tensor] = {}

    def blocks(self) -> list[torch.nn.Module]:
        """The entries of the model's lists of blocks."""
        return list(blocks_of(self.model).values())

    def checkpointed(self) -> list[torch.nn.Module]:
        """What to compute twice: all blocks, if that is wanted."""
        return self.blocks() if self.settings.checkpointing else []

    def denoised(
        self, noisy: Tensor, sigmas: Tensor, captions: Sequence[int], latent: Tensor | None = None
    ) -> Tensor:
        """One call of the model. noisy (batch, …) at noise levels sigmas (batch,), with the caption
        of each → denoised latents, in noisy's shape.

        captions: one and the same, or of one of `groups`. latent (1, …): for models that look at
            the picture that is changed; None: an empty one.
        """
        self.guider.conds = {
            "positive": [
                self.prompt(captions, torch.zeros_like(noisy[:1]) if latent is None else latent)
            ]
        }
        return self.guider(noisy, sigmas, **self._options)

    def groups(self, captions: Sequence[int], latent: Tensor) -> list[list[int]]:
        """Places in `captions`, in groups that can go through the model together: prompts that are
        encoded to tensors of the same shapes.
        """
        found: dict[object, list[int]] = {}
        for place, caption in enumerate(captions):
            found.setdefault(_form(self._encode(caption, latent), caption), []).append(place)
        return list(found.values())

    def prompt(self, captions: Sequence[int], latent: Tensor) -> dict:
        """What the model takes as the prompt of latents of this shape: one for all, or a row for
        each caption.
        """
        entries = [
            self._encode(caption, latent)
            for caption in (captions if len(set(captions)) > 1 else captions[:1])
        ]
        first, *others = (entry["model_conds"] for entry in entries)
        rows = (
            {
                name: type(cond)(cond.concat([other[name] for other in others]))
                for name, cond in first.items()
            }
            if others
            else first
        )
        return entries[0] | {"model_conds": rows}

    def _encode(self, caption: int, latent: Tensor) -> dict:
        """A caption as the model takes it, for latents of this shape."""
        key = (caption, latent.shape)
        if key not in self._encoded:
            latent = self._latents.setdefault(latent.shape, latent)
            conds = {
                "positive": comfy.sampler_helpers.convert_cond([_thawed(self.captions[caption])])
            }
            self._encoded[key] = comfy.samplers.process_conds(
                self.inner,
                torch.zeros_like(latent),
                conds,
                self.device,
                latent,
                None,
                self.settings.seed,
                latent_shapes=[latent.shape],
            )["positive"][0]
            if len(self._encoded) > MOST_ENCODED:
                self._encoded.popitem(last=False)
        self._encoded.move_to_end(key)
        return self._encoded[key]

    def euler(self, noise: Tensor, caption: int, steps: int) -> Tensor:
        """noise (1, …) of unit variance → what the model draws of it in steps of Euler's method,
        without CFG.
        """
        sigmas = comfy.samplers.calculate_sigmas(self.inner.model_sampling, "simple", steps).to(
            self.device
        )
        empty = torch.zeros_like(noise)
        self.guider.conds = {"positive": [self.prompt([caption], empty)]}
        euler = comfy.samplers.sampler_object("euler")
        return euler.sample(
            self.guider, sigmas, dict(self._options), None, noise, empty, disable_pbar=True
        )

    def preview(self, draw: Callable[[], Tensor]) -> tuple | None:
        """What `draw` returns, a latent, as ComfyUI's (format, picture, largest side); None where
        this model has no preview.
        """
        seen = previewer(self.device, self.inner.latent_format)
        if seen is None:
            return None
        with torch.no_grad():
            return seen.decode_latent_to_preview_image("JPEG", draw())


def _form(entry: dict, caption: int) -> object:
    """Equal for conditionings that can be rows of one; the caption where it can only go on
    its own.
    """
    if _ALONE & entry.keys():
        return caption
    conds = {name: (type(cond), cond.cond) for name, cond in entry["model_conds"].items()}
    if not all(
        (
            len(value) == 1
            if isinstance(value, Tensor) and value.ndim
            else value is None or isinstance(value, (bool, int, float, str))
        )
        for _, value in conds.values()
    ):
        return caption
    return tuple(
        (name, kind, value.shape if isinstance(value, Tensor) else value)
        for name, (kind, value) in sorted(conds.items())
    )


class _Training(comfy.samplers.Sampler):
    """Calls `work` where ComfyUI would sample."""

    def __init__(self, work: Callable[[Session], T], captions: Sequence[list], settings: Settings):
        self.work, self.captions, self.settings = work, captions, settings
        self.result = None

    def sample(
        self,
        model_wrap,
        sigmas,
        extra_args,
        callback,
        noise,
        latent_image=None,
        denoise_mask=None,
        disable_pbar=False,
    ):
        session = Session(model_wrap, self.captions, self.settings, extra_args)
        with allowing_writes(session.blocks()):
            self.result = self.work(session)
        return latent_image


def run(
    model: ModelPatcher,
    captions: Sequence[list],
    shape: Sequence[int],
    settings: Settings,
    work: Callable[[Session], T],
    prepared: Sequence[list] | None = None,
) -> T:
    """Calls work with a `Session` on a copy of the model, and returns what it returns. However it
    ends, nothing of it is left in memory.

    shape: (1, …) of a latent, for which ComfyUI makes room. prepared: the captions for which
        ComfyUI loads models (ControlNets) too; None: all.
    """
    with torch.inference_mode(False), torch.enable_grad(), in_training():
        own = _copy(model, settings)
        try:
            guider = comfy.samplers.CFGGuider(own)
            guider.inner_set_conds(
                {"positive": _thawed(list(captions if prepared is None else prepared))}
            )
            trainer, empty = _Training(work, captions, settings), torch.zeros(tuple(shape))
            guider.sample(
                empty, empty, trainer, torch.ones(2), disable_pbar=True, seed=settings.seed
            )
            return trainer.result
        except RuntimeError as error:
            if "no autograd formula" not in str(error):
                raise
            raise ValueError(
                f"{type(own.model.diffusion_model).__name__} uses an operation for which"
                " ComfyUI has no gradient, so this model cannot be trained"
                f" ({str(error).split('. ')[0]})."
            ) from error
        finally:
            comfy.model_management.unload_model_and_clones(own)
            comfy.model_management.soft_empty_cache()


def _copy(model: ModelPatcher, settings: Settings) -> ModelPatcher:
    """The model from its file again, with the patches that the graph put on it, frozen."""
    if model.cached_patcher_init is None:
        raise FileRefused(
            "The connected model was made by a node that cannot load it a second time; connect Load"
            " SVDQuant Model, Load VQ Model or Load Diffusion Model."
        )
    own = model.clone(disable_dynamic=True, force_deepcopy=True)
    if DTYPES[settings.dtype] is not None:
        own.set_model_compute_dtype(DTYPES[settings.dtype])
    elif own.model.get_dtype_inference() == torch.float16:
        raise ValueError(
            "This model computes in fp16, in which gradients vanish; set training_dtype to bf16 or"
            " fp32."
        )
    own.model.requires_grad_(False)

    def load(executor, *inputs, **options):
        return executor(
            *inputs,
            **options
            | {"force_full_load": not settings.offloading, "force_offload": settings.offloading},
        )

    own.add_wrapper_with_key(WrappersMP.PREPARE_SAMPLING, _KEY, load)
    return own


def _thawed(value: T) -> T:
    """A copy whose tensors can take part in training: those that other nodes made in inference mode
    cannot.
    """
    if isinstance(value, Tensor):
        return value.clone()
    if isinstance(value, dict):
        return {name: _thawed(part) for name, part in value.items()}
    return type(value)(_thawed(part) for part in value) if type(value) in (list, tuple) else value


# ---- pictures to train on


@dataclass(frozen=True)
class Pictures:
    """latents: (1, C, [T,] h, w) each, as a VAE gives them; captions: ComfyUI's conditioning
    entries, one for all or one for each.
    """

    latents: list[Tensor]
    captions: list[list]

    def digest(self) -> str:
        """16 hex digits of all pictures and captions."""
        sha = hashlib.sha256(repr([tuple(latent.shape) for latent in self.latents]).encode())
        for tensor in [*self.latents, *_tensors(self.captions)]:
            sha.update(tensor.detach().float().cpu().contiguous().numpy().tobytes())
        return sha.hexdigest()[:16]

    def loss(self, session: Session, generator: torch.Generator) -> Tensor:
        """The mean loss of a batch; pictures, times and noise are drawn from the generator, on the
        CPU.
        """
        chosen = torch.randperm(len(self.latents), generator=generator)[
            : session.settings.batch
        ].tolist()
        percents = torch.rand(len(chosen), generator=generator).tolist()
        noises = [torch.randn(self.latents[i].shape, generator=generator) for i in chosen]
        # pictures of one caption and size go through the model together
        groups: dict[tuple, list[int]] = {}
        for place, i in enumerate(chosen):
            groups.setdefault((self._caption(i), self.latents[i].shape), []).append(place)
        losses = [
            self._loss(
                session,
                caption,
                [chosen[p] for p in places],
                [percents[p] for p in places],
                [noises[p] for p in places],
            )
            * len(places)
            for (caption, _), places in groups.items()
        ]
        return torch.stack(losses).sum() / len(chosen)

    def _caption(self, picture: int) -> int:
        return picture if len(self.captions) > 1 else 0

    def _loss(
        self,
        session: Session,
        caption: int,
        chosen: list[int],
        percents: list[float],
        noises: list[Tensor],
    ) -> Tensor:
        sampling = session.inner.model_sampling
        clean = session.inner.process_latent_in(torch.cat([self.latents[i] for i in chosen])).to(
            session.device
        )
        sigmas = torch.tensor(
            [float(sampling.percent_to_sigma(percent)) for percent in percents],
            device=session.device,
        )
        noisy = sampling.noise_scaling(sigmas, torch.cat(noises).to(session.device), clean, False)
        denoised = session.denoised(noisy, sigmas, [caption] * len(chosen), clean[:1])
        return LOSSES[session.settings.loss](denoised.float(), clean.float())

    def draw(self, session: Session) -> Tensor:
        """The first caption drawn as the model now would, always from the same noise, as large as
        the first picture.
        """
        noise = comfy.sample.prepare_noise(
            torch.zeros_like(self.latents[0]), session.settings.seed
        ).to(session.device)
        return session.euler(noise, 0, PREVIEW_STEPS)


def _tensors(value: object) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for name in sorted(value, key=str):
            yield from _tensors(value[name])
    elif isinstance(value, (list, tuple)):
        for part in value:
            yield from _tensors(part)


def pictures_of(model: ModelPatcher, latents: list[dict], positive: list[list]) -> Pictures:
    """LATENTs and CONDITIONINGs, in the order of ComfyUI's dataset nodes. Raises ValueError in
    plain words for what cannot be trained on.
    """
    form, found = model.get_model_object("latent_format"), []
    for latent in latents:
        samples = latent["samples"]
        if samples.is_nested:
            raise ValueError(
                "The latents hold several streams (video with sound), which cannot be trained on"
                " here; connect the pictures' latents alone."
            )
        if form.latent_dimensions == 3 and samples.ndim == 4:
            samples = samples.unsqueeze(2)
        _check(samples, form)
        found += [samples[i : i + 1].detach().cpu().float().clone() for i in range(len(samples))]
    captions = [entry for conditioning in positive for entry in conditioning]
    if not found:
        raise ValueError("There are no latents to train on; connect pictures through VAE Encode.")
    if len(captions) not in (1, len(found)):
        raise ValueError(
            f"There are {len(found)} latents and {len(captions)} prompts; connect one prompt for"
            " all pictures, or one for each."
        )
    return Pictures(found, captions)


def _check(samples: Tensor, form) -> None:
    if samples.ndim != 2 + form.latent_dimensions or samples.shape[1] != form.latent_channels:
        raise ValueError(
            f"The latents are {' x '.join(map(str, samples.shape))}, and this model's have"
            f" {form.latent_channels} channels in {form.latent_dimensions} dimensions; encode the"
            " pictures with this model's own VAE."
        )
    if not samples.isfinite().all():
        raise ValueError(
            "The latents hold values that are not finite; look at the pictures and the VAE that"
            " they come from."
        )
    if not samples.any():
        raise ValueError(
            "The latents are empty; connect pictures through VAE Encode in place of an empty"
            " latent."
        )
