"""A CAF file on a MODEL: two heads beside its weights, put on for the length of each call of the
model and taken off again.

Which head it is, and the initial velocity that it sees, come with the call (`Request`, under KEY in
its transformer_options). A call without one, as ComfyUI's own samplers make it, gets the velocity
head.

The heads are an additional model of the clone, as ControlNets are of a prompt: ComfyUI loads,
counts, offloads and frees them. Where they do not fit beside the model they stay in RAM and are
streamed. Everything happens around `apply_model`, the same for all families, so LoRAs, ControlNet,
4-bit layers and caches put on later work inside of it.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import comfy.model_patcher
from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import WrappersMP
from torch import Tensor

from ....accel.caf.adapter import CAFAdapter, attached, check, presented_by
from ....accel.caf.coordinates import Coordinates
from ....accel.caf.heads import Model
from ....accel.caf.heads_file import ENDING, read_file
from ..host import charts, folders, keys
from ..host.prefix import forget_prefix
from ..host.progress import Progress
from .straight import coordinates_of

FOLDER = "caf"
# of the heads on a MODEL (attachment, additional model, wrapper) and of the request in a call's
# transformer_options
KEY = "nibble_caf"
# what models are asked at where there is no noise left: they know nothing of sigma = 0
LEAST_LEVEL = 1e-3
# what is not run again where only the input layer's input is wanted
_OUTER = ("wrappers", "callbacks")

folders.register(FOLDER)


@dataclass(frozen=True)
class Heads:
    """The heads on a MODEL: an adapter and the name of its file."""

    name: str
    adapter: CAFAdapter


@dataclass(frozen=True)
class Request:
    """Which head a call of the model is for: acceleration where an initial velocity (batch, …) is
    given, in the units of this call's x; else velocity.
    """

    start: Tensor | None = None

    @property
    def head(self) -> str:
        return "velocity" if self.start is None else "acceleration"


# ---- files


def files() -> list[str]:
    """Names of the CAF files in ComfyUI's folders."""
    return folders.names(FOLDER, ENDING)


def path_of(name: str) -> Path:
    """The path of a CAF file. Raises FileRefused for a name that is not there."""
    return folders.path_of(name, FOLDER)


def stamp(name: str) -> str:
    """Changes when the file does."""
    return folders.stamp(name, FOLDER)


# ---- a MODEL with heads


def load(model: ModelPatcher, name: str) -> ModelPatcher:
    """A clone of the model with the heads of a CAF file; the model itself stays as it is.

    Raises FileRefused for a file that is none, or was made for another model, ValueError for a
    model that does not lead from noise to pictures or has heads already.
    """
    coordinates_of(model.get_model_object("model_sampling"), "Load CAF Model")
    heads = model.get_attachment(KEY)
    if heads is not None:
        raise ValueError(
            f"The connected model has the heads of {heads.name} already, and only one pair fits;"
            f" connect {name} to the model before that node."
        )
    adapter = read_file(path_of(name))
    check(adapter, model.model.diffusion_model, name)
    return with_heads(model, adapter.to(model.model.get_dtype_inference()), name)


def with_heads(model: ModelPatcher, adapter: CAFAdapter, name: str) -> ModelPatcher:
    """A clone of the model with an adapter that fits it."""
    clone = model.clone()
    adapter = adapter.requires_grad_(False)
    clone.set_additional_models(
        KEY, [comfy.model_patcher.ModelPatcher(adapter, model.load_device, model.offload_device)]
    )
    clone.set_attachments(KEY, Heads(name, adapter))
    clone.add_wrapper_with_key(WrappersMP.APPLY_MODEL, KEY, AttachHead(adapter))
    return clone


def heads_of(model: ModelPatcher) -> Heads:
    """The heads on a MODEL. Raises ValueError for one without."""
    heads = model.get_attachment(KEY)
    if heads is None:
        raise ValueError(
            "The connected model has no CAF heads, which this node needs; put Load CAF Model"
            " between, or use Constant-Acceleration Sampler, which needs none."
        )
    return heads


class AttachHead:
    """An APPLY_MODEL wrapper that puts the head on which the call asks for."""

    def __init__(self, adapter: CAFAdapter):
        self.adapter = adapter

    def __call__(  # noqa: PLR0913 (apply_model's)
        self,
        executor,
        x,
        t,
        c_concat=None,
        c_crossattn=None,
        control=None,
        transformer_options={},  # noqa: B006 (comfy's own)
        **conds,
    ) -> Tensor:
        request = transformer_options.get(KEY, Request())
        options = _told_apart(transformer_options)
        network, place = executor.class_obj.diffusion_model, self.adapter.input_layer
        presented = None
        if request.start is not None:
            start = _repeated(request.start, x, len(options.get("cond_or_uncond", [0])))
            inner = {name: value for name, value in options.items() if name not in _OUTER}
            presented = presented_by(
                network,
                place,
                lambda: executor.original(start, t, c_concat, c_crossattn, None, inner, **conds),
            )
        # samplers ask for one noise level at a time
        level = coordinates_of(executor.class_obj.model_sampling).level(t[:1])
        strength = self.adapter.strength(level)
        forget_prefix(network)  # what the other head, or none, made of the prompt
        try:
            with attached(network, self.adapter.head(request.head), place, presented, strength):
                return executor(x, t, c_concat, c_crossattn, control, options, **conds)
        finally:
            forget_prefix(network)


def _told_apart(options: dict) -> dict:
    """The one call for an initial velocity is none of a run's steps: by these names of the prompts
    caches know what they may reuse.
    """
    if KEY not in options or options[KEY].start is not None or "uuids" not in options:
        return options
    return options | {"uuids": [(uuid, "velocity") for uuid in options["uuids"]]}


def _repeated(start: Tensor, x: Tensor, prompts: int) -> Tensor:
    """The initial velocity for every prompt of a batch. Raises ValueError where a prompt is for a
    part of the picture only.
    """
    if start.shape[1:] != x.shape[1:] or len(x) != prompts * len(start):
        raise ValueError(
            "CAF Sampler cannot sample the picture in parts: the model was asked for"
            f" {' x '.join(map(str, x.shape[1:]))} of {' x '.join(map(str, start.shape[1:]))}. "
            "Remove areas from the prompts, and context windows from the model."
        )
    return start.to(x).repeat(prompts, *[1] * (x.dim() - 1))


def asking(model, extra_args: dict, where: Coordinates) -> Model:
    """A guider's model as `accel/caf/heads.py` wants it, on the straight line: guidance, masks and
    prompts included.

    model: called as model(x, sigma (batch,), **extra_args) → the denoised latent, as samplers do;
        extra_args with `model_options`; where: the model's coordinates
    """

    def ask(z: Tensor, level: Tensor, start: Tensor | None) -> Tensor:
        Progress.check()
        sigma = where.sigma(level.clamp_min(LEAST_LEVEL))
        x = where.own(z, sigma)
        options = comfy.model_patcher.create_model_options_clone(extra_args["model_options"])
        call_options = options.setdefault("transformer_options", {})
        call_options[KEY] = Request(None if start is None else where.own(start, sigma))
        if start is None:
            # it has no steps before it from which to guess, and is not to be guessed from
            call_options.pop(keys.CACHING, None)
        denoised = model(x, sigma, **extra_args | {"model_options": options})
        return where.velocity(x, denoised, sigma)

    return ask


def chart(heads: Heads) -> dict:
    """A chart of kind "facts" (`charts.py`): what a file holds."""
    adapter, about = heads.adapter, heads.adapter.facts
    rank = f"rank {adapter.rank}" if adapter.rank else "whole layers"
    layers = f"{rank}, {len(adapter.velocity.names)} layers"
    summary = [
        ["heads", f"velocity and acceleration, {layers} each"],
        ["pace", f"h = {adapter.h:g}"],
        ["size", charts.size(sum(tensor.nbytes for tensor in adapter.parameters()))],
    ]
    if {"steps", "pairs"} <= about.keys():
        summary.insert(1, ["trained", f"{about['steps']} steps each on {about['pairs']} pairs"])
    return {"kind": "facts", "title": heads.name, "summary": summary}
