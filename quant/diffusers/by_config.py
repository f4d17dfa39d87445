"""A quantized file as the model of diffusers that its metadata name: DiT, SANA, SDXL's U-Net, and
whatever else has diffusers' names.

    metadata "config": {"transformer": the config.json of the model's folder}, or that alone

A file of SDXL without one, made of a single file, is built as the published SDXL.
"""

import json
from collections.abc import Mapping
from typing import Any

import diffusers
import torch
from torch import Tensor, nn

from ..files import dit_names, pointwise, unet_names
from ..files.checkpoint import QuantizedFile
from ..files.errors import FileRefused, reading
from ..weights import linears
from ..weights.formats import weight_of
from ..weights.modules import as_module
from .dit import as_stored
from .pointwise import is_pointwise, on_channels

_UNET = "UNet2DConditionModel"
_SDXL: dict[str, Any] = dict(
    _class_name=_UNET,
    sample_size=128,
    down_block_types=["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    up_block_types=["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    block_out_channels=[320, 640, 1280],
    transformer_layers_per_block=[1, 2, 10],
    attention_head_dim=[5, 10, 20],
    cross_attention_dim=2048,
    addition_embed_type="text_time",
    addition_time_embed_dim=256,
    projection_class_embeddings_input_dim=2816,
    use_linear_projection=True,
)
"""Podell et al., 2023, arXiv:2307.01952, table 1; the names are diffusers'."""


def has_config(file: QuantizedFile) -> bool:
    """Whether a file names a model of diffusers that it can be built as."""
    return _config(file) is not None


def load_by_config(file: QuantizedFile, dtype: torch.dtype, train: bool) -> nn.Module:
    """The model; arguments as in `load_quantized`. Raises FileRefused for a file that does not fit
    its own config.
    """
    config = _config(file)
    assert config is not None  # asked by the caller
    model = _built(file, config)
    theirs, modules = _names(file, model), dict(model.named_modules())
    for name in file.layers:
        place = theirs.get(f"{name}.weight", name).rpartition(".")[0]
        if place not in modules:
            raise _misfit(file, name, "unknown")
        layer = as_module(weight_of(file, name), train)
        if is_pointwise(linears.replace(model, place, layer)):
            on_channels(layer)
    state: dict[str, Tensor] = {}
    for unit in file.units:
        if unit not in file.layers:
            for name, tensor in file.unit(unit).items():
                state[theirs.get(name, name)] = tensor.to(dtype)
    if type(model).__name__ == dit_names.CLASS_NAME:
        as_stored(json.loads(file.metadata["config"]), model, state)
    _fill(file, model, state)
    return model.eval()


def _config(file: QuantizedFile) -> dict[str, Any] | None:
    """The config of the model of diffusers that a file is, with its class."""
    if '"_class_name"' in file.metadata.get("config", ""):
        with reading(file.path, "quantize it again"):
            entries = json.loads(file.metadata["config"])
            config = entries.get("transformer", entries)
        if _class(config) is not None:
            return config
    shapes = {spec.name: tuple(spec.shape) for unit in file.units for spec in file.specs(unit)}
    wide = shapes.get("label_emb.0.0.weight", (0, 0))[-1]
    known = _SDXL["projection_class_embeddings_input_dim"]
    if wide != known or "output_blocks.8.0.in_layers.2.weight" not in shapes:
        return None
    return _SDXL | {"in_channels": shapes["input_blocks.0.0.weight"][1]}


def _class(config: Mapping[str, Any]) -> Any:
    """diffusers' class of a config, or None: a file may name models alone."""
    found = getattr(diffusers, str(config.get("_class_name")), None)
    is_model = isinstance(found, type) and issubclass(found, diffusers.ModelMixin)
    return found if is_model else None


def _built(file: QuantizedFile, config: Mapping[str, Any]) -> nn.Module:
    """The model on the meta device, but for tables that are computed and not stored."""
    given = {key: value for key, value in config.items() if not key.startswith("_")}
    given.pop("quantization_config", None)
    kind = _class(config)
    try:
        with torch.device("meta"):
            model = kind(**given)
        if any(tensor.is_meta for tensor in _computed(model).values()):
            small = kind(**given | {"num_layers": 1})  # has them, and little else
            for name, tensor in _computed(small).items():
                owner, _, buffer = name.rpartition(".")
                model.get_submodule(owner)._buffers[buffer] = tensor
    except (TypeError, ValueError, AttributeError) as error:
        raise FileRefused(
            f"{file.path.name} has a config that diffusers {diffusers.__version__} cannot build a"
            f" {kind.__name__} of ({error}); quantize it again."
        ) from error
    return model


def _computed(model: nn.Module) -> dict[str, Tensor]:
    """Buffers that no state dict has."""
    stored = model.state_dict().keys()
    return {name: tensor for name, tensor in model.named_buffers() if name not in stored}


def _names(file: QuantizedFile, model: nn.Module) -> dict[str, str]:
    """The file's name of a tensor → diffusers'."""
    names = list(model.state_dict())
    if type(model).__name__ == _UNET:
        return {ours: theirs for theirs, ours in unet_names.to_comfyui(names).items()}
    return {name: name for name in names}


def _fill(file: QuantizedFile, model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Puts the tensors that are not quantized into the model. Raises FileRefused where they are not
    all that it has, or others.
    """
    wanted = {name: tensor.shape for name, tensor in model.state_dict().items()}
    shaped = {
        name: tensor.reshape(wanted[name])
        # a convolution that was kept is a matrix in the file
        if pointwise.is_one(name) and name in wanted and tensor.numel() == wanted[name].numel()
        else tensor
        for name, tensor in state.items()
    }
    wrong = [name for name, tensor in shaped.items() if tensor.shape != wanted.get(name)]
    if wrong:
        raise _misfit(file, wrong[0], "of another shape" if wrong[0] in wanted else "unknown")
    model.load_state_dict(shaped, strict=False, assign=True)
    empty = [name for name, tensor in model.state_dict().items() if tensor.is_meta]
    if empty:
        raise _misfit(file, empty[0], "missing")


def _misfit(file: QuantizedFile, name: str, state: str) -> FileRefused:
    return file.refusal(f"does not fit its model: {name} is {state}; quantize it again")
