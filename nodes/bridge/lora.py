"""LoRAs and other weight patches on a 4-bit layer, without touching its 4-bit codes.

A patched layer computes y = base(x) + change(x). ComfyUI hands a patch over in one of three ways, and each ends here:
- the whole new weight W' (full load): the change W' - W is split into low-rank factors, which join the layer's own low-rank
  branch; what has no low rank stays beside it, dense, in 16 bit (`absorb`);
- a list of patches for the forward pass (low VRAM, dynamic VRAM): each plain LoRA is computed as two thin products beside
  the layer, anything else as W' - W (`add_beside`);
- a hook that is switched on and off between steps: as the first, kept beside the weight (`change_of`).

The factors come from a randomized range finder with growing rank: Halko, Martinsson, Tropp 2011, algorithm 4.2 (arXiv:0909.4061).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass

import comfy.lora
import torch
from comfy.model_management import cast_to_device
from comfy.quant_ops import QuantizedTensor
from comfy.weight_adapter import LoRAAdapter

from . import layouts

RESIDUAL = 1e-6       # energy of a change that its factors may leave out: below the rounding of 16-bit factors
ROUNDING = 4e-7       # of float32 arithmetic on the whole weight, relative to its norm: such a change is no change
RANK_STEP = 16        # the low-rank branch stays a multiple of this, as kernels like it
FIRST_RANK, MOST = 32, 4  # ranks tried double from the first; a change that needs more than min(N, K)/MOST stays dense


@dataclass(frozen=True, eq=False)
class Change:
    """What a patch adds to a weight: up (N, r) · down (K, r)ᵀ, or a dense delta (N, K)."""

    down: torch.Tensor | None = None
    up: torch.Tensor | None = None
    delta: torch.Tensor | None = None

    def add_to(self, y: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """y (…, N) + change(x (…, K)), wherever the factors are."""
        def here(tensor):
            return cast_to_device(tensor, x.device, x.dtype)
        if self.up is not None:
            y = y + torch.nn.functional.linear(x @ here(self.down), here(self.up))
        if self.delta is not None:
            y = y + torch.nn.functional.linear(x, here(self.delta))
        return y


def factorise(delta: torch.Tensor, negligible: float) -> tuple[torch.Tensor, torch.Tensor] | None:
    """delta float32 (N, K) → (down (K, r), up (N, r)) with up·downᵀ ≈ delta, or None where no low rank is enough.

    negligible: the squared error that rounding excuses; beyond it, RESIDUAL of the energy may be missing.
    """
    energy = delta.square().sum().item()
    allowed = max(negligible, RESIDUAL * energy)
    generator = torch.Generator(delta.device).manual_seed(0)
    basis, left = delta.new_zeros(delta.shape[0], 0), energy
    rank = FIRST_RANK
    while left > allowed:
        if rank > min(delta.shape) // MOST:
            return None
        probe = torch.randn(delta.shape[1], rank - basis.shape[1], generator=generator, device=delta.device)
        sketch = delta @ probe
        for _ in range(2):  # twice: where the sketch holds nothing new, the first pass leaves rounding errors along the old basis
            sketch = torch.linalg.qr(sketch - basis @ (basis.T @ sketch)).Q
        basis = torch.cat([basis, sketch], dim=1)
        rows = basis.T @ delta
        left = (delta - basis @ rows).square().sum().item()
        rank *= 2
    return _truncate(basis, basis.T @ delta, allowed - left)


def _truncate(basis: torch.Tensor, rows: torch.Tensor, spare: float) -> tuple[torch.Tensor, torch.Tensor]:
    """basis (N, r) · rows (r, K) → balanced factors (K, r'), (N, r') of the smallest rank that loses at most `spare` energy."""
    u, s, v = torch.linalg.svd(rows, full_matrices=False)
    lost = s.square().flip(0).cumsum(0).flip(0)
    rank = int((lost > spare).sum())
    root = s[:rank].sqrt()
    return v[:rank].T * root, (basis @ u[:, :rank]) * root


def change_of(weight: QuantizedTensor, patched: torch.Tensor) -> Change | None:
    """What a patch did: `patched` float (N, K) against the weight itself; None for nothing beyond rounding."""
    params = weight._params
    dtype = params.scale.dtype
    here = weight.to(device=patched.device)
    original = layouts.effective_weight(layouts.unpack(here), here._params)
    delta = patched.float() - original
    negligible = original.square().sum().item() * ROUNDING ** 2
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
    """The weight with a patch in its low-rank branch, on `patched`'s device: same codes, same scales, longer factors."""
    change = change_of(weight, patched)
    base = weight.to(device=patched.device)
    if change is None:
        return base
    p = base._params
    if change.delta is not None:
        fields = {"delta": change.delta if p.delta is None else p.delta + change.delta}
    elif p.proj_up is None:
        fields = {"proj_down": change.down, "proj_up": change.up}
    else:
        fields = {"proj_down": torch.cat([p.proj_down, change.down], 1), "proj_up": torch.cat([p.proj_up, change.up], 1)}
    return QuantizedTensor(base._qdata, base._layout_cls, dataclasses.replace(p, hook=layouts.HookCell(), hook_seen=None, **fields))


class SidePatch:
    """A patch that ComfyUI's dynamic VRAM attached to a layer, kept out of the streamed weight and computed beside it.

    Stands in the layer's `weight_function` list, so that ComfyUI moves it (`move_to`), counts it, and records no CUDA graph
    of a block that has one.
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
    """(key, patches) of a weight function that only applies ComfyUI's patches; None for any other function."""
    patch = function.patch if isinstance(function, SidePatch) else function
    if not getattr(patch, "is_lowvram_patch", False):
        return None
    prepared = getattr(patch, "prepared_patches", None)
    return patch.key, prepared if prepared is not None else patch.patches[patch.key]


def add_beside(y: torch.Tensor, x: torch.Tensor, key: str, patches: list[tuple], weight: Callable[[], torch.Tensor]) -> torch.Tensor:
    """y (…, N) + what the patches change of the layer's output for x (…, K).

    patches: ComfyUI's (strength, adapter, strength of the model, offset, function); weight() gives the layer's float32 (N, K),
    asked for only when a patch is no plain LoRA.
    """
    if all(_is_plain_lora(patch) for patch in patches):
        for patch in patches:
            y = _add_lora(y, x, *patch)
        return y
    original = weight()
    delta = comfy.lora.calculate_weight(patches, original.clone(), key) - original
    return y + torch.nn.functional.linear(x, delta.to(x.dtype))


def _is_plain_lora(patch: tuple) -> bool:
    _, adapter, strength_model, _, function = patch
    if not isinstance(adapter, LoRAAdapter) or strength_model != 1.0 or function is not None:
        return False
    up, down, _, *extras = adapter.weights
    return all(extra is None for extra in extras) and up[0, 0].numel() == 1 and down[0, 0].numel() == 1


def _add_lora(y, x, strength, adapter, _strength_model, offset, _function) -> torch.Tensor:
    """One plain LoRA; offset (dimension, start, length) names the part of a fused weight that it is for."""
    if strength == 0.0:
        return y
    up, down, alpha = adapter.weights[:3]
    scale = strength * (1.0 if alpha is None else alpha / down.shape[0])
    if offset is not None and offset[0] == 1:
        x = x.narrow(-1, offset[1], offset[2])
    hidden = torch.nn.functional.linear(x, cast_to_device(down, x.device, x.dtype).flatten(1)) * scale
    change = torch.nn.functional.linear(hidden, cast_to_device(up, x.device, x.dtype).flatten(1))
    if offset is not None and offset[0] == 0:
        change = torch.nn.functional.pad(change, (offset[1], y.shape[-1] - offset[1] - offset[2]))
    return y + change
