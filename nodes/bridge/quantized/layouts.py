"""Nibble's formats as ComfyUI quantized tensors: everything a 4-bit linear owns travels as one
tensor.

ComfyUI streams, pins, offloads and counts only `.weight` and `.bias` of a linear; a scale or a
low-rank factor kept as a parameter of its own would stay in VRAM for ever. So codes, scales,
low-rank factors and smoothing live in the `Params` of one `comfy_kitchen` QuantizedTensor whose
logical shape is (N, K): model detection and LoRA code see an ordinary weight.

Additions to what a file holds, only in memory, of a patched weight:
- `proj_down`/`proj_up` are longer than the file's: an adapter's low-rank factors are appended to
  them.
- `delta`: the rest of a patch that has no low rank, dense (N, K), 16 bit.
- `row_scale` ρ (N,), float32: a DoRA multiplies the rows of the weight; then its factors, which are
  not to be multiplied, are in `side_down` (K, r) and `side_up` (N, r), and `row_fold` (N,) is what
  unsigned activations folded into the bias, or None.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from typing import Any

import torch
from comfy.quant_ops import QuantizedLayout, QuantizedTensor, register_layout_class

from ....quant.weights.svdquant_w4a4 import (
    SVDQuantWeight,
    W4A16Weight,
    halves_first,
    natural_columns,
)

_REFUSAL = (
    "A 4-bit Nibble weight is made once, from the 16-bit model (SVDQuant Quantize Checkpoint); "
    "it cannot be requantized while sampling."
)


class _LIVE:
    """`hook_seen` of the weight that a module computes with: it follows its hook instead of
    remembering it.
    """


class HookCell:
    """Where a LoRA hook's change to one weight is kept; every alias of the weight shares it (see
    `Params.copy_from`).
    """

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
    """What both formats share. `hook` is shared by aliases; `hook_seen` is what it held when this
    copy was taken.
    """

    scale: torch.Tensor
    orig_dtype: torch.dtype
    orig_shape: tuple[int, int]
    proj_down: torch.Tensor | None = None
    proj_up: torch.Tensor | None = None
    delta: torch.Tensor | None = None
    row_scale: torch.Tensor | None = None
    row_fold: torch.Tensor | None = None
    side_down: torch.Tensor | None = None
    side_up: torch.Tensor | None = None
    hook: HookCell | None = None
    hook_seen: Any = None

    def _tensor_fields(self) -> list[str]:
        return [
            f.name
            for f in dataclasses.fields(self)
            if isinstance(getattr(self, f.name), torch.Tensor)
        ]

    def _with_tensors(self, change, **fields) -> _Params:
        return dataclasses.replace(
            self, **{name: change(getattr(self, name)) for name in self._tensor_fields()}, **fields
        )

    def to_device(self, device: torch.device) -> _Params:
        return self._with_tensors(lambda tensor: tensor.to(device=device))

    def clone(self) -> _Params:
        """Shares the tensors (a weight is never written in place) and remembers what the
        hook held.
        """
        thaw = not torch.is_inference_mode_enabled()
        seen = self.hook.value if self.hook is not None else None
        return self._with_tensors(
            lambda tensor: tensor.clone() if thaw and tensor.is_inference() else tensor,
            hook_seen=seen,
        )

    def copy_from(self, source: _Params, non_blocking: bool = False) -> None:
        """Fills this copy's buffers from a weight of the same shapes.

        ComfyUI switches a LoRA hook on and off by copying a remembered weight over an alias of the
        live one. The alias shares the live weight's hook cell, so what the remembered weight saw of
        the hook reaches the live one.
        """
        for name in source._tensor_fields():
            getattr(self, name).copy_(getattr(source, name), non_blocking=non_blocking)
        if self.hook is not None and source.hook_seen is not _LIVE:
            self.hook.value = source.hook_seen


class NibbleTensor(QuantizedTensor):
    """ComfyUI's quantized tensor, whose `to(…, copy=True)` copies in inference mode, too.

    There torch hands `to` over undivided, and comfy_kitchen's answer to it forgets `copy`: the
    backup that ComfyUI takes of a weight before it puts a hook on would be the very weight that the
    hook changes, and the hook would never come off.
    """

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        out = super().__torch_dispatch__(func, types, args, kwargs)
        copy = (kwargs or {}).get("copy", args[3] if len(args) > 3 else False)
        if func in _TO and out is args[0] and copy:
            return out._copy_with(qdata=out._qdata.clone())
        return out

    def _copy_with(self, qdata=None, params=None, clone_params=True) -> NibbleTensor:
        return _ours(super()._copy_with(qdata, params, clone_params))

    @staticmethod
    def __tensor_unflatten__(inner_tensors, ctx, outer_size, outer_stride) -> NibbleTensor:
        return _ours(
            QuantizedTensor.__tensor_unflatten__(inner_tensors, ctx, outer_size, outer_stride)
        )


_TO = (torch.ops.aten.to.dtype_layout, torch.ops.aten.to.dtype)


def _ours(tensor: QuantizedTensor) -> NibbleTensor:
    return NibbleTensor(tensor._qdata, tensor._layout_cls, tensor._params)


def _patched_fields(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor | None]:
    """What a patch added to a weight, out of a state dict's tensors by their short names."""
    return {
        name: tensors.get(f"weight_{name}")
        for name in ("delta", "row_scale", "row_fold", "side_down", "side_up")
    }


def live(weight: torch.Tensor) -> torch.nn.Parameter:
    """The parameter that a module computes with."""
    parameter = torch.nn.Parameter(weight, requires_grad=False)
    if is_ours(parameter):
        object.__setattr__(parameter._params, "hook_seen", _LIVE)
    return parameter


def with_hook(weight: QuantizedTensor, change: Any) -> NibbleTensor:
    """A copy with codes and hook cell of its own, the cell holding `change`: ComfyUI may write its
    backup over it in place.
    """
    params = dataclasses.replace(weight._params, hook=HookCell(change))
    return NibbleTensor(weight._qdata.clone(), weight._layout_cls, params)


class _Layout(QuantizedLayout):
    """What both layouts share: the way to and from the tensors of quant.svdquant.weight."""

    FORMAT = ""

    @classmethod
    def pack(cls, qdata: torch.Tensor, params: _Params) -> torch.Tensor:
        """The file's codes as they are kept in memory; shape and dtype stay."""
        return qdata

    @classmethod
    def natural(cls, qdata: torch.Tensor, params: _Params) -> torch.Tensor:
        """The inverse of `pack`."""
        return qdata

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
        return {"": cls.natural(qdata, params)} | {
            f"_{name}": getattr(params, name) for name in params._tensor_fields()
        }


class NibbleSVDQuantLayout(_Layout):
    """`svdquant_w4a4`: qdata int8 (N, K/2); scale (K/64, N); proj_down (K, R); proj_up (N, R);
    smooth_factor (K,), or (P, K) for P runs of rows.

    With unsigned_from the codes lie in memory as `halves_first` puts them, so that computing with
    the two halves copies nothing.
    """

    FORMAT = "svdquant_w4a4"

    @dataclass(frozen=True)
    class Params(_Params):
        smooth_factor: torch.Tensor | None = None
        act_unsigned: bool = False
        rotation: int = 0
        unsigned_from: int = 0
        smooth_rows: tuple[int, ...] = ()

    @classmethod
    def pack(cls, qdata: torch.Tensor, p: Params) -> torch.Tensor:
        return halves_first(qdata, p.unsigned_from) if p.unsigned_from else qdata

    @classmethod
    def natural(cls, qdata: torch.Tensor, p: Params) -> torch.Tensor:
        return natural_columns(qdata, p.unsigned_from) if p.unsigned_from else qdata

    @classmethod
    def base(
        cls, qdata: torch.Tensor, p: Params, bias: torch.Tensor | None = None
    ) -> SVDQuantWeight:
        return SVDQuantWeight(
            cls.natural(qdata, p),
            p.scale,
            p.proj_down,
            p.proj_up,
            p.smooth_factor,
            bias,
            p.act_unsigned,
            p.rotation,
            p.unsigned_from,
            p.smooth_rows,
        )

    @classmethod
    def params(cls, tensors: dict[str, torch.Tensor], settings: dict, dtype: torch.dtype) -> Params:
        shape = (tensors["weight"].shape[0], tensors["weight"].shape[1] * 2)
        return cls.Params(
            scale=tensors["weight_scale"],
            orig_dtype=dtype,
            orig_shape=shape,
            proj_down=tensors["weight_proj_down"],
            proj_up=tensors["weight_proj_up"],
            smooth_factor=tensors["weight_smooth_factor"],
            hook=HookCell(),
            **_patched_fields(tensors),
            act_unsigned=bool(settings.get("act_unsigned", False)),
            rotation=int(settings.get("rotation", 0)),
            unsigned_from=int(settings.get("unsigned_from", 0)),
            smooth_rows=tuple(settings.get("smooth_rows", ())),
        )

    @classmethod
    def settings(cls, p: Params) -> dict:
        extra = {
            "act_unsigned": p.act_unsigned,
            "rotation": p.rotation,
            "unsigned_from": p.unsigned_from,
            "smooth_rows": list(p.smooth_rows),
        }
        return {"format": cls.FORMAT, "rank": p.proj_down.shape[1]} | {
            name: value for name, value in extra.items() if value
        }


class NibbleW4A16Layout(_Layout):
    """`awq_w4a16`: qdata int8 (N, K/2) of codes 0…15; scale (K/64, N); zeros (K/64, N) or None.
    proj_* only hold a patch.
    """

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
        return cls.Params(
            scale=tensors["weight_scale"],
            zeros=tensors.get("weight_zeros"),
            orig_dtype=dtype,
            orig_shape=shape,
            hook=HookCell(),
            proj_down=tensors.get("weight_proj_down"),
            proj_up=tensors.get("weight_proj_up"),
            **_patched_fields(tensors),
        )

    @classmethod
    def settings(cls, p: Params) -> dict:
        return {"format": cls.FORMAT} | ({} if p.proj_up is None else {"rank": p.proj_up.shape[1]})


LAYOUTS = {layout.FORMAT: layout for layout in (NibbleSVDQuantLayout, NibbleW4A16Layout)}

# by name: loading the pack twice in a process registers the same thing again
for _layout in LAYOUTS.values():
    register_layout_class(_layout.__name__, _layout)


def is_ours(weight: object) -> bool:
    """Whether a parameter is one of Nibble's quantized weights."""
    return isinstance(weight, QuantizedTensor) and isinstance(weight._params, _Params)


def pack(tensors: dict[str, torch.Tensor], settings: dict, dtype: torch.dtype) -> NibbleTensor:
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
    params = layout.params(tensors, settings, dtype)
    return NibbleTensor(layout.pack(tensors["weight"], params), layout.__name__, params)


def settings_tensor(weight: QuantizedTensor) -> torch.Tensor:
    """The layer's `comfy_quant`: its JSON as uint8 bytes."""
    return torch.tensor(
        list(json.dumps(weight.layout_cls.settings(weight._params)).encode()), dtype=torch.uint8
    )


def unpack(
    weight: QuantizedTensor, bias: torch.Tensor | None = None
) -> SVDQuantWeight | W4A16Weight:
    """The weight as the arithmetic knows it; what a patch added outside the format stays in
    `weight._params`.
    """
    return weight.layout_cls.base(weight._qdata, weight._params, bias)


def effective_weight(base: SVDQuantWeight | W4A16Weight, params: _Params) -> torch.Tensor:
    """float32 (N, K): what raw x is multiplied by, with everything a patch added."""
    dense = base.dequantize().float()
    if isinstance(base, W4A16Weight) and params.proj_up is not None:
        dense = dense + params.proj_up.float() @ params.proj_down.float().T
    if params.row_scale is not None:
        dense = dense * params.row_scale[:, None]
    if params.side_up is not None:
        dense = dense + params.side_up.float() @ params.side_down.float().T
    if params.delta is not None:
        dense = dense + params.delta.float()
    return dense
