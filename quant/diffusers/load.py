"""A quantized file as diffusers' FLUX.1 transformer, and back."""

import os
from collections.abc import Iterable, Mapping

import diffusers
import torch
from torch import Tensor, nn

from ..calibration import recorder
from ..files.checkpoint import QuantizedFile, open_quantized
from ..files.errors import FileRefused
from ..files.safetensors import TensorSpec
from ..files.writer import Writer, check_target, metadata_room
from ..interop.opening import open_4bit
from ..weights import linears
from ..weights.base import StoredLinear
from ..weights.formats import FORMATS, weight_of
from ..weights.fuse import join_rows
from ..weights.modules import as_module
from .by_config import has_config, load_by_config
from .names import diffusers_parts, swap_rows, to_diffusers_names, to_flux_names
from .quantizer import attach


def flux_transformer(
    state: dict[str, Tensor] | None = None, **config
) -> diffusers.FluxTransformer2DModel:
    """Builds diffusers' FLUX from its config, or from a state dict in Black Forest Labs' names
    (sizes are read off the shapes).
    """
    if state is None:
        return diffusers.FluxTransformer2DModel(**config)
    model = diffusers.FluxTransformer2DModel(**(flux_config(state) | config))
    rows = {
        name: module.out_features
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear)
    }
    model.load_state_dict(to_diffusers_names(state, rows))
    return model


def flux_config(state: Mapping, names: Iterable[str] = ()) -> dict:
    """The diffusers config of a FLUX.1 state dict in Black Forest Labs' names, from names (all of
    them, or those of `names`) and shapes.
    """
    names = list(names or state)

    def depth(kind: str) -> int:
        return 1 + max(
            (int(name.split(".")[1]) for name in names if name.startswith(f"{kind}.")), default=-1
        )

    return dict(
        patch_size=1,
        in_channels=state["img_in.weight"].shape[1],
        num_layers=depth("double_blocks"),
        num_single_layers=depth("single_blocks"),
        attention_head_dim=128,
        num_attention_heads=state["img_in.weight"].shape[0] // 128,
        joint_attention_dim=state["txt_in.weight"].shape[1],
        pooled_projection_dim=state["vector_in.in_layer.weight"].shape[1],
        guidance_embeds="guidance_in.in_layer.weight" in state,
    )


def load_quantized(
    path: str | os.PathLike, dtype: torch.dtype = torch.bfloat16, train: bool = False
) -> nn.Module:
    """A quantized FLUX.1 file, of either method or a published one, or one of DiT, SANA or SDXL, as
    diffusers' transformer or U-Net on the CPU; its layers stay quantized. It takes LoRAs (with
    peft), and `save_pretrained` writes what `from_pretrained` reads once `nibble.NibbleConfig` was
    imported.

    dtype   of the layers that the file keeps in 16 bit
    train   make the low-rank factors and biases of quantized layers parameters; codebooks and their
      scales become parameters too, but `linear_vq` has no gradient for them
    Raises FileRefused for a file that is damaged, or of another model.
    """
    file = open_4bit(path)
    with file:
        model = (load_by_config if has_config(file) else _load_flux)(file, dtype, train)
    attach(model)
    return model


def _load_flux(file: QuantizedFile, dtype: torch.dtype, train: bool) -> nn.Module:
    units = [name for name in file.units if name not in file.layers]
    kept = {spec.name: spec for name in units for spec in file.specs(name)}
    if not {"img_in.weight", "txt_in.weight", "vector_in.in_layer.weight"} <= kept.keys():
        raise FileRefused(
            f"{file.path.name} is none of the models that load into diffusers (FLUX.1, DiT, SANA,"
            " SDXL), or was not made of a folder with diffusers' config.json; load it in ComfyUI,"
            " or quantize the folder that diffusers saved."
        )
    with torch.device("meta"):
        model = diffusers.FluxTransformer2DModel(
            **flux_config(kept, [*kept, *(f"{name}.weight" for name in file.layers)])
        )
    rows = {name: recorder.outputs(linear) for name, linear in recorder.find_linears(model).items()}
    for name in file.layers:
        whole = swap_rows(name, weight_of(file, name))
        start = 0
        for part in diffusers_parts(name):
            linears.replace(model, part, as_module(whole.rows(start, start + rows[part]), train))
            start += rows[part]
    tensors = {name: tensor.to(dtype) for unit in units for name, tensor in file.unit(unit).items()}
    state = to_diffusers_names(tensors, rows)
    _, unexpected = model.load_state_dict(state, strict=False, assign=True)
    empty = [name for name, tensor in model.state_dict().items() if tensor.is_meta]
    if empty or unexpected:
        raise FileRefused(
            f"{file.path.name} does not fit FLUX.1: {(empty or unexpected)[0]} is"
            f" {'missing' if empty else 'unknown'}; quantize it again."
        )
    return model.eval()


def save_quantized(model: nn.Module, target: str | os.PathLike, origin: str | os.PathLike) -> None:
    """Writes a transformer of `load_quantized` back under ComfyUI's names, e.g. after training;
    metadata come from its origin.

    Unchanged tensors come out bit for bit. Raises FileRefused for a target that cannot be written
    or is the origin itself.
    """
    check_target(origin, target)
    file = open_quantized(origin)
    modules = dict(model.named_modules())
    units: dict[str, dict[str, Tensor]] = {}
    for name, facts in file.layers.items():
        pieces = [modules[part].quantized() for part in diffusers_parts(name)]
        whole = (
            join_rows(pieces) if facts.get("smooth_rows") else FORMATS[facts["format"]].cat(pieces)
        )
        units[name] = swap_rows(name, whole).tensors(name)
    kept = to_flux_names(
        {
            name: tensor
            for name, tensor in model.state_dict().items()
            if not _is_quantized(name, modules)
        }
    )
    for name, tensor in kept.items():
        name = name if name in file.header.tensors else name.removesuffix("scale") + "weight"
        units[name] = {name: tensor.to(file.header.tensors[name].dtype)}
    specs = [
        TensorSpec(name, tensor.dtype, tuple(tensor.shape))
        for unit in units.values()
        for name, tensor in unit.items()
    ]
    metadata = {key: value for key, value in file.metadata.items() if key != "checksums"}
    # never gone on with: the model may have changed since
    with Writer(target, specs, identity=None, room=metadata_room(metadata)) as writer:
        for unit, tensors in units.items():
            writer.write(unit, tensors, {})
        writer.finish([metadata])


def _is_quantized(name: str, modules: Mapping[str, nn.Module]) -> bool:
    """Whether a tensor of a state dict belongs to a quantized linear."""
    parts = name.split(".")
    owners = (".".join(parts[:i]) for i in range(1, len(parts)))
    return any(isinstance(modules.get(owner), StoredLinear) for owner in owners)
