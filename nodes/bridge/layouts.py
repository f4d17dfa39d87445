"""Nibble's formats as ComfyUI quantized tensors: everything a 4-bit linear owns travels as one tensor.

ComfyUI streams, pins, offloads and counts only `.weight` and `.bias` of a linear; a scale or a low-rank factor kept as a
parameter of its own would stay in VRAM for ever. So codes, scales, low-rank factors and smoothing live in the `Params` of one
`comfy_kitchen` QuantizedTensor whose logical shape is (N, K): model detection and LoRA code see an ordinary weight.

Two additions to what a file holds, both only in memory:
- `proj_down`/`proj_up` of a patched weight are longer than the file's: an adapter's low-rank factors are appended to them.
- `delta`: the rest of a patch that has no low rank, dense (N, K), 16 bit.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from typing import Any

import torch
from comfy.quant_ops import QuantizedLayout, QuantizedTensor, register_layout_class

from ...quant.svdquant.weight import SVDQuantWeight, W4A16Weight

_REFUSAL = ("A 4-bit Nibble weight is made once, from the 16-bit model (SVDQuant Quantize Checkpoint); "
            "it cannot be requantized while a picture is made.")


class _LIVE:
    """`hook_seen` of the weight that a module computes with: it follows its hook instead of remembering it."""


class HookCell:
    """Where a LoRA hook's change to one weight is kept; every alias of the weight shares it (see `Params.copy_from`)."""

    def __init__(self, value: Any = None):
        self.value = value

    # torch.compile guards a weight by comparing it with a deep copy that it took
    def __deepcopy__(self, memo) -> HookCell:
        return HookCell(self.value)

    def __eq__(self, other) -> bool:
        return isinstance(other, HookCell) and self.value is other.value

    __hash__ = None


@dataclass(frozen=True)
class _Params:
    """What both formats share. `hook` is shared by aliases; `hook_seen` is what it held when this copy was taken."""

    scale: torch.Tensor
    orig_dtype: torch.dtype
    orig_shape: tuple[int, int]
    proj_down: torch.Tensor | None = None
    proj_up: torch.Tensor | None = None
    delta: torch.Tensor | None = None
    hook: HookCell | None = None
    hook_seen: Any = None

    def _tensor_fields(self) -> list[str]:
        return [f.name for f in dataclasses.fields(self) if isinstance(getattr(self, f.name), torch.Tensor)]

    def _with_tensors(self, change, **fields) -> _Params:
        return dataclasses.replace(self, **{name: change(getattr(self, name)) for name in self._tensor_fields()}, **fields)

    def to_device(self, device: torch.device) -> _Params:
        return self._with_tensors(lambda tensor: tensor.to(device=device))

    def clone(self) -> _Params:
        """Shares the tensors (a weight is never written in place) and remembers what the hook held."""
        thaw = not torch.is_inference_mode_enabled()
        seen = self.hook.value if self.hook is not None else None
        return self._with_tensors(lambda tensor: tensor.clone() if thaw and tensor.is_inference() else tensor, hook_seen=seen)

    def copy_from(self, source: _Params, non_blocking: bool = False) -> None:
        """Fills this copy's buffers from a weight of the same shapes.

        ComfyUI switches a LoRA hook on and off by copying a remembered weight over an alias of the live one. The alias shares
        the live weight's hook cell, so what the remembered weight saw of the hook reaches the live one.
        """
        for name in source._tensor_fields():
            getattr(self, name).copy_(getattr(source, name), non_blocking=non_blocking)
        if self.hook is not None and source.hook_seen is not _LIVE:
            self.hook.value = source.hook_seen


def live(weight: torch.Tensor) -> torch.nn.Parameter:
    """The parameter that a module computes with."""
    parameter = torch.nn.Parameter(weight, requires_grad=False)
    if is_ours(parameter):
        object.__setattr__(parameter._params, "hook_seen", _LIVE)
    return parameter


def with_hook(weight: QuantizedTensor, change: Any) -> QuantizedTensor:
    """A copy with codes and hook cell of its own, the cell holding `change`: ComfyUI may write its backup over it in place."""
    params = dataclasses.replace(weight._params, hook=HookCell(change))
    return QuantizedTensor(weight._qdata.clone(), weight._layout_cls, params)


class _Layout(QuantizedLayout):
    """What both layouts share: the way to and from the tensors of quant.svdquant.weight."""

    FORMAT = ""

    @classmethod
    def quantize(cls, tensor, **kwargs):
        raise NotImplementedError(_REFUSAL)

    @classmethod
    def dequantize(cls, qdata: torch.Tensor, params: _Params) -> torch.Tensor:
        """(N, K) in `orig_dtype`: the weight that raw x sees, low rank and patches included."""
        return effective_weight(cls.base(qdata, params), params).to(params.orig_dtype)

    @classmethod
    def get_plain_tensors(cls, qtensor: QuantizedTensor) -> tuple[torch.Tensor, ...]:
        params = qtensor._params
        return (qtensor._qdata, *(getattr(params, name) for name in params._tensor_fields()))

    @classmethod
    def state_dict_tensors(cls, qdata: torch.Tensor, params: _Params) -> dict[str, torch.Tensor]:
        """Suffix to `X.weight` → tensor: the file's names."""
        return {"": qdata} | {f"_{name}": getattr(params, name) for name in params._tensor_fields()}


class NibbleSVDQuantLayout(_Layout):
    """`svdquant_w4a4`: qdata int8 (N, K/2); scale (K/64, N); proj_down (K, R); proj_up (N, R); smooth_factor (K,)."""

    FORMAT = "svdquant_w4a4"

    @dataclass(frozen=True)
    class Params(_Params):
        smooth_factor: torch.Tensor | None = None
        act_unsigned: bool = False
        rotation: int = 0
        unsigned_from: int = 0

    @classmethod
    def base(cls, qdata: torch.Tensor, p: Params, bias: torch.Tensor | None = None) -> SVDQuantWeight:
        return SVDQuantWeight(qdata, p.scale, p.proj_down, p.proj_up, p.smooth_factor, bias, p.act_unsigned, p.rotation, p.unsigned_from)

    @classmethod
    def params(cls, tensors: dict[str, torch.Tensor], settings: dict, dtype: torch.dtype) -> Params:
        shape = (tensors["weight"].shape[0], tensors["weight"].shape[1] * 2)
        return cls.Params(scale=tensors["weight_scale"], orig_dtype=dtype, orig_shape=shape,
                          proj_down=tensors["weight_proj_down"], proj_up=tensors["weight_proj_up"],
                          smooth_factor=tensors["weight_smooth_factor"], delta=tensors.get("weight_delta"), hook=HookCell(),
                          act_unsigned=bool(settings.get("act_unsigned", False)), rotation=int(settings.get("rotation", 0)),
                          unsigned_from=int(settings.get("unsigned_from", 0)))

    @classmethod
    def settings(cls, p: Params) -> dict:
        extra = {"act_unsigned": p.act_unsigned, "rotation": p.rotation, "unsigned_from": p.unsigned_from}
        return {"format": cls.FORMAT, "rank": p.proj_down.shape[1]} | {name: value for name, value in extra.items() if value}


class NibbleW4A16Layout(_Layout):
    """`awq_w4a16`: qdata int8 (N, K/2) of codes 0…15; scale (K/64, N); zeros (K/64, N) or None. proj_* only hold a patch."""

    FORMAT = "awq_w4a16"

    @dataclass(frozen=True)
    class Params(_Params):
        zeros: torch.Tensor | None = None

    @classmethod
    def base(cls, qdata: torch.Tensor, p: Params, bias: torch.Tensor | None = None) -> W4A16Weight:
        return W4A16Weight(qdata, p.scale, p.zeros, bias)

    @classmethod
    def params(cls, tensors: dict[str, torch.Tensor], settings: dict, dtype: torch.dtype) -> Params:
        shape = (tensors["weight"].shape[0], tensors["weight"].shape[1] * 2)
        return cls.Params(scale=tensors["weight_scale"], zeros=tensors.get("weight_zeros"), orig_dtype=dtype, orig_shape=shape, hook=HookCell(),
                          proj_down=tensors.get("weight_proj_down"), proj_up=tensors.get("weight_proj_up"),
                          delta=tensors.get("weight_delta"))

    @classmethod
    def settings(cls, p: Params) -> dict:
        return {"format": cls.FORMAT}


LAYOUTS = {layout.FORMAT: layout for layout in (NibbleSVDQuantLayout, NibbleW4A16Layout)}

for _layout in LAYOUTS.values():  # by name: loading the pack twice in a process registers the same thing again
    register_layout_class(_layout.__name__, _layout)


def is_ours(weight: object) -> bool:
    """Whether a parameter is one of Nibble's quantized weights."""
    return isinstance(weight, QuantizedTensor) and isinstance(weight._params, _Params)


def pack(tensors: dict[str, torch.Tensor], settings: dict, dtype: torch.dtype) -> QuantizedTensor:
    """A layer's tensors under the file's short names (`weight`, `weight_scale`, …) → one tensor of logical shape (N, K).

    Raises ValueError for a format that this version does not know.
    """
    layout = LAYOUTS.get(settings.get("format"))
    if layout is None:
        raise ValueError(f"layer format {settings.get('format')!r} is not known to this version of Nibble (it knows {', '.join(LAYOUTS)})")
    return QuantizedTensor(tensors["weight"], layout.__name__, layout.params(tensors, settings, dtype))


def settings_tensor(weight: QuantizedTensor) -> torch.Tensor:
    """The layer's `comfy_quant`: its JSON as uint8 bytes."""
    return torch.tensor(list(json.dumps(weight.layout_cls.settings(weight._params)).encode()), dtype=torch.uint8)


def unpack(weight: QuantizedTensor, bias: torch.Tensor | None = None) -> SVDQuantWeight | W4A16Weight:
    """The weight as the arithmetic knows it; what a patch added outside the format stays in `weight._params`."""
    return weight.layout_cls.base(weight._qdata, weight._params, bias)


def effective_weight(base: SVDQuantWeight | W4A16Weight, params: _Params) -> torch.Tensor:
    """float32 (N, K): what raw x is multiplied by, with everything a patch added."""
    dense = base.dequantize().float()
    if isinstance(base, W4A16Weight) and params.proj_up is not None:
        dense = dense + params.proj_up.float() @ params.proj_down.float().T
    if params.delta is not None:
        dense = dense + params.delta.float()
    return dense
