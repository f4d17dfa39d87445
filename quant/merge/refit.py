"""Changes folded into the format that a low-bit layer has: what `svdquant_w4a4`, `awq_w4a16` and
`vq` files and kernels can hold.

    joined      branch' = [branch | change], the codes untouched bit for bit. Exact beyond 16 bit;
      the branch is wider, and costs by its rank.
    cut         the same, cut back to a rank: its best approximation, in the smoothed space of the
      inputs, where the 4-bit part lives.
    refitted    codes and branch are fitted again to base + change, at the branch's own rank. No
      run-time cost. What the cut branch leaves over is part of what the codes are rounded from, so
      that much more of the change is kept than by cutting alone.

Each says what share of the change is retained: 1 - |lost| / |change| in the space of the integers,
not below 0.
"""

from dataclasses import replace

import torch
from torch import Tensor

from ..weights.delta import WeightDelta, round_rank
from ..weights.formats import AnyWeight, Weight
from ..weights.lowrank import balanced, leading_components, thin_norm
from ..weights.packing import pack_int4
from ..weights.svdquant_w4a4 import SVDQuantWeight
from .integer_grid import IntBase

SHARES = (1.0, 0.94, 0.88, 0.82, 0.76)  # of a group's largest magnitude that are tried as its range
# of float32 sums, relative to their result: adapters that cancel each other leave so much
ROUNDING = 1e-6
_BLOCK = 2**18  # weights that are rounded at once: what a processor's cache holds
EXTRA = 64  # components that a branch may grow by, for a change without low rank


def fold_into_branch(
    weight: AnyWeight, change: WeightDelta, rank: int | None = None
) -> tuple[AnyWeight, float]:
    """A change into the 16-bit branch of a weight whose low-bit part stays as it is, bit for bit.

    change  without a row scale; of a dense part the EXTRA largest components are added, or what
      `rank` has room for
    rank    of the new branch: None joins the two (their ranks add up, to a multiple of 16; nothing
      is lost beyond bf16). A number cuts the joined branch to its best approximation of that rank,
      in the smoothed space of the inputs: the layer's own rank costs nothing at run time.
    Returns the new weight and the share of the change that is retained (1 - |lost| / |change| in
    that space, not below 0).
    """
    old_down, old_up, smooth = _branch_of(weight)
    down, up, dense = _parts_of(change, old_down, old_up)
    joined_down, joined_up = torch.cat([old_down, down], 1), torch.cat([old_up, up], 1)
    wanted = rank
    if wanted is None:
        wanted = round_rank(joined_down.shape[1] + (0 if dense is None else EXTRA))
    if dense is not None:
        joined_up, thin = leading_components(
            (dense + joined_up @ joined_down.T) * smooth, min(wanted, *weight.shape)
        )
        joined_down = thin.T / smooth[:, None]
    elif rank is not None and rank < joined_down.shape[1]:
        joined_up, thin = balanced(joined_up, (joined_down * smooth[:, None]).T, rank)
        joined_down = thin.T / smooth[:, None]
    pad, dtype = (0, wanted - joined_down.shape[1]), weight.branch_dtype
    stored_down = torch.nn.functional.pad(joined_down, pad).to(dtype)
    stored_up = torch.nn.functional.pad(joined_up, pad).to(dtype)
    new = replace(weight, proj_down=stored_down, proj_up=stored_up)
    terms = [
        (stored_up.float(), stored_down.float(), 1.0),
        (old_up, old_down, -1.0),
        (up, down, -1.0),
    ]
    if dense is None:
        lost, size = thin_norm(terms, smooth), thin_norm([(up, down, 1.0)], smooth)
    else:
        lost = ((sum(sign * u @ d.T for u, d, sign in terms) - dense) * smooth).norm().item()
        size = ((up @ down.T + dense) * smooth).norm().item()
    return new, 1.0 if size == 0 else max(0.0, 1 - lost / size)


def _branch_of(weight: Weight) -> tuple[Tensor, Tensor, Tensor]:
    """(down (K, R), up (N, R), smoothing (K,)), float32, of a stored weight; a plain one has
    neither. Runs of rows that are smoothed unlike one another (P, K) are weighed by their mean.
    """
    n, k = weight.shape
    if weight.factors is None:
        empty = torch.zeros(1, device=weight.device)
        return empty.expand(k, 1)[:, :0], empty.expand(n, 1)[:, :0], empty.new_ones(k)
    smooth = getattr(weight, "smooth_factor", None)
    if smooth is None:
        smooth = torch.ones(k, device=weight.device)
    elif smooth.dim() == 1:
        smooth = smooth.float()
    else:
        smooth = smooth.float().abs().mean(0)
    down, up = weight.factors
    return down.float(), up.float(), smooth


def _parts_of(
    change: WeightDelta, old_down: Tensor, old_up: Tensor
) -> tuple[Tensor, Tensor, Tensor | None]:
    """(down (K, R), up (N, R), dense or None) of a change, as the old factors are; R is 0 without a
    low-rank part.
    """
    if change.row_scale is not None:
        raise ValueError("a row scale belongs into the weight's own scales before it is refitted")
    dense = None if change.dense is None else change.dense.to(old_down)
    if change.factors is None:
        return old_down.new_zeros(len(old_down), 0), old_up.new_zeros(len(old_up), 0), dense
    down, up = change.factors
    return down.to(old_down), up.to(old_up), dense


def refit(
    weight: SVDQuantWeight, change: WeightDelta, rounds: int = 2
) -> tuple[SVDQuantWeight, float]:
    """Base and change in one weight of the base's own rank: branch, codes and scales are fitted to
    their sum, data-free.

    change  on raw inputs, as in `fold_into_branch`
    rounds  how often codes and branch are fitted in turns
    Returns the new weight and the share of the change that is retained. A change below ROUNDING of
    the weight gives the weight itself.
    """
    base, (old_down, old_up, _) = IntBase.of(weight), _branch_of(weight)
    down, up, dense = _parts_of(change, old_down, old_up)
    wanted_change = base.into(up @ down.T if dense is None else dense + up @ down.T)
    codes, size, new = base.weight(), wanted_change.norm().item(), weight
    target = codes + old_up @ base.into(old_down.T.contiguous())
    if size <= ROUNDING * target.norm().item():
        return weight, 1.0
    target += wanted_change
    for _ in range(rounds):
        part, thin = leading_components(target - codes, weight.rank)
        new = replace(
            new,
            proj_up=part.to(weight.proj_up.dtype),
            proj_down=base.out_of(thin).T.contiguous().to(weight.proj_down.dtype),
        )
        branch = new.proj_up.float() @ base.into(new.proj_down.float().T.contiguous())
        new = _with_codes(new, target - branch)
        codes = IntBase.of(new).weight()
    lost = (codes + branch - target).norm().item()
    return same_bias(weight, new), max(0.0, 1 - lost / size)


def _with_codes(weight: SVDQuantWeight, target: Tensor) -> SVDQuantWeight:
    """An `SVDQuantWeight` whose 4-bit part is fitted to float32 (N, K) of the space of its
    integers; each group by its old scale or by a new one.
    """
    pieces, step = [], max(1, _BLOCK // target.shape[1])
    for row in range(0, target.shape[0], step):
        base = IntBase.of(weight).rows(row, row + step)
        pieces.append(_closest(base, target[row : row + step]))
    return replace(
        weight,
        qweight=torch.cat([codes for codes, _ in pieces]),
        scale=torch.cat([scale for _, scale in pieces], 1),
    )


def same_bias(old: SVDQuantWeight, new: SVDQuantWeight) -> SVDQuantWeight:
    """The new weight with the bias that the old one really has: unsigned activations fold a part of
    the codes into the stored one.
    """
    if not (old.act_unsigned or old.unsigned_from):
        return new
    fold, real = replace(new, bias=None).effective_bias(), old.effective_bias()
    assert fold is not None and real is not None  # unsigned inputs fold something into any bias
    dtype = old.scale.dtype if old.bias is None else old.bias.dtype
    return replace(new, bias=(real - fold).to(dtype))


def _closest(base: IntBase, target: Tensor) -> tuple[Tensor, Tensor]:
    """(packed signed codes, scale (G, N)) of the levels closest to a float target (N, K): each
    group by its old scale, or by a new one where that is closer.

    A new scale puts the code -8 on the group's largest magnitude, whatever its sign, or on a share
    of it.
    """
    parts = target.unflatten(1, (-1, base.group))
    extreme = parts.gather(-1, parts.abs().argmax(-1, keepdim=True))[..., 0]  # (N, G)
    chosen = base.scale.T
    least = _round(parts, chosen)[1].square_().sum(-1)
    for share in SHARES:
        scale = (-extreme * (share / 8)).to(base.scale.dtype)
        error = _round(parts, scale)[1].square_().sum(-1)
        better = error < least
        least, chosen = torch.where(better, error, least), torch.where(better, scale, chosen)
    codes = _round(parts, chosen)[0].flatten(1)
    return pack_int4(codes.to(torch.int8)), chosen.T.contiguous()


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
