"""Changes folded into the format that a 4-bit layer has: what `svdquant_w4a4` and `awq_w4a16` files
and kernels can hold.

    joined      branch' = [branch | change], the codes untouched bit for bit. Exact beyond 16 bit;
      the branch is wider, and costs by its rank.
    cut         the same, cut back to a rank: its best approximation, in the smoothed space of the
      inputs, where the 4-bit part lives.
    refitted    codes and branch are fitted again to base + change, at the branch's own rank. No
      run-time cost. What the cut branch leaves over
                is part of what the codes are rounded from, so that much more of the change is kept
                than by cutting alone.
    rounded     plain 4-bit weights: base + change rounded to 4 bits again. Loses most of a small
      change.

Each says what share of the change was kept: 1 - |lost| / |change| in the space of the integers, not
below 0.
"""

import math
from dataclasses import replace

import torch
from torch import Tensor

from ..intlora.factors import balanced, thin_norm
from ..intlora.merge import BLOCK
from ..weights.packing import pack_int4
from .integer_grid import IntBase

SHARES = (1.0, 0.94, 0.88, 0.82, 0.76)  # of a group's largest magnitude that are tried as its range
# of float32 sums, relative to their result: adapters that cancel each other leave so much
ROUNDING = 1e-6
_BLOCK = 2**18  # weights that are rounded at once: what a processor's cache holds
EXTRA = 64  # components that a branch may grow by, for a change without low rank


def fold_into_branch(
    weight, down: Tensor, up: Tensor, rank: int | None = None, delta: Tensor | None = None
):
    """A change into the 16-bit branch of an `SVDQuantWeight` or `W4A16Weight`, whose 4-bit part
    stays as it is, bit for bit.

    down float (K, R), up float (N, R): the change's factors; R may be 0
    rank   of the new branch: None joins the two (their ranks add up, to a multiple of 16; nothing
      is lost beyond bf16). A number cuts the
           joined branch to its best approximation of that rank, in the smoothed space of the
           inputs: the layer's own rank costs nothing at run time.
    delta  float (N, K) | None: the rest of a change, without low rank. Its EXTRA largest components
      are added, or what `rank` has room for.
    Returns the new weight and the share of the change that was kept (1 - |lost| / |change| in that
    space, not below 0).
    """
    old_down, old_up, smooth = _branch_of(weight)
    down, up = down.to(old_down), up.to(old_up)
    joined_down, joined_up = torch.cat([old_down, down], 1), torch.cat([old_up, up], 1)
    wanted = (
        multiple(joined_down.shape[1] + (0 if delta is None else EXTRA)) if rank is None else rank
    )
    if delta is not None:
        delta = delta.to(old_down)
        joined_up, thin = _leading(
            (delta + joined_up @ joined_down.T) * smooth, min(wanted, *weight.shape)
        )
        joined_down = thin.T / smooth[:, None]
    elif rank is not None and rank < joined_down.shape[1]:
        joined_up, thin = balanced(joined_up, (joined_down * smooth[:, None]).T, rank)
        joined_down = thin.T / smooth[:, None]
    pad, dtype = (0, wanted - joined_down.shape[1]), weight.scale.dtype
    new = replace(
        weight,
        proj_down=torch.nn.functional.pad(joined_down, pad).to(dtype),
        proj_up=torch.nn.functional.pad(joined_up, pad).to(dtype),
    )
    terms = [
        (new.proj_up.float(), new.proj_down.float(), 1.0),
        (old_up, old_down, -1.0),
        (up, down, -1.0),
    ]
    if delta is None:
        lost, size = thin_norm(terms, smooth), thin_norm([(up, down, 1.0)], smooth)
    else:
        lost = ((sum(sign * u @ d.T for u, d, sign in terms) - delta) * smooth).norm().item()
        size = ((up @ down.T + delta) * smooth).norm().item()
    return new, 1.0 if size == 0 else max(0.0, 1 - lost / size)


def multiple(rank: int) -> int:
    """A rank rounded up to a multiple of 16, as kernels like it."""
    return rank + -rank % 16


def _branch_of(weight) -> tuple[Tensor, Tensor, Tensor]:
    """(down (K, R), up (N, R), smoothing (K,)), float32, of a stored weight; a plain one has
    neither. Runs of rows that are smoothed unlike one another (P, K) are weighed by their mean.
    """
    n, k = weight.shape
    if weight.proj_down is None:
        empty = weight.scale.new_zeros(1, dtype=torch.float32)
        return empty.expand(k, 1)[:, :0], empty.expand(n, 1)[:, :0], empty.new_ones(k)
    smooth = getattr(weight, "smooth_factor", None)
    smooth = (
        torch.ones(k, device=weight.scale.device)
        if smooth is None
        else smooth.float()
        if smooth.dim() == 1
        else smooth.float().abs().mean(0)
    )
    return weight.proj_down.float(), weight.proj_up.float(), smooth


def _leading(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The largest components of a matrix (N, K): up (N, rank), down (rank, K). Subspace iteration
    from a fixed start (Halko, Martinsson, Tropp 2011, algorithm 4.4, arXiv:0909.4061).
    """
    generator = torch.Generator(matrix.device).manual_seed(0)
    basis = torch.linalg.qr(
        matrix
        @ torch.randn(
            matrix.shape[1],
            min(rank + 16, *matrix.shape),
            generator=generator,
            device=matrix.device,
        )
    ).Q
    for _ in range(4):
        basis = torch.linalg.qr(matrix @ torch.linalg.qr(matrix.T @ basis).Q).Q
    u, s, v = torch.linalg.svd(basis.T @ matrix, full_matrices=False)
    root = s[:rank].sqrt()
    return basis @ (u[:, :rank] * root), root[:, None] * v[:rank]


def refit(weight, down: Tensor, up: Tensor, delta: Tensor | None = None, rounds: int = 2):
    """Base and change in one `SVDQuantWeight` of the base's own rank: branch, codes and scales are
    fitted to their sum, data-free.

    down float (K, r), up float (N, r), delta float (N, K) | None: the change on raw inputs, as in
    `fold_into_branch`
    rounds  how often codes and branch are fitted in turns
    Returns the new weight and the share of the change that was kept. A change below ROUNDING of the
    weight gives the weight itself.
    """
    base, (old_down, old_up, _) = IntBase.of(weight), _branch_of(weight)
    down, up = down.to(old_down), up.to(old_up)
    change = base.into(up @ down.T if delta is None else delta.to(old_down) + up @ down.T)
    codes, size, new = base.weight(), change.norm().item(), weight
    wanted = codes + old_up @ base.into(old_down.T.contiguous())
    if size <= ROUNDING * wanted.norm().item():
        return weight, 1.0
    wanted += change
    for _ in range(rounds):
        part, thin = _leading(wanted - codes, weight.rank)
        new = replace(
            new,
            proj_up=part.to(weight.proj_up.dtype),
            proj_down=base.out_of(thin).T.contiguous().to(weight.proj_down.dtype),
        )
        beside = new.proj_up.float() @ base.into(new.proj_down.float().T.contiguous())
        new = _with_codes(new, wanted - beside)
        codes = IntBase.of(new).weight()
    lost = (codes + beside - wanted).norm().item()
    return same_bias(weight, new), max(0.0, 1 - lost / size)


def _with_codes(weight, target: Tensor):
    """An `SVDQuantWeight` whose 4-bit part is fitted to float32 (N, K) of the space of its
    integers; each group by its old scale or by a new one.
    """
    pieces, step = [], max(1, _BLOCK // target.shape[1])
    for row in range(0, target.shape[0], step):
        base = IntBase.of(weight).rows(row, row + step)
        pieces.append(_closest(base, target[row : row + step], signed=True))
    return replace(
        weight,
        qweight=torch.cat([codes for codes, _ in pieces]),
        scale=torch.cat([scale for _, scale in pieces], 1),
    )


def same_bias(old, new):
    """The new weight with the bias that the old one really has: unsigned activations fold a part of
    the codes into the stored one.
    """
    if not (old.act_unsigned or old.unsigned_from):
        return new
    fold = replace(new, bias=None).effective_bias()
    return replace(
        new,
        bias=(old.effective_bias() - fold).to(
            old.scale.dtype if old.bias is None else old.bias.dtype
        ),
    )


def fold_into_codes(weight, merged: IntBase):
    """A merged plain base rounded to 4 bits again, in the form of a `W4A16Weight`: no run-time
    cost, and most of a small change is lost.

    Scales are searched anew where that is closer. Returns the new weight and the share of the
    change that was kept, not below 0.
    """
    pieces, lost, size = [], 0.0, 0.0
    step = max(1, BLOCK // merged.shape[1])
    for row in range(0, merged.shape[0], step):
        old, target = (
            weight.rows(row, row + step),
            merged.rows(row, row + step).weight(torch.float64),
        )
        pieces.append(_rounded_again(old, target))
        lost += (IntBase.of(pieces[-1]).weight(torch.float64) - target).square().sum().item()
        size += (IntBase.of(old).weight(torch.float64) - target).square().sum().item()
    return weight.cat(pieces), 1.0 if size == 0 else max(0.0, 1 - math.sqrt(lost / size))


def _rounded_again(weight, target: Tensor):
    """Rows of a `W4A16Weight` moved to a target float64 (N, K), each group by its old scale or by a
    new one, whichever is closer.
    """
    base = IntBase.of(weight)
    codes, scale = _closest(
        base,
        target if weight.zeros is None else target - base.spread(weight.zeros, torch.float64),
        signed=False,
    )
    return replace(weight, qweight=codes, scale=scale)


def _closest(base: IntBase, target: Tensor, signed: bool) -> tuple[Tensor, Tensor]:
    """(packed codes, scale (G, N)) of the levels closest to a float target (N, K): each group by
    its old scale, or by a new one where that is closer.

    A new scale puts the code -8 on the group's largest magnitude, whatever its sign, or on a share
    of it.
    """
    parts = target.unflatten(1, (-1, base.group))
    extreme = parts.gather(-1, parts.abs().argmax(-1, keepdim=True))[..., 0]  # (N, G)
    best, kept = None, None
    for scale in (base.scale.T, *(-extreme * (share / 8) for share in SHARES)):
        scale = scale.to(base.scale.dtype)
        error = _round(parts, scale)[1].square_().sum(-1)
        better = None if best is None else error < best
        best, kept = (
            (error, scale)
            if better is None
            else (torch.where(better, error, best), torch.where(better, scale, kept))
        )
    codes = _round(parts, kept)[0].flatten(1)
    return pack_int4(codes.to(torch.int8) + (0 if signed else 8)), kept.T.contiguous()


def _round(parts: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """(codes -8..7, what they miss of the target) of groups (N, G, group) by one scale each
    (N, G).
    """
    step = _nonzero(scale.to(parts.dtype))[..., None]
    codes = (parts / step).round_().clamp_(-8, 7)
    return codes, torch.addcmul(parts, codes, torch.where(step.isinf(), 0, step), value=-1)


def _nonzero(scale: Tensor) -> Tensor:
    return torch.where(scale == 0, torch.inf, scale)


def rounded_to_base(base: IntBase, delta: Tensor) -> Tensor:
    """What is left of a change, float (N, K) in the base's space, when base + change is rounded to
    the base's own levels; in its dtype.
    """
    low, high = -(2 ** (base.bits - 1)), 2 ** (base.bits - 1) - 1
    scale, z = base.spread(base.scale, delta.dtype), base.integers()
    steps = delta / _nonzero(scale)
    if base.odd:
        return ((((z + steps - 1) / 2).round().clamp(low, high) * 2 + 1) - z) * scale
    return ((z + steps).round().clamp(low, high) - z) * scale
