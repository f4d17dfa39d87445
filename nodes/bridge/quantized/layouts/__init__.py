"""Nibble's formats as ComfyUI quantized tensors: everything a low-bit linear owns travels as one
tensor.

tensor.py         the tensor and its parameters, and a LoRA hook's place in them
base.py           what every format does alike
svdquant_w4a4.py  4-bit weights and activations
svdquant_w4a8.py  4-bit weights read as int8, 8-bit activations
svdquant_nvfp4.py 4-bit floats
awq_w4a16.py      4-bit weights, 16-bit activations
vq.py             codewords

ComfyUI streams, pins, offloads and counts only `.weight` and `.bias` of a linear; a scale or a
low-rank factor kept as a parameter of its own would stay in VRAM for ever. So codes, scales,
low-rank factors and smoothing live in the `Params` of one `comfy_kitchen` QuantizedTensor whose
logical shape is (N, K): model detection and LoRA code see an ordinary weight.

Additions to what a file holds, only in memory, of a patched weight:
- `proj_down`/`proj_up` are longer than the file's: an adapter's low-rank factors are appended to
  them.
- `LayoutParams.side`, a WeightDelta in five fields (ComfyUI streams only fields that are tensors):
  `delta`, dense, for a patch that has no low rank; `row_scale` of a DoRA, float32, with its
  factors, which are not to be scaled, in `side_down` and `side_up`, and `row_fold`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from comfy.quant_ops import QuantizedTensor, register_layout_class

from .....quant.files.architectures import whole_groups
from .....quant.weights.base import StoredWeight, json_tensor
from .....quant.weights.delta import WeightDelta
from .awq_w4a16 import NibbleW4A16Layout
from .base import Layout
from .svdquant_nvfp4 import NibbleNVFP4Layout
from .svdquant_w4a4 import NibbleSVDQuantLayout
from .svdquant_w4a8 import NibbleW4A8Layout
from .tensor import DIVIDED, HookCell, HookSeen, LayoutParams, NibbleTensor, Tensors
from .vq import NibbleVQLayout

__all__ = [
    "LAYOUTS",
    "Layout",
    "NibbleTensor",
    "as_stored",
    "check_whole",
    "effective_weight",
    "format_of",
    "hooked_by",
    "is_ours",
    "is_padded",
    "linear",
    "live",
    "of_inputs",
    "pack",
    "settings_tensor",
    "stored_tensors",
    "unpack",
    "with_fields",
    "with_hook",
]

LAYOUTS = {
    layout.FORMAT: layout
    for layout in (
        NibbleSVDQuantLayout,
        NibbleW4A8Layout,
        NibbleNVFP4Layout,
        NibbleW4A16Layout,
        NibbleVQLayout,
    )
}

# by name: loading the pack twice in a process registers the same thing again
for _layout in LAYOUTS.values():
    register_layout_class(_layout.__name__, _layout)


def is_ours(weight: object) -> bool:
    """Whether a parameter is one of Nibble's quantized weights."""
    return isinstance(weight, QuantizedTensor) and isinstance(weight.params, LayoutParams)


def check_whole(weight: torch.Tensor) -> None:
    """Raises ValueError for a weight that torch has distributed over devices (a DTensor)."""
    if hasattr(weight, "device_mesh"):
        raise ValueError(DIVIDED)


def format_of(weight: object) -> str | None:
    """The format's name, None for a weight that is not one of ours."""
    return weight.layout_cls.FORMAT if is_ours(weight) else None


def pack(tensors: Tensors, settings: dict, dtype: torch.dtype) -> NibbleTensor:
    """A layer's tensors under the file's short names (`weight`, `weight_scale`, …) → one tensor of
    logical shape (N, K).

    Raises ValueError for a format that this version does not know.
    """
    layout = LAYOUTS.get(settings.get("format"))
    if layout is None:
        raise ValueError(
            f"layer format {settings.get('format')!r} is not known to this version of Nibble (it"
            f" knows {', '.join(LAYOUTS)})"
        )
    params = layout.read(tensors, settings, dtype)
    return NibbleTensor(tensors["weight"], layout.__name__, params)


def unpack(weight: QuantizedTensor, bias: torch.Tensor | None = None) -> StoredWeight:
    """The weight as the arithmetic knows it; what a patch added outside the format stays in
    `weight.params.side`.
    """
    return weight.layout_cls.stored(weight._qdata, weight.params, bias)


def effective_weight(weight: QuantizedTensor) -> torch.Tensor:
    """float32 (N, K): what raw x is multiplied by, with everything a patch added."""
    whole = weight.params.side.on_weight(unpack(weight).dequantize().float())
    return whole[:, : weight.shape[1]]


def of_inputs(weight: QuantizedTensor, k: int) -> QuantizedTensor:
    """The weight of a linear of K inputs, whose file may have zeros behind them up to whole groups:
    as logical shape (N, K). Any other is returned as it is.
    """
    if weight.shape[1] == k or whole_groups(k) != weight.layout_cls.stored_inputs(weight):
        return weight
    return with_fields(weight, orig_shape=(weight.shape[0], k))


def is_padded(weight: QuantizedTensor) -> bool:
    """Whether the matrix in the file has more columns than its linear has inputs."""
    return weight.layout_cls.stored_inputs(weight) != weight.shape[1]


def as_stored(weight: QuantizedTensor, change: WeightDelta) -> WeightDelta:
    """A change of the weight (N, K) as its own tensors take it."""
    if not is_padded(weight):
        return change
    return change.for_inputs(weight.layout_cls.stored_inputs(weight))


def linear(
    x: torch.Tensor,
    weight: QuantizedTensor,
    bias: torch.Tensor | None,
    changes: Sequence[WeightDelta] = (),
) -> torch.Tensor:
    """`Layout.linear` of the weight's own format."""
    return weight.layout_cls.linear(x, weight, bias, changes)


def stored_tensors(weight: QuantizedTensor, prefix: str) -> Tensors:
    """The weight's tensors under the file's names, `prefix` being that of X.weight; what patches
    put beside it among them.
    """
    named = weight.layout_cls.state_dict_tensors(weight._qdata, weight.params)
    return {f"{prefix}{suffix}": tensor for suffix, tensor in named.items()}


def settings_tensor(weight: QuantizedTensor) -> torch.Tensor:
    """The layer's `comfy_quant`: its JSON as uint8 bytes."""
    return json_tensor(weight.layout_cls.settings(weight.params))


def live(weight: torch.Tensor) -> torch.nn.Parameter:
    """The parameter that a module computes with."""
    parameter = torch.nn.Parameter(weight, requires_grad=False)
    if is_ours(parameter):
        parameter._params = dataclasses.replace(parameter.params, hook_seen=HookSeen.LIVE)
    return parameter


def with_fields(
    weight: QuantizedTensor, **fields: torch.Tensor | int | tuple | None
) -> NibbleTensor:
    """The weight with other tensors or options beside the same codes, and a hook cell of its
    own.
    """
    params = dataclasses.replace(weight.params, hook=HookCell(), hook_seen=None, **fields)
    return NibbleTensor(weight._qdata, weight._layout_cls, params)


def with_hook(weight: QuantizedTensor, change: WeightDelta | None) -> NibbleTensor:
    """A copy with codes and hook cell of its own, the cell holding `change`: ComfyUI may write its
    backup over it in place.
    """
    change = None if change is None else as_stored(weight, change)
    params = dataclasses.replace(weight.params, hook=HookCell(change))
    return NibbleTensor(weight._qdata.clone(), weight._layout_cls, params)


def hooked_by(weight: QuantizedTensor, change: WeightDelta | None) -> NibbleTensor:
    """The weight as a hook that makes this change shows it, whatever hook is on now; the same
    tensors.
    """
    change = None if change is None else as_stored(weight, change)
    params = dataclasses.replace(weight.params, hook=HookCell(change))
    return NibbleTensor(weight._qdata, weight._layout_cls, params)
