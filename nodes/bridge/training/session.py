"""Training something small beside a MODEL's frozen weights, inside ComfyUI's own sampling.

The training is a `Sampler`: ComfyUI itself loads the model, encodes the conditioning and calls the
model, so that whatever it can sample can be trained on.

The MODEL that came in is never touched: its file is loaded once more (most of it is the same pages
of memory), outside of inference mode, and that copy is trained beside and thrown away.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import comfy.model_management
import comfy.sampler_helpers
import comfy.samplers
import torch
from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import WrappersMP
from torch import Tensor
from torch.utils._pytree import tree_map_only

from ....quant.files.errors import FileRefused
from ....quant.training.recompute import allowing_writes
from ..host.prefix import forget_prefix
from ..host.samplers import in_training, previewer

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32, "none": None}
MOST_ENCODED = 64  # prompts whose encoded form is kept: 4 MB each for FLUX
# keys of a prompt for part of a call
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
# of torch's errors where a model computes something without a gradient, or writes over it
_NO_GRADIENT = (
    "no autograd formula",
    "support automatic differentiation",
    "modified by an inplace operation",
)
_KEY = "nibble_training"  # key of the wrapper on the copy of the model
T = TypeVar("T")


@dataclass(frozen=True)
class Settings:
    """batch: pictures a step
    loss: a key of `dataset.LOSSES`, or of CAF's `objectives.DISTANCES`
    dtype: a key of DTYPES, what the model computes in
    checkpointing: compute blocks twice and keep less
    offloading: keep weights in RAM and stream them
    seed: that of previews (the training's own comes with each generator)
    """

    batch: int = 1
    loss: str = "MSE"
    dtype: str = "bf16"
    checkpointing: bool = True
    offloading: bool = False
    seed: int = 0


def blocks_of(model: torch.nn.Module) -> dict[str, torch.nn.Module]:
    """Name → each entry of a diffusion model's lists of blocks; of a model that has none of its
    own (HiDream-O1, Stable Audio), of its parts'.
    """
    modules = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.ModuleList)
    }
    lists = {name: module for name, module in modules.items() if "." not in name}
    if not lists:
        inside = tuple(f"{name}." for name in modules)
        lists = {name: module for name, module in modules.items() if not name.startswith(inside)}
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
        self.guider = guider
        self.captions = captions
        self.settings = settings
        self._options = options
        self.inner = guider.inner_model
        self.device: torch.device = guider.model_patcher.load_device
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
        forget_prefix(self.model)  # its gradient is spent, and the weights have moved
        return self.guider(noisy, sigmas, **self._options)

    def groups(self, captions: Sequence[int], latent: Tensor) -> list[list[int]]:
        """Places in `captions`, in groups that can go through the model together: prompts that are
        encoded to tensors of the same shapes.
        """
        groups: dict[object, list[int]] = {}
        for place, caption in enumerate(captions):
            form = _form(self._encode(caption, latent), caption)
            groups.setdefault(form, []).append(place)
        return list(groups.values())

    def prompt(self, captions: Sequence[int], latent: Tensor) -> dict:
        """What the model takes as the prompt of latents of this shape: one for all, or a row for
        each caption.
        """
        rows = captions if len(set(captions)) > 1 else captions[:1]
        entries = [self._encode(caption, latent) for caption in rows]
        first, *others = (entry["model_conds"] for entry in entries)
        if not others:
            return dict(entries[0])
        conds = {
            name: type(cond)(cond.concat([other[name] for other in others]))
            for name, cond in first.items()
        }
        return entries[0] | {"model_conds": conds}

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
        forget_prefix(self.model)
        euler = comfy.samplers.sampler_object("euler")
        return euler.sample(
            self.guider, sigmas, dict(self._options), None, noise, empty, disable_pbar=True
        )

    def preview(self, draw: Callable[[], Tensor]) -> tuple | None:
        """What `draw` returns, a latent, as ComfyUI's (format, picture, largest side); None where
        this model has no preview.
        """
        chosen = previewer(self.device, self.inner.latent_format)
        if chosen is None:
            return None
        with torch.no_grad():
            return chosen.decode_latent_to_preview_image("JPEG", draw())


def _form(entry: dict, caption: int) -> object:
    """Equal for conditionings that can be rows of one; the caption where it can only go on
    its own.
    """
    if _ALONE & entry.keys():
        return caption
    conds = {name: (type(cond), cond.cond) for name, cond in entry["model_conds"].items()}
    if not all(_fits_one_row(value) for _, value in conds.values()):
        return caption
    return tuple(
        (name, kind, value.shape if isinstance(value, Tensor) else value)
        for name, (kind, value) in sorted(conds.items())
    )


def _fits_one_row(value: object) -> bool:
    """Whether a model's condition is of one sample, or the same for all."""
    if isinstance(value, Tensor) and value.ndim:
        return len(value) == 1
    return value is None or isinstance(value, (bool, int, float, str))


class _Training(comfy.samplers.Sampler):
    """Calls `work` where ComfyUI would sample."""

    def __init__(self, work: Callable[[Session], T], captions: Sequence[list], settings: Settings):
        self.work = work
        self.captions = captions
        self.settings = settings
        self.result: T | None = None

    def sample(  # noqa: PLR0913 (ComfyUI's)
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
            if not any(words in str(error) for words in _NO_GRADIENT):
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


def _thawed(tree: T) -> T:
    """A copy whose tensors can take part in training: those that other nodes made in inference mode
    cannot.
    """
    return tree_map_only(Tensor, Tensor.clone, tree)
