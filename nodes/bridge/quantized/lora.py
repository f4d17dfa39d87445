"""LoRAs and other weight patches on a 4-bit layer, without touching its 4-bit codes.

A patched layer computes y = ρ ⊙ base(x) + change(x): a WeightDelta. ComfyUI hands a patch over in
one of three ways. Loaded whole, for a sampler, it is planned first, so that no whole weight is
made:

    ComfyUI                       lora.py                          Linear (linear.py)
    prepare_sampling(model) ────► plan_patches: checks, keeps
      load_models_gpu             the patches of every layer
        convert_weight(W) ───────────────────────────────────────► planned?
                                  reads them as a WeightDelta ◄──┘
                           ◄────────────────────────────────────── a tensor without storage
        calculate_weight: arithmetic on nothing
        set_weight(result) ──────────────────────────────────────► with_plan
                                  concat_branch: its factors ◄───┘
                                  behind the layer's own, same codes
    end of prepare_sampling ────► the plans are forgotten

A text encoder is loaded with nothing around it that could be asked, and hooks are switched between
two steps. There the patches are read from the call that asks for the converted weight (`_of_call`),
from its frame. No other way that ComfyUI offers is as right. It gives convert_weight a copy of the
weight and set_weight the result, and neither the patcher nor the key. An object patch, renewed at
each clone, could leave the patcher on the model before weights are patched; but the same two calls
serve hooks, whose patches are others, and saving, by a patcher that need not be the one loaded
last, and the layer could not tell. ON_LOAD comes when all weights are patched, too late for a
result that was asked for at once. A weight wrapper and a tensor of a class of its own see products
that are whole matrices already. Where the frame is of another function the dense way is taken.

Of patches that are no sum of factors and rows, `set_weight` gets the new weight W', and
`absorb_dense` splits W' - W into factors; what has no low rank stays beside the layer, dense, in 16
bit. A hook that is switched on and off between steps keeps that change, too (`dense_delta`).
Attached for the forward pass (low VRAM, dynamic VRAM), `PatchCache` reads the patches as a plan
would, and the layer adds them to its branch while it computes.
"""

from __future__ import annotations

from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass
from types import FrameType, MappingProxyType

import comfy.lora
import comfy.utils
import torch
from comfy.model_patcher import ModelPatcher
from comfy.quant_ops import QuantizedTensor

from ....quant.weights.delta import WeightDelta, append_factors, pad_rank
from ....quant.weights.lowrank import ROUNDING, factors_of_lowest_rank
from ..host.prefix import forget_prefix
from . import layouts, patches

WRAPPER = "nibble_lora"  # our key among a model's wrappers
_PATCHES = ModelPatcher.patch_weight_to_device.__code__
_HOOK_PATCHES = ModelPatcher.patch_hook_weight_to_device.__code__


def computable(
    delta: WeightDelta, dtype: torch.dtype, fold: Callable[[], torch.Tensor | None]
) -> WeightDelta:
    """A change in the form that layers compute with: in their dtype, at a rank that kernels like,
    and with the layer's row_fold, which fold() gives.
    """
    down = up = None
    if delta.up is not None:
        down, up = pad_rank(delta.down).to(dtype), pad_rank(delta.up).to(dtype)
    return WeightDelta(
        down=down,
        up=up,
        dense=None if delta.dense is None else delta.dense.to(dtype),
        row_scale=delta.row_scale,
        row_fold=None if delta.row_scale is None else fold(),
    )


def row_fold_of(weight: QuantizedTensor) -> torch.Tensor | None:
    """What a layer's unsigned activations add to its output beyond the stored bias, float32 (N,),
    or None.
    """
    return layouts.unpack(weight).effective_bias() if weight.params.folds_bias else None


# ---- loaded whole


@dataclass(frozen=True)
class _Plan:
    """A layer's patches until they are applied."""

    name: str
    entries: list[tuple]


_plans: ContextVar = ContextVar(
    "nibble_plans", default=MappingProxyType({})
)  # id of a layer → plan


def plan_patches(executor, model, *args, **kwargs):
    """ComfyUI's PREPARE_SAMPLING wrapper of our models. Refuses patches that cannot be right before
    anything is loaded.
    """
    # of a run with other patches
    forget_prefix(model.model.diffusion_model)
    plans = {}
    for key, entries in model.patches.items():
        layer = layer_of(model, key)
        if layer is not None:
            plans[id(layer)] = _checked(key, entries, tuple(layer.weight.shape))
    token = _plans.set(plans)
    try:
        return executor(model, *args, **kwargs)
    finally:
        _plans.reset(token)


def _checked(key: str, entries: list[tuple], shape: tuple[int, int]) -> _Plan:
    name = key.removeprefix("diffusion_model.").removesuffix(".weight")
    patches.check(entries, shape, name)
    patches.check_finite(entries, name)
    return _Plan(name, entries)


def layer_of(model, key: str) -> torch.nn.Module | None:
    """The module behind a patched key whose weight is one of ours, or None."""
    if not key.endswith(".weight"):
        return None
    module = comfy.utils.get_attr(model.model, key.removesuffix(".weight"))
    if not layouts.is_ours(getattr(module, "weight", None)):
        return None
    return getattr(getattr(module, "convert_weight", None), "__self__", None)


def planned(
    layer: torch.nn.Module, weight: QuantizedTensor, caller: FrameType
) -> WeightDelta | None:
    """What the patches about to be computed for a layer change, where they are known and simple
    enough to need no whole weight.

    weight: its copy on their device; caller: the call that wants it converted. Raises DoesNotFit.
    """
    of_hook = caller.f_code is _HOOK_PATCHES
    plan = None if of_hook else _plans.get().get(id(layer))
    plan = plan or _of_call(caller, tuple(weight.shape))
    if plan is None:
        return None
    effect = _effect_on(weight, plan.entries, plan.name, weight.device)
    if effect is None or effect.delta.dense is not None:
        return None
    # rows are scaled with the bias, which a hook does not see
    return None if of_hook and effect.delta.row_scale is not None else effect.delta


def _of_call(caller: FrameType, shape: tuple[int, int]) -> _Plan | None:
    """The patches that a call of ModelPatcher.patch_weight_to_device or patch_hook_weight_to_device
    applies; None for any other call.
    """
    local = caller.f_locals
    if caller.f_code is _PATCHES:
        entries = local["self"].patches.get(local["key"])
    elif caller.f_code is _HOOK_PATCHES:
        entries = local["combined_patches"].get(local["key"])
    else:
        return None
    return None if entries is None else _checked(local["key"], entries, shape)


def with_plan(layer: torch.nn.Module, delta: WeightDelta) -> QuantizedTensor:
    """The layer's weight with what was planned, on the device where that was computed."""
    device = layer.weight.device
    if delta.up is not None:
        device = delta.up.device
    elif delta.row_scale is not None:
        device = delta.row_scale.device
    weight = layer.weight.to(device=device)
    dtype = weight.params.branch_dtype
    return concat_branch(weight, computable(delta, dtype, lambda: row_fold_of(weight)))


def _effect_on(
    weight: QuantizedTensor, entries: list[tuple], name: str, device: torch.device
) -> patches.PatchEffect | None:
    def dense() -> torch.Tensor:
        return layouts.effective_weight(weight)

    return patches.effect_of(entries, weight.shape, dense, name, device)


# ---- loaded whole, by whole weights


def dense_delta(weight: QuantizedTensor, patched: torch.Tensor) -> WeightDelta | None:
    """What a patch did: `patched` float (N, K) against the weight itself; None for nothing beyond
    rounding.
    """
    dtype = weight.params.branch_dtype
    original = layouts.effective_weight(weight.to(device=patched.device))
    difference = patched.float() - original
    negligible = original.square().sum().item() * ROUNDING**2
    if difference.square().sum().item() <= negligible:
        return None
    factors = factors_of_lowest_rank(difference, negligible)
    if factors is None:
        return WeightDelta(dense=difference.to(dtype))
    down, up = (pad_rank(factor).to(dtype) for factor in factors)
    return WeightDelta(down=down, up=up)


def absorb_dense(weight: QuantizedTensor, patched: torch.Tensor) -> QuantizedTensor:
    """The weight with a patch in its low-rank branch, on `patched`'s device: same codes, same
    scales, longer factors.
    """
    change = dense_delta(weight, patched)
    base = weight.to(device=patched.device)
    return base if change is None else concat_branch(base, change)


def concat_branch(base: QuantizedTensor, change: WeightDelta) -> QuantizedTensor:
    """A weight with a change in its own tensors: a new one, that shares the codes."""
    params, fields = base.params, {}
    change = layouts.as_stored(base, change)
    if change.row_scale is not None:
        fields["row_scale"], fields["row_fold"] = change.row_scale, change.row_fold
        fields["side_down"], fields["side_up"] = change.down, change.up
    elif change.up is not None:
        down, up = change.down, change.up
        if params.proj_up is not None:
            dtype = params.proj_up.dtype
            down, up = append_factors(params.proj_down, params.proj_up, change, dtype)
        fields["proj_down"], fields["proj_up"] = down, up
    if change.dense is not None:
        before = params.delta
        fields["delta"] = change.dense if before is None else before + change.dense
    return layouts.with_fields(base, **fields)


# ---- attached


class SidePatch:
    """A patch that ComfyUI's dynamic VRAM attached to a layer, kept out of the streamed weight and
    computed beside it.

    Stands in the layer's `weight_function` list, so that ComfyUI moves it (`move_to`), counts it,
    and records no CUDA graph of a block that has one.
    """

    def __init__(self, patch):
        self.patch = patch

    def move_to(self, device: torch.device) -> int:
        """Copies the adapter's tensors to the device; returns the bytes that it holds there."""
        if torch.device(device).type == "cpu":
            self.patch.clear_prepared()
            return 0
        size = self.patch.memory_required()
        self.patch.prepare(torch.empty(size, dtype=torch.uint8, device=device), None, copy=True)
        return size

    def __call__(self, weight: torch.Tensor) -> torch.Tensor:
        return self.patch(weight)


def patches_of(function: Callable) -> tuple[str, list[tuple]] | None:
    """(key, patches) of a weight function that only applies ComfyUI's patches; None for any other
    function.
    """
    patch = function.patch if isinstance(function, SidePatch) else function
    if not getattr(patch, "is_lowvram_patch", False):
        return None
    prepared = getattr(patch, "prepared_patches", None)
    return patch.key, prepared if prepared is not None else patch.patches[patch.key]


class PatchCache:
    """What a layer's attached patches change, remembered where it takes work to find out (a DoRA's
    norms, the cut of a LoHa or LoKr).
    """

    def __init__(self):
        self._known: dict[int, tuple[Callable, torch.dtype, torch.device, WeightDelta]] = {}

    def clear(self) -> None:
        """Forgets everything, as when patches change."""
        self._known.clear()

    def delta(self, function: Callable, weight: QuantizedTensor, x: torch.Tensor) -> WeightDelta:
        """The change of one weight function that `patches_of` knows, in x's dtype and on its
        device.
        """
        known = self._known.get(id(function))
        if known is not None and known[:3] == (function, x.dtype, x.device):
            return known[3]
        key, entries = patches_of(function)
        effect = _effect_on(weight, entries, key, x.device)
        if effect is None:
            original = layouts.effective_weight(weight)
            patched = comfy.lora.calculate_weight(entries, original.clone(), key)
            return WeightDelta(dense=(patched - original).to(x.dtype))
        delta = computable(effect.delta, x.dtype, lambda: row_fold_of(weight))
        if delta.dense is None and not patches.all_plain(entries):
            self._known[id(function)] = (function, x.dtype, x.device, delta)
        return delta
