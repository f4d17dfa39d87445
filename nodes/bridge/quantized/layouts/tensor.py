"""One tensor for a layer: its codes, and in `Params` whatever else belongs to it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from typing import Any

import torch
from comfy.quant_ops import QuantizedTensor

from .....quant.weights.delta import WeightDelta

Tensors = dict[str, torch.Tensor]


class HookSeen(Enum):
    """LIVE: the weight that a module computes with, which follows its hook instead of remembering
    it.
    """

    LIVE = "live"


class HookCell:
    """Where a LoRA hook's change to one weight is kept; every alias of the weight shares it (see
    `LayoutParams.copy_from`).
    """

    def __init__(self, value: WeightDelta | None = None):
        self.value = value

    # torch.compile guards a weight by comparing it with a deep copy that it took
    def __deepcopy__(self, memo: dict) -> HookCell:
        return HookCell(self.value)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, HookCell) and self.value is other.value


@dataclass(frozen=True)
class LayoutParams:
    """What all formats share. `hook` is shared by aliases; `hook_seen` is what it held when this
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
    hook_seen: WeightDelta | HookSeen | None = None

    @property
    def side(self) -> WeightDelta:
        """What patches added beside the file's own tensors."""
        return WeightDelta(
            down=self.side_down,
            up=self.side_up,
            dense=self.delta,
            row_scale=self.row_scale,
            row_fold=self.row_fold,
        )

    @property
    def hooked(self) -> WeightDelta | None:
        """What a LoRA hook changes while it is on."""
        return None if self.hook is None else self.hook.value

    @property
    def branch_dtype(self) -> torch.dtype:
        """Of low-rank factors that the weight gets: that of its scales."""
        return self.scale.dtype

    @property
    def folds_bias(self) -> bool:
        """Whether unsigned activations folded a shift into the stored bias."""
        return bool(getattr(self, "act_unsigned", False) or getattr(self, "unsigned_from", 0))

    def _tensor_fields(self) -> list[str]:
        return [
            f.name
            for f in dataclasses.fields(self)
            if isinstance(getattr(self, f.name), torch.Tensor)
        ]

    def tensors(self) -> Tensors:
        """Field → tensor, of those that there are."""
        return {name: getattr(self, name) for name in self._tensor_fields()}

    def _with_tensors(
        self, change: Callable[[torch.Tensor], torch.Tensor], **fields: Any
    ) -> LayoutParams:
        changed = {name: change(tensor) for name, tensor in self.tensors().items()}
        return dataclasses.replace(self, **changed, **fields)

    def to_device(self, device: torch.device) -> LayoutParams:
        return self._with_tensors(lambda tensor: tensor.to(device=device))

    def clone(self) -> LayoutParams:
        """Shares the tensors (a weight is never written in place) and remembers what the
        hook held.
        """
        thaw = not torch.is_inference_mode_enabled()
        return self._with_tensors(
            lambda tensor: tensor.clone() if thaw and tensor.is_inference() else tensor,
            hook_seen=self.hooked,
        )

    def copy_from(self, source: LayoutParams, non_blocking: bool = False) -> None:
        """Fills this copy's buffers from a weight of the same shapes.

        ComfyUI switches a LoRA hook on and off by copying a remembered weight over an alias of the
        live one. The alias shares the live weight's hook cell, so what the remembered weight saw of
        the hook reaches the live one.
        """
        for name, tensor in source.tensors().items():
            getattr(self, name).copy_(tensor, non_blocking=non_blocking)
        if self.hook is not None and not isinstance(source.hook_seen, HookSeen):
            self.hook.value = source.hook_seen


_STREAMED = (
    "ComfyUI cannot save a low-bit model while it streams its weights. Use Merge and Save, which"
    " writes the model with all its LoRAs, or start ComfyUI with --disable-dynamic-vram and enough"
    " memory to hold the model whole."
)

DIVIDED = (
    "A low-bit weight of Nibble cannot be divided over several GPUs (FSDP, tensor parallelism):"
    " torch would make a 16-bit matrix of it. Draw a picture on each GPU instead (MultiGPU CFG"
    " Split, ComfyUI-Distributed), or make a file in a format of ComfyUI's own with Quantize for"
    " Stock ComfyUI."
)
_CUTS = (torch.ops.aten.split.Tensor, torch.ops.aten.split_with_sizes.default)
"""What FSDP and `distribute_tensor` begin with."""


def _divides() -> bool:
    """Whether this is one process of several that share their work, so that a cut is a shard."""
    return torch.distributed.is_available() and torch.distributed.is_initialized()


class NibbleTensor(QuantizedTensor):
    """ComfyUI's quantized tensor, whose `to(…, copy=True)` copies in inference mode, too.

    There torch hands `to` over undivided, and comfy_kitchen's answer to it forgets `copy`: the
    backup that ComfyUI takes of a weight before it puts a hook on would be the very weight that the
    hook changes, and the hook would never come off.

    It is not divided over processes: comfy_kitchen would dequantize it first. Raises ValueError.
    """

    def state_dict(self, prefix: str = "") -> Tensors:
        """Asked for by ComfyUI alone, when it saves a weight that it streams, which it can do for
        floating-point tensors only: refused in words (`layouts.stored_tensors` gives them). Raises
        ValueError.
        """
        raise ValueError(_STREAMED)

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        if func in _CUTS and _divides():
            raise ValueError(DIVIDED)
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
