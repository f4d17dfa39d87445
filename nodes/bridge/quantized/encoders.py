"""Text encoders of low bits, in ComfyUI's own loaders (*CLIPLoader*, *DualCLIPLoader*, those of
other packs) and in ours.

ComfyUI builds its own encoder and gives it the file's tensors; in between, the layers that are in a
format of Nibble's are swapped for Nibble's Linear:

    ComfyUI                              encoders.py
    SDClipModel.transformer = T5(…) ───► watch: torch's hook, as one module joins another
    transformer.load_state_dict(file) ─► swap: each such layer's tensors become one weight

No function of ComfyUI's is replaced, and there is no table of encoders that one could be added to.
Layers in ComfyUI's own formats (`int8_tensorwise` of the tables) are left to it; the few encoders
that it does not look for such layers in get them in 16 bit.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import comfy.ops
import comfy.sd
import comfy.sd1_clip
import comfy.utils
import folder_paths
import torch
from torch.nn.modules.module import register_module_module_registration_hook

from ....quant.files import universal_plan
from ....quant.files.errors import FileRefused, reading
from ....quant.files.safetensors import read_header
from ....quant.files.text_encoders import family_of
from ....quant.interop.identify import identify
from ....quant.interop.in_memory import StateDictModel
from ....quant.interop.opening import OpenedFiles
from ....quant.weights.base import tensor_json
from ..host import charts, folders, progress, tensor_files
from . import layouts, loading
from .linear import NibbleOperations

FOLDER = "text_encoders"
TYPES = ("auto", *(kind.name.lower() for kind in comfy.sd.CLIPType))
_ROWS8 = "int8_tensorwise"
# CLIP, by the key that ComfyUI tells it by, the largest first
_CLIP = {
    "CLIP-G": "text_model.encoder.layers.30.mlp.fc1.weight",
    "CLIP-H": "text_model.encoder.layers.22.mlp.fc1.weight",
    "CLIP-L": "text_model.encoder.layers.0.mlp.fc1.weight",
}
# what two encoders together are used for most
_TOGETHER = {
    frozenset({"CLIP-L", "CLIP-G"}): "sdxl",
    frozenset({"CLIP-L", "T5-XXL"}): "flux",
    frozenset({"CLIP-G", "T5-XXL"}): "sd3",
    frozenset({"CLIP-L", "Llama 3.1 8B"}): "hunyuan_video",
    frozenset({"T5-XXL", "Llama 3.1 8B"}): "hidream",
    frozenset({"CLIP-L", "Qwen2.5-VL 7B"}): "kandinsky5",
    frozenset({"T5", "Qwen2.5-VL 7B"}): "hunyuan_image",
    frozenset({"Gemma 3 4B", "Jina CLIP v2"}): "newbie",
    frozenset({"Qwen3 0.6B", "Qwen3 2B"}): "ace",
    frozenset({"Qwen3 0.6B", "Qwen3 4B"}): "ace",
}
_BEYOND_TWO = {3: "sd3", 4: "hidream"}

_OTHERS = ("diffusion_models", "checkpoints", "vae", "loras", "controlnet")

_files = OpenedFiles()
_watching: list[Any] = []  # the handle of torch's hook


# ---- in ComfyUI's own loaders


def register() -> None:
    """Has every text encoder that ComfyUI builds from now on take files of Nibble's."""
    while _watching:
        _watching.pop().remove()
    _watching.append(register_module_module_registration_hook(_watch))


def _watch(module: torch.nn.Module, name: str, part: torch.nn.Module | None) -> None:
    if name == "transformer" and isinstance(module, comfy.sd1_clip.SDClipModel):
        part.register_load_state_dict_pre_hook(_swap)


def _swap(model: torch.nn.Module, state: dict[str, torch.Tensor], prefix: str, *_) -> None:
    """Before an encoder gets its tensors. Raises FileRefused for a damaged layer."""
    formats = _formats(state, prefix)
    modules = dict(model.named_modules())
    ours = {name for name, kind in formats.items() if kind in layouts.LAYOUTS and name in modules}
    for name in ours:
        _replace(model, name, _linear_like(modules[name]))
    if ours:
        dtype = next(model.get_submodule(name).weight_comfy_model_dtype for name in ours)
        _pack(state, prefix, ours, dtype)
    for name, kind in formats.items():
        if kind != _ROWS8 or name not in modules:
            continue
        if _reads_formats(modules[name]):
            _let_read_back(modules[name], state, f"{prefix}{name}")
        else:
            _in_16_bit(state, f"{prefix}{name}")


def _formats(state: Mapping[str, torch.Tensor], prefix: str) -> dict[str, str]:
    """Layer → its format."""
    found = {}
    for key, text in state.items():
        if key.startswith(prefix) and key.endswith(".comfy_quant"):
            name = key.removeprefix(prefix).removesuffix(".comfy_quant")
            try:
                found[name] = str(tensor_json(text).get("format"))
            except ValueError as error:
                raise FileRefused(
                    f"The text encoder has a layer whose JSON cannot be read, {name}; copy or"
                    " download its file again."
                ) from error
    return found


def _linear_like(module: torch.nn.Module) -> torch.nn.Module:
    """Nibble's Linear in place of one of ComfyUI's."""
    made = getattr(module, "factory_kwargs", None) or {
        "device": module.weight.device,
        "dtype": module.weight_comfy_model_dtype,
    }
    bias = module.bias is not None
    linear = NibbleOperations.Linear(module.in_features, module.out_features, bias, **made)
    return linear.train(module.training)


def _replace(model: torch.nn.Module, name: str, part: torch.nn.Module) -> None:
    parent, _, last = name.rpartition(".")
    setattr(model.get_submodule(parent), last, part)


def _pack(
    state: dict[str, torch.Tensor], prefix: str, names: set[str], dtype: torch.dtype | None
) -> None:
    """Joins each layer's tensors into its weight."""
    # under a name that no prefix of a diffusion model's file begins with
    found = {
        f"encoder.{key.removeprefix(prefix)}": key
        for key in state
        if key.removeprefix(prefix).rpartition(".")[0] in names
    }
    file = StateDictModel({name: state[key] for name, key in found.items()})
    tensors = dict(file.tensors())
    loading.check_finite(file, tensors)
    for key in found.values():
        del state[key]
    for name, tensor in loading.packed(tensors, file.layers, dtype or torch.bfloat16).items():
        state[prefix + name.removeprefix("encoder.")] = tensor


def _reads_formats(module: torch.nn.Module) -> bool:
    """Whether a module is of ComfyUI's operations that read quantized layers."""
    return type(module)._load_from_state_dict.__qualname__.startswith(
        comfy.ops.mixed_precision_ops.__name__
    )


def _let_read_back(module: torch.nn.Module, state: dict[str, torch.Tensor], name: str) -> None:
    """Gives a module of ComfyUI's own what its state dict names besides the weight: a LoRA hook
    reads every name back as an attribute (ModelPatcher.get_key_patches).
    """
    for part in ("weight_scale", "comfy_quant"):
        setattr(module, part, state[f"{name}.{part}"])


def _in_16_bit(state: dict[str, torch.Tensor], name: str) -> None:
    del state[f"{name}.comfy_quant"]
    scale = state.pop(f"{name}.weight_scale")
    state[f"{name}.weight"] = (state[f"{name}.weight"] * scale).bfloat16()


# ---- in ours


def quantized_files() -> list[str]:
    """Names of Nibble's files among ComfyUI's text encoders."""
    paths = {name: path for name in folders.names(FOLDER) if (path := folders.find(name, FOLDER))}
    methods = _files.methods(list(paths.values()))
    return [name for name, method in zip(paths, methods, strict=True) if method is not None]


def encoder_of(path: Path) -> str | None:
    """Which encoder a file holds, quantized or not; None for one that nobody here knows."""
    shapes = {name: info.shape for name, info in read_header(path).tensors.items()}
    family = family_of(shapes)
    if family is not None:
        return family.name
    return next((name for name, key in _CLIP.items() if key in shapes), None)


def type_of(paths: list[Path]) -> str:
    """The type of CLIPLoader and its like that these encoders are used with most. Raises
    FileRefused where there are several, and what they are for cannot be told.
    """
    encoders = [encoder_of(path) for path in paths]
    if len(paths) in _BEYOND_TWO:
        return _BEYOND_TWO[len(paths)]
    if len(paths) == 2:
        kind = _TOGETHER.get(frozenset(name for name in encoders if name))
        if kind is None and "Gemma 3 12B" in encoders:
            kind = "ltxv"  # beside its connectors
        if kind is None:
            known = " and ".join(name or "an unknown file" for name in encoders)
            raise FileRefused(
                f"{paths[0].name} and {paths[1].name} ({known}) can be for several models; choose"
                " the type."
            )
        return kind
    shapes = {name: info.shape for name, info in read_header(paths[0]).tensors.items()}
    family = family_of(shapes)
    return "stable_diffusion" if family is None else family.loaded_as


def load(
    names: list[str], kind: str = "auto", device: str = "default", verify: bool = True
) -> tuple[comfy.sd.CLIP, str]:
    """(ComfyUI's CLIP, its type) of one to four files by their names in its lists, of which any may
    be Nibble's. kind: one of TYPES; device: "default" or "cpu". Raises FileRefused.
    """
    paths = [folders.path_of(name, FOLDER) for name in names]
    if len(paths) == 1:  # beside another, a part of a model may be what an encoder is connected by
        _refuse_other_models(paths[0])
    kind = type_of(paths) if kind == "auto" else kind
    options: dict[str, Any] = {}
    if device == "cpu":
        options["load_device"] = options["offload_device"] = torch.device("cpu")
    clip_type = comfy.sd.CLIPType[kind.upper()]
    embeddings = folder_paths.get_folder_paths("embeddings")
    clip = comfy.sd.load_text_encoder_state_dicts(
        [_state(path, verify) for path in paths],
        embedding_directory=embeddings,
        clip_type=clip_type,
        model_options=options,
    )
    again = ([str(path) for path in paths], embeddings, clip_type, options)
    clip.patcher.cached_patcher_init = (comfy.sd.load_clip_model_patcher, again)
    return clip, kind


def _refuse_other_models(path: Path) -> None:
    """Raises FileRefused for a model that is known and no encoder: where ComfyUI finds no encoder's
    names it builds CLIP-L, of random weights. A guess does not count.
    """
    if encoder_of(path) is not None:
        return
    kind = identify(path)
    if kind.folder in _OTHERS and universal_plan.NAME not in kind.what:
        raise FileRefused(
            f"{path.name} is {kind.what} and no text encoder: it belongs in models/{kind.folder},"
            f" opened by {kind.opens}."
        )


def of_prompts(lines: list[list[str]]) -> list[list[str]]:
    """Lines of a report as an encoder's: its layers are measured on prompts, and what their errors
    mean for pictures is not known.
    """
    return [
        [label, words.replace("on pictures", "on prompts")]
        for label, words in lines
        if label != "pictures"
    ]


def chart(names: list[str], kind: str, clip: comfy.sd.CLIP) -> dict:
    """Facts about loaded encoders: VRAM, what each file is, the errors that its report tells."""
    summary = [["VRAM", f"{charts.size(clip.patcher.model_size())} of weights"], ["type", kind]]
    for name in names:
        path = folders.path_of(name, FOLDER)
        words = charts.size(path.stat().st_size)
        if read_header(path).metadata.get("format") == "nibble":
            file = _files.open(path)
            four = sum(layer["format"] != _ROWS8 for layer in file.layers.values())
            words += f", {four} layers of 4-bit weights, {len(file.layers) - four} of 8-bit rows"
            summary += of_prompts(charts.error_lines(file))
        summary.append([encoder_of(path) or "encoder", f"{name}: {words}"])
    return {"kind": "facts", "title": names[0], "summary": summary}


def _state(path: Path, verify: bool) -> dict[str, torch.Tensor]:
    """A file's tensors as ComfyUI reads them, one of Nibble's compared with its checksums."""
    state, metadata = tensor_files.read(path)
    if verify and (metadata or {}).get("format") == "nibble":
        file = _files.open(path)
        report = progress.Progress("checking")
        for done, (name, tensor) in enumerate(state.items()):
            report(done, len(state), name)
            file.check(name, tensor)
    with reading(path):
        return comfy.utils.convert_old_quants(state, model_prefix="", metadata=metadata)[0]
