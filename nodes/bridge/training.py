"""Training something small beside a MODEL's frozen weights, on LATENTs and CONDITIONINGs, inside ComfyUI's own sampling.

    loss = f(x0(x_t, t), x_0)     x_t = model_sampling.noise_scaling(sigma(t), noise, x_0),  t uniform in 0..1, x0 the model's denoised picture

the loss of ComfyUI's Train LoRA; for a flow model x0 - x_0 = sigma (v* - v). The training is a `Sampler`: ComfyUI itself loads the model, encodes
the conditioning and calls the model, so that whatever it can sample can be trained on.

The MODEL that came in is never touched: its file is loaded once more (most of it is the same pages of memory), outside of inference mode,
and that copy is trained beside and thrown away.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TypeVar

import comfy.model_management
import comfy.sample
import comfy.samplers
import latent_preview
import torch
from comfy.cli_args import LatentPreviewMethod, args
from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import WrappersMP
from torch import Tensor

from ...quant.container import FileRefused
from ...quant.training import allowing_writes

LOSSES = {"MSE": torch.nn.functional.mse_loss, "L1": torch.nn.functional.l1_loss, "Huber": torch.nn.functional.huber_loss,
          "SmoothL1": torch.nn.functional.smooth_l1_loss}
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32, "none": None}
PREVIEW_STEPS = 8
_KEY = "nibble_training"  # of this room's wrapper on the copy of the model
T = TypeVar("T")


# ---- what to train on


@dataclass(frozen=True)
class Pictures:
    """latents: (1, C, [T,] h, w) each, as a VAE gives them; captions: ComfyUI's conditioning entries, one for all or one for each."""

    latents: list[Tensor]
    captions: list[list]

    def digest(self) -> str:
        """16 hex digits of all pictures and captions."""
        sha = hashlib.sha256(repr([tuple(latent.shape) for latent in self.latents]).encode())
        for tensor in [*self.latents, *_tensors(self.captions)]:
            sha.update(tensor.detach().float().cpu().contiguous().numpy().tobytes())
        return sha.hexdigest()[:16]


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
    """LATENTs and CONDITIONINGs, in the order of ComfyUI's dataset nodes. Raises ValueError in plain words for what cannot be trained on."""
    form, found = model.get_model_object("latent_format"), []
    for latent in latents:
        samples = latent["samples"]
        if samples.is_nested:
            raise ValueError("The latents hold several streams (video with sound), which cannot be trained on here; connect the pictures' latents alone.")
        if form.latent_dimensions == 3 and samples.ndim == 4:
            samples = samples.unsqueeze(2)
        _check(samples, form)
        found += [samples[i:i + 1].detach().cpu().float().clone() for i in range(len(samples))]
    captions = [entry for conditioning in positive for entry in conditioning]
    if not found:
        raise ValueError("There are no latents to train on; connect pictures through VAE Encode.")
    if len(captions) not in (1, len(found)):
        raise ValueError(f"There are {len(found)} latents and {len(captions)} prompts; connect one prompt for all pictures, or one for each.")
    return Pictures(found, captions)


def _check(samples: Tensor, form) -> None:
    if samples.ndim != 2 + form.latent_dimensions or samples.shape[1] != form.latent_channels:
        raise ValueError(f"The latents are {' x '.join(map(str, samples.shape))}, and this model's have {form.latent_channels} channels in "
                         f"{form.latent_dimensions} dimensions; encode the pictures with this model's own VAE.")
    if not samples.isfinite().all():
        raise ValueError("The latents hold values that are not finite; look at the pictures and the VAE that they come from.")
    if not samples.any():
        raise ValueError("The latents are empty; connect pictures through VAE Encode in place of an empty latent.")


# ---- a model to train beside


@dataclass(frozen=True)
class Settings:
    """batch: pictures a step; loss: a key of LOSSES; dtype: a key of DTYPES, what the model computes in; checkpointing: compute blocks twice and keep
    less; offloading: keep weights in RAM and stream them; seed: of previews (the training's own comes with each generator)."""

    batch: int = 1
    loss: str = "MSE"
    dtype: str = "bf16"
    checkpointing: bool = True
    offloading: bool = False
    seed: int = 0


class Session:
    """A model that is loaded and frozen. model: the diffusion model, whose linears may be replaced; device: where it computes."""

    def __init__(self, guider: comfy.samplers.CFGGuider, pictures: Pictures, settings: Settings, options: dict):
        self.guider, self.pictures, self.settings, self._options = guider, pictures, settings, options
        self.inner, self.device = guider.inner_model, guider.model_patcher.load_device
        self.model: torch.nn.Module = self.inner.diffusion_model
        self._encoded: dict[tuple, list] = {}  # latent shape → conditioning, encoded for it

    def blocks(self) -> list[torch.nn.Module]:
        """The entries of the model's lists of blocks."""
        lists = [child for child in self.model.children() if isinstance(child, torch.nn.ModuleList)]
        return [block for blocks in lists for block in blocks]

    def checkpointed(self) -> list[torch.nn.Module]:
        """What to compute twice: all blocks, if that is wanted."""
        return self.blocks() if self.settings.checkpointing else []

    def loss(self, generator: torch.Generator) -> Tensor:
        """The mean loss of a batch; pictures, times and noise are drawn from the generator, on the CPU."""
        chosen = torch.randperm(len(self.pictures.latents), generator=generator)[:self.settings.batch].tolist()
        percents = torch.rand(len(chosen), generator=generator).tolist()
        noises = [torch.randn(self.pictures.latents[i].shape, generator=generator) for i in chosen]
        groups: dict[tuple, list[int]] = {}  # pictures of one caption and size go through the model together
        for place, i in enumerate(chosen):
            groups.setdefault((self._caption(i), self.pictures.latents[i].shape), []).append(place)
        losses = [self._loss(caption, [chosen[p] for p in places], [percents[p] for p in places], [noises[p] for p in places]) * len(places)
                  for (caption, _), places in groups.items()]
        return torch.stack(losses).sum() / len(chosen)

    def _caption(self, picture: int) -> int:
        return picture if len(self.pictures.captions) > 1 else 0

    def _loss(self, caption: int, chosen: list[int], percents: list[float], noises: list[Tensor]) -> Tensor:
        sampling = self.inner.model_sampling
        clean = self.inner.process_latent_in(torch.cat([self.pictures.latents[i] for i in chosen])).to(self.device)
        sigmas = torch.tensor([float(sampling.percent_to_sigma(percent)) for percent in percents], device=self.device)
        noisy = sampling.noise_scaling(sigmas, torch.cat(noises).to(self.device), clean, False)
        self.guider.conds = {"positive": [self._encode(clean[:1])[caption]]}
        denoised = self.guider(noisy, sigmas, **self._options)
        return LOSSES[self.settings.loss](denoised.float(), clean.float())

    def _encode(self, clean: Tensor) -> list:
        """The captions as the model takes them, for latents of this shape."""
        if clean.shape not in self._encoded:
            conds = {"positive": [dict(cond) for cond in self.guider.original_conds["positive"]]}
            self._encoded[clean.shape] = comfy.samplers.process_conds(
                self.inner, torch.zeros_like(clean), conds, self.device, clean, None, self.settings.seed, latent_shapes=[clean.shape])["positive"]
        return self._encoded[clean.shape]

    def preview(self) -> tuple | None:
        """The first caption drawn as the model now would, always from the same noise, as ComfyUI's (format, picture, largest side); None where this
        model has no preview. PREVIEW_STEPS of Euler, no CFG."""
        previewer = _previewer(self.device, self.inner.latent_format)
        if previewer is None:
            return None
        with torch.no_grad():
            empty = torch.zeros_like(self.pictures.latents[0])
            noise = comfy.sample.prepare_noise(empty, self.settings.seed).to(self.device)
            sigmas = comfy.samplers.calculate_sigmas(self.inner.model_sampling, "simple", PREVIEW_STEPS).to(self.device)
            self.guider.conds = {"positive": [self._encode(empty.to(self.device))[0]]}
            euler = comfy.samplers.sampler_object("euler")
            drawn = euler.sample(self.guider, sigmas, dict(self._options), None, noise, empty.to(self.device), disable_pbar=True)
            return previewer.decode_latent_to_preview_image("JPEG", drawn)


def _previewer(device: torch.device, form):
    """ComfyUI's previewer by its own setting; where that is off, the quick one: a training preview is asked for by a widget of its own."""
    found = latent_preview.get_previewer(device, form)
    if found is None and args.preview_method == LatentPreviewMethod.NoPreviews and form.latent_rgb_factors is not None:
        found = latent_preview.Latent2RGBPreviewer(form.latent_rgb_factors, form.latent_rgb_factors_bias, form.latent_rgb_factors_reshape)
    return found


class _Training(comfy.samplers.Sampler):
    """Calls `work` where ComfyUI would sample."""

    def __init__(self, work: Callable[[Session], T], pictures: Pictures, settings: Settings):
        self.work, self.pictures, self.settings = work, pictures, settings
        self.result = None

    def sample(self, model_wrap, sigmas, extra_args, callback, noise, latent_image=None, denoise_mask=None, disable_pbar=False):
        session = Session(model_wrap, self.pictures, self.settings, extra_args)
        with allowing_writes(session.blocks()):
            self.result = self.work(session)
        return latent_image


def run(model: ModelPatcher, pictures: Pictures, settings: Settings, work: Callable[[Session], T]) -> T:
    """Calls work with a `Session` on a copy of the model, and returns what it returns. However it ends, nothing of it is left in memory."""
    with torch.inference_mode(False), torch.enable_grad(), _in_training():
        own = _copy(model, settings)
        try:
            guider = comfy.samplers.CFGGuider(own)
            guider.inner_set_conds({"positive": _thawed(pictures.captions)})
            trainer, first = _Training(work, pictures, settings), pictures.latents[0]
            guider.sample(torch.zeros_like(first), first, trainer, torch.ones(2), disable_pbar=True, seed=settings.seed)
            return trainer.result
        finally:
            comfy.model_management.unload_model_and_clones(own)
            comfy.model_management.soft_empty_cache()


def _copy(model: ModelPatcher, settings: Settings) -> ModelPatcher:
    """The model from its file again, with the patches that the graph put on it, frozen."""
    if model.cached_patcher_init is None:
        raise FileRefused("The connected model was made by a node that cannot load it a second time; connect Load SVDQuant Model.")
    own = model.clone(disable_dynamic=True, force_deepcopy=True)
    if DTYPES[settings.dtype] is not None:
        own.set_model_compute_dtype(DTYPES[settings.dtype])
    elif own.model.get_dtype_inference() == torch.float16:
        raise ValueError("This model computes in fp16, in which gradients vanish; set training_dtype to bf16 or fp32.")
    own.model.requires_grad_(False)

    def load(executor, *inputs, **options):
        return executor(*inputs, **options | {"force_full_load": not settings.offloading, "force_offload": settings.offloading})
    own.add_wrapper_with_key(WrappersMP.PREPARE_SAMPLING, _KEY, load)
    return own


@contextlib.contextmanager
def _in_training():
    """ComfyUI's models avoid operations without a gradient while its flag is up."""
    before, comfy.model_management.in_training = comfy.model_management.in_training, True
    try:
        yield
    finally:
        comfy.model_management.in_training = before


def _thawed(value: T) -> T:
    """A copy whose tensors can take part in training: those that other nodes made in inference mode cannot."""
    if isinstance(value, Tensor):
        return value.clone()
    if isinstance(value, dict):
        return {name: _thawed(part) for name, part in value.items()}
    return type(value)(_thawed(part) for part in value) if type(value) in (list, tuple) else value
