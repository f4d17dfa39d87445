"""A quantized file → a MODEL that is ComfyUI's own in everything but its Linear layers."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator

import comfy.sd
import torch
from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import WrappersMP

from ....quant.files.checkpoint import QuantizedFile
from ....quant.files.errors import FileRefused, reading
from ....quant.files.layer_formats import FORMATS, OPTIONAL
from ....quant.files.memory import comfyui
from ....quant.interop.opening import OpenedFiles, method_of
from ....quant.weights.delta import SIDE
from ..host import folders, progress, tensor_files
from ..host.folders import DIFFUSION_MODELS as FOLDER
from . import activations as widths
from . import layouts, lora, mlp, modulation, preparing
from .linear import NibbleOperations

MODULATION = ("vram", "ram")
DTYPES = {"default": None, "bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}

# kind of file → the node that is named after it; Load SVDQuant Model loads either
LOADERS = {"svdquant": "Load SVDQuant Model", "vq": "Load VQ Model"}

_files = OpenedFiles()


def quantized_files(kind: str | None = None) -> list[str]:
    """Names of the quantized files of a kind (a key of LOADERS; None: of any) among ComfyUI's
    diffusion models, whoever wrote them.

    Reads each file's header only once.
    """
    paths = {name: path for name in folders.names(FOLDER) if (path := folders.find(name, FOLDER))}
    methods = _files.methods(list(paths.values()))
    wanted = LOADERS if kind is None else (kind,)
    return [name for name, method in zip(paths, methods, strict=True) if method in wanted]


def opened(name: str, kind: str | None = None) -> QuantizedFile:
    """A quantized file of a kind (None: of any), from its name in ComfyUI's lists. Raises
    FileRefused with the reason, and the right node for another kind.
    """
    file = _files.open(folders.path_of(name))
    found = method_of(file.files[0].header)
    if kind not in (None, found):
        raise FileRefused(
            f"{name} was made by another method; load it with the node {LOADERS[found]}."
        )
    return file


def load(
    path: str | os.PathLike,
    verify: bool = True,
    dtype: str = "default",
    modulation_in: str = "vram",
    activations: str = "auto",
    disable_dynamic: bool = False,
) -> ModelPatcher:
    """Loads a 4-bit file, Nibble's own or a published one, as ComfyUI's model patcher.

    dtype: a key of DTYPES, what activations and 16-bit layers are computed in. modulation_in: one
        of MODULATION, where 4-bit modulation
    layers stay. activations: how many bits those of W4A4 layers get, one of `activations.CHOICES`.
    Raises FileRefused with the reason.
    """
    file = _files.open(path)
    if any(facts["format"] not in layouts.LAYOUTS for facts in file.layers.values()):
        raise FileRefused(
            f"{file.path.name} is a text encoder ({file.family}): put it into models/text_encoders"
            " and choose it in Load Quantized CLIP or CLIPLoader."
        )
    with reading(file.path, file.remedy):
        state = _mapped(file, verify) if file.stock else _read(file)
        check_finite(file, state)
    if not file.is_current():
        raise file.refusal("changed while it was read; close the program that writes it")
    options = {"custom_operations": NibbleOperations} | (
        {"dtype": DTYPES[dtype]} if DTYPES[dtype] else {}
    )
    with reading(file.path, file.remedy), _fitting(file):
        patcher = comfy.sd.load_diffusion_model_state_dict(
            packed(state, file.layers, DTYPES[dtype] or torch.bfloat16),
            model_options=options,
            metadata=dict(file.metadata) if file.stock else file.built_by,
            disable_dynamic=disable_dynamic,
        )
    if patcher is None:
        raise FileRefused(
            f"{file.path.name} holds a model that this ComfyUI does not know; update ComfyUI."
        )
    finish(patcher, file, modulation_in, activations)
    again = (os.fspath(path), False, dtype, modulation_in, activations)
    patcher.cached_patcher_init = (load, again)
    return patcher


def finish(
    patcher: ModelPatcher,
    file: QuantizedFile,
    modulation_in: str = "vram",
    activations: str = "auto",
) -> None:
    """What a model needs besides its weights once it has them; arguments as of `load`. Raises
    FileRefused for a layer that is missing, or that the model does not have.
    """
    _check_complete(patcher, file)
    widths.choose(patcher, activations)
    mlp.fuse(patcher.model.diffusion_model)
    if modulation_in == "ram":
        modulation.keep_in_ram(patcher)
    preparing.prepare(patcher)
    patcher.add_wrapper_with_key(WrappersMP.PREPARE_SAMPLING, lora.WRAPPER, lora.plan_patches)


def _mapped(file: QuantizedFile, verify: bool) -> dict[str, torch.Tensor]:
    """The tensors as ComfyUI maps them into memory, which it can drop and stream; those very bytes
    are verified.
    """
    state, _ = tensor_files.read(file.path, file.remedy)
    if verify:
        report = progress.Progress("checking")
        for done, (name, tensor) in enumerate(state.items()):
            report(done, len(state), name)
            file.check(name, tensor)
    return state


def _read(file: QuantizedFile) -> dict[str, torch.Tensor]:
    """The tensors brought into Nibble's form."""
    return dict(file.tensors(progress.Progress("reading")))


def check_finite(file: QuantizedFile, state: dict[str, torch.Tensor]) -> None:
    """Refuses a state dict whose quantized layers hold NaN or infinity beside their codes."""
    for name, settings in file.layers.items():
        keys = [f"{name}.{part}" for part in (*_parts(settings), "bias")]
        file.check_finite({key: state[key] for key in keys if key in state})


@contextlib.contextmanager
def _fitting(file: QuantizedFile) -> Iterator[None]:
    """torch's errors about shapes, as a refusal that names the first tensor that does not fit."""
    try:
        yield
    except RuntimeError as error:
        found = re.search(r"size mismatch for ([^:\s]+)", str(error))
        if found is None:
            raise
        raise file.refusal(
            f"does not fit the model that it says it is: {found[1]} has another shape there;"
            f" {file.remedy}"
        ) from error


def packed(
    state: dict[str, torch.Tensor], layers: dict[str, dict], dtype: torch.dtype
) -> dict[str, torch.Tensor]:
    """A file's tensors with each quantized layer's joined into its `X.weight`, which then has the
    shape and dtype of the 16-bit model's.

    ComfyUI's model detection, parameter count and dtype choice so see the model that was quantized.
    """
    out = dict(state)
    for name, settings in layers.items():
        parts = {
            key[len(name) + 1 :]: out.pop(key)
            for key in [f"{name}.{part}" for part in _parts(settings)]
            if key in out
        }
        out.pop(f"{name}.comfy_quant", None)
        out[f"{name}.weight"] = layouts.pack(parts, settings, dtype)
    return out


def _parts(settings: dict) -> list[str]:
    kind, side = settings["format"], [name for name, _ in SIDE.values()]
    return [*FORMATS[kind][0], *OPTIONAL.get(kind, ()), *side]


def _check_complete(patcher: ModelPatcher, file: QuantizedFile) -> None:
    """Every linear of the model must have got its weight, and every quantized layer its place."""
    named = patcher.model.diffusion_model.named_modules()
    modules = {
        name: module for name, module in named if isinstance(module, NibbleOperations.Linear)
    }
    empty = next((name for name, module in modules.items() if module.weight is None), None)
    homeless = next(
        (
            name
            for name in file.layers
            if not layouts.is_ours(getattr(modules.get(name), "weight", None))
        ),
        None,
    )
    if empty or homeless:
        what = (
            f"lacks the layer {empty}"
            if empty
            else f"has a layer that the model does not know, {homeless}"
        )
        raise file.refusal(f"{what}; {file.remedy}")


def ram_kept(patcher: ModelPatcher) -> int:
    """Bytes of modulation layers that stay in RAM."""
    return sum(layer.nbytes for layer in modulation.cpu_layers(patcher))


def vram_needed(patcher: ModelPatcher, pixels: int = 1024) -> tuple[int, int]:
    """(bytes of the weights, bytes that ComfyUI sets aside on a GPU for making one picture of
    pixels x pixels without CFG). For a model on a CPU: as on a GPU of 16-bit numbers.
    """
    model = patcher.model
    side = pixels // getattr(model.latent_format, "spacial_downscale_ratio", 8)
    on_cpu = patcher.load_device.type == "cpu"
    itemsize = 2 if on_cpu else model.get_dtype_inference().itemsize
    step = comfyui.sampling(model.memory_usage_factor, side**2, itemsize)
    return patcher.model_size(), step
