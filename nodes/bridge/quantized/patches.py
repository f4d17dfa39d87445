"""What ComfyUI's patches do to a weight, read from the patches themselves: no difference of whole
weights, nothing decomposed twice.

A list of patches, applied in order, is one WeightDelta:
- LoRA (arXiv:2106.09685): its own factors, exactly; parts of a fused weight get rows or columns of
  zeros.
- LoHa (arXiv:2108.06098): (A₁B₁) ∘ (A₂B₂) has the factors A₁ ⊙ A₂ by rows and B₁ ⊙ B₂ by columns,
  of rank r₁r₂.
- LoKr (arXiv:2309.14859): kron(A, B) has the singular vectors kron(uᵢ, uⱼ) and the singular values
  sᵢsⱼ. Both are cut to the smallest rank that loses at most ENERGY of the change's energy.
- DoRA (arXiv:2402.09353), as ComfyUI computes it: W + s (d ⊙ (W + ΔW) - W) with d = magnitude / ‖W‖
  by rows, so the row scale is 1 + s (d - 1).
- a difference of weights stays dense.
Anything else (OFT, BOFT, GLoRA, convolutions' mid factors, other nodes' functions) is left to
ComfyUI's own arithmetic on the whole weight.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from comfy.model_management import cast_to_device
from comfy.weight_adapter import LoHaAdapter, LoKrAdapter, LoRAAdapter

from ....quant.weights.delta import WeightDelta
from ....quant.weights.lowrank import MOST

# share of a LoHa's or LoKr's energy that its factors may leave out, 50 dB below the change. On the
# demo model, with changes half as large as the weights: at least 57 dB below a layer's output,
# where 4-bit activations cost 28 dB in the median layer and 40 in the best
ENERGY = 1e-5
_KNOWN = {LoRAAdapter: "LoRA", LoHaAdapter: "LoHa", LoKrAdapter: "LoKr"}
# up (N', r), down (r, K') and the share of energy that they leave out
Factors = tuple[torch.Tensor, torch.Tensor, float]
# (dimension, start, length) of the part of a weight that a patch is for; None: all of it
Offset = tuple[int, int, int] | None


class DoesNotFit(ValueError):
    """A patch that cannot be applied to a layer: the message names both and what to do."""


@dataclass(frozen=True)
class PatchEffect:
    """What a list of patches does to a weight (N, K), float32.

    lost   largest share of energy that one patch's factors leave out
    kinds  of the patches, in words
    """

    delta: WeightDelta
    lost: float = 0.0
    kinds: tuple[str, ...] = ()


@dataclass
class _PatchSum:
    """The patches that have been read so far, on a weight of `shape`; factors stay apart as up (N,
    r), down (r, K).
    """

    shape: tuple[int, int]
    device: torch.device | None = None
    row_scale: torch.Tensor | None = None  # (N, 1)
    ups: list[torch.Tensor] = field(default_factory=list)
    downs: list[torch.Tensor] = field(default_factory=list)
    dense: torch.Tensor | None = None
    lost: float = 0.0
    kinds: list[str] = field(default_factory=list)

    def on_weight(self, weight: torch.Tensor) -> torch.Tensor:
        """The patched weight, float32 (N, K), of the plain one."""
        out = weight if self.row_scale is None else weight * self.row_scale
        for up, down in zip(self.ups, self.downs, strict=True):
            out = out + up @ down
        return out if self.dense is None else out + self.dense

    def scale_rows(self, factor: torch.Tensor | float, rows: slice) -> None:
        """Multiplies rows of all that there is so far; factor: a number or (rows, 1)."""
        device = factor.device if isinstance(factor, torch.Tensor) else None
        whole = torch.ones(self.shape[0], 1, device=device)
        whole[rows] = factor
        if self.row_scale is None:
            self.row_scale = whole
        else:
            self.row_scale = self.row_scale * whole.to(self.row_scale.device)
        self.ups = [up * whole.to(up.device) for up in self.ups]
        if self.dense is not None:
            self.dense = self.dense * whole.to(self.dense.device)

    def add_difference(self, difference: torch.Tensor, strength: float, offset: Offset) -> None:
        """Adds a dense difference of a part of the weight."""
        if self.dense is None:
            self.dense = torch.zeros(self.shape, device=self.device or difference.device)
        part = self.dense if offset is None else self.dense.narrow(*offset)
        own = cast_to_device(difference, self.dense.device, torch.float32)
        part.add_(own.reshape(_part(self.shape, offset)), alpha=strength)
        self.kinds.append("difference")

    def effect(self) -> PatchEffect:
        """All of it as one record."""
        down = up = None
        if self.ups:
            down, up = torch.cat(self.downs).T, torch.cat(self.ups, 1)
        scale = None if self.row_scale is None else self.row_scale[:, 0]
        delta = WeightDelta(down=down, up=up, dense=self.dense, row_scale=scale)
        return PatchEffect(delta, self.lost, tuple(self.kinds))


def effect_of(
    patches: list[tuple],
    shape: tuple[int, int],
    weight: Callable[[], torch.Tensor],
    name: str,
    device: torch.device | None = None,
) -> PatchEffect | None:
    """ComfyUI's (strength, adapter, strength of the model, offset, function) in order → their
    effect, or None for patches left to ComfyUI.

    weight() gives the float32 (N, K), asked for only where a DoRA needs its norms. Raises
    DoesNotFit, naming the layer `name`.
    """
    check(patches, shape, name)
    total = _PatchSum(tuple(shape), device)
    for strength, patch, strength_model, offset, function in patches:
        columns = offset is not None and offset[0] == 1
        if function is not None or (
            columns and (strength_model != 1.0 or dora_of(patch) is not None)
        ):
            return None
        rows = slice(None)
        if offset is not None and not columns:
            rows = slice(offset[1], offset[1] + offset[2])
        if strength_model != 1.0:
            total.scale_rows(strength_model, rows)
        if strength and not _add_patch(total, strength, patch, offset, rows, weight):
            return None
    return total.effect()


def _add_patch(
    total: _PatchSum,
    strength: float,
    patch: object,
    offset: Offset,
    rows: slice,
    weight: Callable[[], torch.Tensor],
) -> bool:
    """Adds one patch; False where it is no sum of factors and rows."""
    n, k = _part(total.shape, offset)
    difference = _difference(patch)
    if difference is not None:
        total.add_difference(difference, strength, offset)
        return True
    if type(patch) not in _KNOWN:
        return False
    factors = factors_of(patch, (n, k), total.device)
    if factors is None:
        return False
    up, down, lost = factors
    kind, magnitude = _KNOWN[type(patch)], dora_of(patch)
    if magnitude is not None:
        if magnitude.shape[0] != n:
            return False  # scales columns, that is, inputs: not what the 4-bit product can take
        current = total.on_weight(weight().to(up.device))[rows]
        ratio = cast_to_device(magnitude, up.device, torch.float32).reshape(n, 1) / (
            current.norm(dim=1, keepdim=True) + torch.finfo(torch.float32).eps
        )
        total.scale_rows(1 + strength * (ratio - 1), rows)
        up, kind = up * ratio, f"DoRA, {kind}"
    total.ups.append(_padded(up * strength, 0, offset, total.shape))
    total.downs.append(_padded(down, 1, offset, total.shape))
    total.lost = max(total.lost, lost)
    total.kinds.append(kind)
    return True


def dora_of(patch: object) -> torch.Tensor | None:
    """The magnitude vector of a DoRA of any kind."""
    index = {LoRAAdapter: 4, LoHaAdapter: 7, LoKrAdapter: 8}.get(type(patch))
    return None if index is None else patch.weights[index]


def _difference(patch: object) -> torch.Tensor | None:
    """The tensor of ComfyUI's ("diff", (tensor,)), unless it may change the weight's shape."""
    if isinstance(patch, tuple) and len(patch) == 2 and patch[0] == "diff" and len(patch[1]) == 1:
        return patch[1][0]
    return None


def factors_of(
    adapter: object, part: tuple[int, int], device: torch.device | None = None
) -> Factors | None:
    """A LoRA's, LoHa's or LoKr's change of a part (N', K') of a weight at strength 1, as factors;
    None where low rank does not pay.
    """

    def cast(tensor: torch.Tensor) -> torch.Tensor:
        return cast_to_device(tensor, device or tensor.device, torch.float32)

    if isinstance(adapter, LoRAAdapter):
        return _lora_factors(adapter.weights, cast)
    if isinstance(adapter, LoHaAdapter):
        return _loha_factors(adapter.weights, part, cast)
    return _lokr_factors(adapter.weights, part, cast)


def _lora_factors(weights: tuple, cast: Callable) -> Factors | None:
    up, down, alpha, mid, _magnitude, reshape = weights
    if mid is not None or reshape is not None:
        return None
    scale = 1.0 if alpha is None else alpha / down.shape[0]
    return cast(up).flatten(1) * scale, cast(down).flatten(1), 0.0


def _loha_factors(weights: tuple, part: tuple[int, int], cast: Callable) -> Factors | None:
    a1, b1, alpha, a2, b2, mid1, mid2, _magnitude = weights
    if mid1 is not None or mid2 is not None or a1.shape[1] * a2.shape[1] > min(part):
        return None
    scale = 1.0 if alpha is None else alpha / b1.shape[0]
    a1, b1, a2, b2 = map(cast, (a1, b1, a2, b2))
    return _cut(
        (a1[:, :, None] * a2[:, None, :]).flatten(1) * scale,
        (b1[:, None, :] * b2[None, :, :]).flatten(0, 1),
        part,
    )


def _lokr_factors(weights: tuple, part: tuple[int, int], cast: Callable) -> Factors | None:
    first, second, alpha, a1, b1, a2, b2, mid, _magnitude = weights
    matrices = [tensor for tensor in (first, second) if tensor is not None]
    if mid is not None or any(tensor.dim() != 2 for tensor in matrices):
        return None
    inner = next((factor.shape[0] for factor in (b2, b1) if factor is not None), None)
    scale = 1.0 if alpha is None or inner is None else alpha / inner
    first = cast(a1) @ cast(b1) if first is None else cast(first)
    second = cast(a2) @ cast(b2) if second is None else cast(second)
    return _cut_kron(first * scale, second, part)


def _cut(up: torch.Tensor, down: torch.Tensor, part: tuple[int, int]) -> Factors | None:
    """up (N, r) · down (r, K) by the smallest rank that loses at most ENERGY of the product's
    energy.
    """
    left, right = torch.linalg.qr(up), torch.linalg.qr(down.T)
    u, s, v = torch.linalg.svd(left.R @ right.R.T)
    rank, lost = _rank(s)
    if rank > min(part) // MOST:
        return None
    root = s[:rank].sqrt()
    return (left.Q @ u[:, :rank]) * root, (right.Q @ v[:rank].T * root).T, lost


def _cut_kron(first: torch.Tensor, second: torch.Tensor, part: tuple[int, int]) -> Factors | None:
    """kron(first, second) by the smallest rank that loses at most ENERGY of its energy."""
    (u1, s1, v1), (u2, s2, v2) = (
        torch.linalg.svd(matrix, full_matrices=False) for matrix in (first, second)
    )
    values, order = torch.outer(s1, s2).flatten().sort(descending=True)
    rank, lost = _rank(values)
    if rank > min(part) // MOST:
        return None
    i, j, root = order[:rank] // len(s2), order[:rank] % len(s2), values[:rank].sqrt()
    up = (u1[:, None, i] * u2[None, :, j]).flatten(0, 1) * root
    return up, (v1[i][:, :, None] * v2[j][:, None, :]).flatten(1) * root[:, None], lost


def _rank(values: torch.Tensor) -> tuple[int, float]:
    """(smallest rank that loses at most ENERGY, share of the energy that it loses) of descending
    singular values.
    """
    tail = values.double().square().flip(0).cumsum(0).flip(0)
    if not tail.numel() or not tail[0] > 0:
        return 0, 0.0
    rank = int((tail > ENERGY * tail[0]).sum())
    return rank, float(tail[rank] / tail[0]) if rank < len(tail) else 0.0


def _part(shape: tuple[int, int], offset: Offset) -> tuple[int, int]:
    """Size of the part of a weight that an offset names."""
    if offset is None:
        return shape
    return (offset[2], shape[1]) if offset[0] == 0 else (shape[0], offset[2])


def _padded(
    factor: torch.Tensor, dimension: int, offset: Offset, shape: tuple[int, int]
) -> torch.Tensor:
    """A factor of a part with zeros where the rest of the weight's rows (of `up`) or columns (of
    `down`) are.
    """
    if offset is None or offset[0] != dimension:
        return factor
    before, after = offset[1], shape[dimension] - offset[1] - offset[2]
    pad = (before, after) if dimension else (0, 0, before, after)
    return torch.nn.functional.pad(factor, pad)


def check(patches: list[tuple], shape: tuple[int, int], name: str) -> None:
    """Raises DoesNotFit for a patch of rank 0 or of another shape than the layer `name`, (N, K)
    weights, or the part of it that it is for.
    """
    for _, patch, _, offset, _ in patches:
        kind, ranks, size = _sizes(patch)
        if 0 in ranks:
            raise DoesNotFit(
                f"A {kind} on {name} has rank 0, so it changes nothing: the file is damaged; take"
                " it out of the workflow or download it again."
            )
        part = _part(shape, offset)
        if size is not None and size != part:
            theirs, ours = (" x ".join(map(str, numbers)) for numbers in (size, part))
            raise DoesNotFit(
                f"{name} has {ours} weights there, but a {kind} in the workflow changes {theirs}:"
                " it was made for another model; take it out."
            )


def _sizes(patch: object) -> tuple[str, list[int], tuple[int, int] | None]:
    """(kind, inner ranks, size of the weight that it changes) of a patch; size None where ComfyUI
    itself decides what fits.
    """
    w = getattr(patch, "weights", None)
    kind = type(patch)
    if kind is LoRAAdapter and w[3] is None and w[5] is None:
        ranks = [w[0].shape[1], w[1].shape[0]]
        size = (w[0].shape[0], math.prod(w[1].shape[1:]))
        return "LoRA", ranks, size if ranks[0] == ranks[1] else (0, 0)
    if kind is LoHaAdapter and w[5] is None:
        return "LoHa", [w[1].shape[0], w[4].shape[0]], (w[0].shape[0], w[1].shape[1])
    if kind is LoKrAdapter and w[7] is None:
        # each of the two matrices is whole, or the product of two factors
        rows = [(w[0] if w[0] is not None else w[3]), (w[1] if w[1] is not None else w[5])]
        columns = [(w[0] if w[0] is not None else w[4]), (w[1] if w[1] is not None else w[6])]
        size = (math.prod(t.shape[0] for t in rows), math.prod(t.shape[1] for t in columns))
        return "LoKr", [factor.shape[0] for factor in (w[4], w[6]) if factor is not None], size
    difference = _difference(patch)
    if difference is not None:
        return "difference of weights", [], tuple(difference.shape)
    return "patch", [], None


def check_finite(patches: list[tuple], name: str) -> None:
    """Raises DoesNotFit for a patch that holds NaN or infinity: every picture would be black."""
    for _, patch, *_ in patches:
        # fp8 tensors, as some LoRAs are stored, have no isfinite of their own
        if not all(torch.isfinite(tensor.float()).all() for tensor in tensors_of(patch)):
            raise DoesNotFit(
                f"A LoRA on {name} holds numbers that are not finite, and pictures would be black:"
                " its training failed or the file is damaged; take it out of the workflow."
            )


def all_plain(patches: list[tuple]) -> bool:
    """Whether all are plain LoRAs, whose factors are at hand."""
    return all(
        type(patch) is LoRAAdapter and patch.weights[4] is None and strength_model == 1.0
        for _, patch, strength_model, *_ in patches
    )


def tensors_of(patch: object) -> list[torch.Tensor]:
    """The floating-point tensors of one of ComfyUI's patches."""
    parts = getattr(patch, "weights", patch)
    if isinstance(parts, torch.Tensor):
        return [parts] if parts.is_floating_point() else []
    if isinstance(parts, (tuple, list)):
        return [tensor for part in parts for tensor in tensors_of(part)]
    return []


def decibels(share: float) -> float:
    """A share of energy left out, in dB below the change."""
    return -10 * math.log10(share) if share else math.inf
