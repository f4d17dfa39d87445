"""LoRAs and other weight patches on a 4-bit layer, without touching its 4-bit codes.

A patched layer computes y = ρ ⊙ base(x) + change(x). ComfyUI hands a patch over in one of three
ways, and each ends here:
- loaded whole, for a sampler: `announce` tells the layers their patches beforehand, so that they
  take them as what they are (`patches`), low-rank factors into their own low-rank branch, and
  ComfyUI computes the new weight on tensors without storage (`expected`, `take`);
- loaded whole, for anything else: ComfyUI hands over the new weight W', whose change W' - W is
  split into low-rank factors; what has no low rank stays beside the layer, dense, in 16 bit
  (`absorb`). A hook that is switched on and off between steps is kept so, too (`change_of`);
- attached for the forward pass (low VRAM, dynamic VRAM): the same as the first, joined to the
  branch while the layer computes (`beside`).

The factors of a W' - W come from a randomized range finder with growing rank: Halko, Martinsson,
Tropp 2011, algorithm 4.2 (arXiv:0909.4061).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass
from types import MappingProxyType

import comfy.lora
import comfy.utils
import torch
from comfy.model_management import cast_to_device
from comfy.quant_ops import QuantizedTensor

from . import layouts, patches
from .patches import MOST, Effect

WRAPPER = "nibble_lora"  # our key among a model's wrappers
# energy of a change that its factors may leave out: below the rounding of 16-bit factors
RESIDUAL = 1e-6
# of float32 arithmetic on the whole weight, relative to its norm: such a change is no change
ROUNDING = 4e-7
RANK_STEP = 16  # the low-rank branch stays a multiple of this, as kernels like it
FIRST_RANK = 32  # ranks tried double from the first


@dataclass(frozen=True, eq=False)
class Change:
    """What a patch makes of a layer: rows times row_scale (N,), plus up (N, r) · down (K, r)ᵀ, plus
    a dense delta (N, K).

    row_fold (N,): what unsigned activations folded into the stored bias, needed to keep row_scale
        off the bias; None: nothing.
    """

    down: torch.Tensor | None = None
    up: torch.Tensor | None = None
    delta: torch.Tensor | None = None
    row_scale: torch.Tensor | None = None
    row_fold: torch.Tensor | None = None

    def add_to(
        self, y: torch.Tensor, x: torch.Tensor, bias: torch.Tensor | None = None
    ) -> torch.Tensor:
        """The patched layer's output for x (…, K), of its plain output y (…, N) and its stored
        bias, wherever the factors are.
        """

        def here(tensor, dtype=x.dtype):
            return cast_to_device(tensor, x.device, dtype)

        if self.row_scale is not None:
            y = _with_scaled_rows(
                y,
                here(self.row_scale, torch.float32),
                bias,
                None if self.row_fold is None else here(self.row_fold),
            )
        if self.up is not None:
            y = y + torch.nn.functional.linear(x @ here(self.down), here(self.up))
        if self.delta is not None:
            y = y + torch.nn.functional.linear(x, here(self.delta))
        return y


def _with_scaled_rows(y, scale, bias, fold) -> torch.Tensor:
    """ρ ⊙ (y - b) + b, with b the bias that y really has: the stored one and what was folded into
    it.
    """
    real = bias if fold is None else fold if bias is None else bias + fold
    scaled = (
        y * scale if real is None else torch.addcmul((1 - scale) * real.float(), y.float(), scale)
    )
    return scaled.to(y.dtype)


def change_from(
    effect: Effect, dtype: torch.dtype, fold: Callable[[], torch.Tensor | None]
) -> Change:
    """An effect in the form that layers compute with; fold() gives the layer's row_fold."""
    down = up = None
    if effect.ups:
        down, up = (
            _padded(torch.cat(effect.downs).T).to(dtype),
            _padded(torch.cat(effect.ups, 1)).to(dtype),
        )
    delta = None if effect.delta is None else effect.delta.to(dtype)
    return Change(
        down, up, delta, *(None, None) if effect.scale is None else (effect.scale[:, 0], fold())
    )


def fold_of(weight: QuantizedTensor) -> torch.Tensor | None:
    """What a layer's unsigned activations add to its output beyond the stored bias, float32 (N,),
    or None.
    """
    params = weight._params
    if not (getattr(params, "act_unsigned", False) or getattr(params, "unsigned_from", 0)):
        return None
    return layouts.unpack(weight).effective_bias()


# ---- loaded whole, for a sampler

# id of a layer → [key, its patches, effect when asked for]
_announced: ContextVar[dict] = ContextVar("nibble_announced", default=MappingProxyType({}))


def announce(executor, model, *args, **kwargs):
    """ComfyUI's PREPARE_SAMPLING wrapper of our models. Refuses patches that cannot be right before
    anything is loaded.
    """
    found = {}
    for key, entries in model.patches.items():
        layer = layer_of(model, key)
        if layer is not None:
            name = key.removeprefix("diffusion_model.").removesuffix(".weight")
            patches.check(entries, tuple(layer.weight.shape), name)
            patches.check_finite(entries, name)
            found[id(layer)] = [name, entries, None]
    token = _announced.set(found)
    try:
        return executor(model, *args, **kwargs)
    finally:
        _announced.reset(token)


def layer_of(model, key: str) -> torch.nn.Module | None:
    """The module behind a patched key whose weight is one of ours, or None."""
    module = (
        comfy.utils.get_attr(model.model, key.removesuffix(".weight"))
        if key.endswith(".weight")
        else None
    )
    return (
        getattr(getattr(module, "convert_weight", None), "__self__", None)
        if layouts.is_ours(getattr(module, "weight", None))
        else None
    )


def _dense(weight: QuantizedTensor) -> torch.Tensor:
    return layouts.effective_weight(layouts.unpack(weight), weight._params)


def expected(layer: torch.nn.Module, weight: QuantizedTensor) -> bool:
    """Whether the patches about to be computed for a layer are known, and simple enough to need no
    whole weight. `weight`: its copy on their device.
    """
    entry = _announced.get().get(id(layer))
    if entry is None:
        return False
    key, entries, _ = entry
    effect = patches.effect_of(entries, weight.shape, lambda: _dense(weight), key, weight.device)
    entry[2] = None if effect is None or effect.delta is not None else effect
    return entry[2] is not None


def take(layer: torch.nn.Module) -> QuantizedTensor:
    """The layer's weight with what was `expected` of it, on the device where that was computed."""
    entry = _announced.get()[id(layer)]
    effect, entry[2] = entry[2], None
    device = (
        effect.ups[0].device
        if effect.ups
        else effect.scale.device
        if effect.scale is not None
        else layer.weight.device
    )
    weight = layer.weight.to(device=device)
    return joined(weight, change_from(effect, weight._params.scale.dtype, lambda: fold_of(weight)))


# ---- loaded whole, for anything else


def factorise(delta: torch.Tensor, negligible: float) -> tuple[torch.Tensor, torch.Tensor] | None:
    """delta float32 (N, K) → (down (K, r), up (N, r)) with up·downᵀ ≈ delta, or None where no low
    rank is enough.

    negligible: the squared error that rounding excuses; beyond it, RESIDUAL of the energy may be
        missing.
    """
    energy = delta.square().sum().item()
    allowed = max(negligible, RESIDUAL * energy)
    generator = torch.Generator(delta.device).manual_seed(0)
    basis, left = delta.new_zeros(delta.shape[0], 0), energy
    rank = FIRST_RANK
    while left > allowed:
        if rank > min(delta.shape) // MOST:
            return None
        probe = torch.randn(
            delta.shape[1], rank - basis.shape[1], generator=generator, device=delta.device
        )
        sketch = delta @ probe
        # twice: where the sketch holds nothing new, the first pass leaves rounding errors along the
        # old basis
        for _ in range(2):
            sketch = torch.linalg.qr(sketch - basis @ (basis.T @ sketch)).Q
        basis = torch.cat([basis, sketch], dim=1)
        rows = basis.T @ delta
        left = (delta - basis @ rows).square().sum().item()
        rank *= 2
    return _truncate(basis, basis.T @ delta, allowed - left)


def _truncate(
    basis: torch.Tensor, rows: torch.Tensor, spare: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """basis (N, r) · rows (r, K) → balanced factors (K, r'), (N, r') of the smallest rank that
    loses at most `spare` energy.
    """
    u, s, v = torch.linalg.svd(rows, full_matrices=False)
    lost = s.square().flip(0).cumsum(0).flip(0)
    rank = int((lost > spare).sum())
    root = s[:rank].sqrt()
    return v[:rank].T * root, (basis @ u[:, :rank]) * root


def change_of(weight: QuantizedTensor, patched: torch.Tensor) -> Change | None:
    """What a patch did: `patched` float (N, K) against the weight itself; None for nothing beyond
    rounding.
    """
    dtype = weight._params.scale.dtype
    original = _dense(weight.to(device=patched.device))
    delta = patched.float() - original
    negligible = original.square().sum().item() * ROUNDING**2
    if delta.square().sum().item() <= negligible:
        return None
    factors = factorise(delta, negligible)
    if factors is None:
        return Change(delta=delta.to(dtype))
    return Change(*(_padded(factor).to(dtype) for factor in factors))


def _padded(factor: torch.Tensor) -> torch.Tensor:
    """(…, r) with zero columns up to a multiple of RANK_STEP."""
    return torch.nn.functional.pad(factor, (0, -factor.shape[1] % RANK_STEP))


def absorb(weight: QuantizedTensor, patched: torch.Tensor) -> QuantizedTensor:
    """The weight with a patch in its low-rank branch, on `patched`'s device: same codes, same
    scales, longer factors.
    """
    change, base = change_of(weight, patched), weight.to(device=patched.device)
    return base if change is None else joined(base, change)


def joined(base: QuantizedTensor, change: Change) -> QuantizedTensor:
    """A weight with a change in its own tensors: a new one, that shares the codes."""
    p, fields = base._params, {}
    if change.row_scale is not None:
        fields = {
            "row_scale": change.row_scale,
            "row_fold": change.row_fold,
            "side_down": change.down,
            "side_up": change.up,
        }
    elif change.up is not None:
        down, up = (
            (change.down, change.up)
            if p.proj_up is None
            else longer(p.proj_down, p.proj_up, change, p.proj_up.dtype)
        )
        fields = {"proj_down": down, "proj_up": up}
    if change.delta is not None:
        fields["delta"] = change.delta if p.delta is None else p.delta + change.delta
    return layouts.NibbleTensor(
        base._qdata,
        base._layout_cls,
        dataclasses.replace(p, hook=layouts.HookCell(), hook_seen=None, **fields),
    )


def longer(
    down: torch.Tensor, up: torch.Tensor, change: Change, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """A low-rank branch (K, R), (N, R) with a change's factors appended."""
    return tuple(
        torch.cat([own.to(dtype), cast_to_device(new, own.device, dtype)], 1)
        for own, new in ((down, change.down), (up, change.up))
    )


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


def entries_of(function: Callable) -> tuple[str, list[tuple]] | None:
    """(key, patches) of a weight function that only applies ComfyUI's patches; None for any other
    function.
    """
    patch = function.patch if isinstance(function, SidePatch) else function
    if not getattr(patch, "is_lowvram_patch", False):
        return None
    prepared = getattr(patch, "prepared_patches", None)
    return patch.key, prepared if prepared is not None else patch.patches[patch.key]


class Beside:
    """What a layer's attached patches change, remembered where it takes work to find out (a DoRA's
    norms, the cut of a LoHa or LoKr).
    """

    def __init__(self):
        self._known: dict[int, tuple[Callable, torch.dtype, torch.device, Change]] = {}

    def forget(self) -> None:
        self._known.clear()

    def change(self, function: Callable, weight: QuantizedTensor, x: torch.Tensor) -> Change:
        """The change of one weight function that `entries_of` knows, in x's dtype and on its
        device.
        """
        known = self._known.get(id(function))
        if known is not None and known[:3] == (function, x.dtype, x.device):
            return known[3]
        key, entries = entries_of(function)
        effect = patches.effect_of(entries, weight.shape, lambda: _dense(weight), key, x.device)
        if effect is None:
            return Change(delta=_difference(key, entries, _dense(weight)).to(x.dtype))
        change = change_from(effect, x.dtype, lambda: fold_of(weight))
        if effect.delta is None and not patches.all_plain(entries):
            self._known[id(function)] = (function, x.dtype, x.device, change)
        return change


def _difference(key: str, entries: list[tuple], original: torch.Tensor) -> torch.Tensor:
    return comfy.lora.calculate_weight(entries, original.clone(), key) - original
