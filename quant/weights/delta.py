"""The change of a linear's weight, one record for all that changes one: a LoRA, a DoRA, an IntLoRA,
a difference of weights.

    W (N, K)  →  row_scale ⊙ W + up · downᵀ + dense

Low rank is LoRA's (Hu et al., 2021, arXiv:2106.09685), the row scale DoRA's (Liu et al., 2024,
arXiv:2402.09353): it multiplies the weight alone and not the change that is added.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

RANK_STEP = 16  # kernels read a low-rank branch in steps of this
# What ComfyUI writes of a patched layer beside its format's own tensors when it saves a model: the
# field of a WeightDelta, the tensor's name and its shape (S: the rank of the change).
SIDE = {
    "dense": ("weight_delta", "N,K"),
    "row_scale": ("weight_row_scale", "N"),
    "row_fold": ("weight_row_fold", "N"),
    "down": ("weight_side_down", "K,S"),
    "up": ("weight_side_up", "N,S"),
}


def round_rank(rank: int) -> int:
    """A rank rounded up to a multiple of RANK_STEP."""
    return rank + -rank % RANK_STEP


def pad_rank(factor: Tensor) -> Tensor:
    """(…, r) with columns of zeros up to `round_rank(r)`."""
    return torch.nn.functional.pad(factor, (0, -factor.shape[1] % RANK_STEP))


@dataclass(frozen=True, eq=False)
class WeightDelta:
    """A change of a weight (N, K); what is None changes nothing.

    down, up   float (K, R), (N, R): the low-rank part; both or neither
    dense      float (N, K)
    row_scale  float (N,): multiplies the weight's rows before the rest is added
    row_fold   float (N,): what the layer's output holds beyond its stored bias, as unsigned
      activations fold it in; row_scale must leave it alone
    """

    down: Tensor | None = None
    up: Tensor | None = None
    dense: Tensor | None = None
    row_scale: Tensor | None = None
    row_fold: Tensor | None = None

    @property
    def rank(self) -> int:
        """R of the low-rank part, 0 without one."""
        return 0 if self.up is None else self.up.shape[1]

    @property
    def factors(self) -> tuple[Tensor, Tensor] | None:
        """(down, up) of the low-rank part; None without one."""
        if self.up is None:
            return None
        assert self.down is not None  # both or neither
        return self.down, self.up

    @property
    def is_empty(self) -> bool:
        """Whether it leaves a weight as it is."""
        return self.up is None and self.dense is None and self.row_scale is None

    def for_inputs(self, k: int) -> WeightDelta:
        """The same change of a weight with columns of zeros behind its own, K in all."""

        def pad(tensor: Tensor | None, dim: int) -> Tensor | None:
            missing = 0 if tensor is None else k - tensor.shape[dim]
            if tensor is None or not missing:
                return tensor
            return torch.nn.functional.pad(tensor, (0, missing) if dim else (0, 0, 0, missing))

        return replace(self, down=pad(self.down, 0), dense=pad(self.dense, 1))

    def to(self, *args, **kwargs) -> WeightDelta:
        """The same with every tensor moved as by Tensor.to."""
        moved = {name: tensor.to(*args, **kwargs) for name, tensor in self._tensors().items()}
        return replace(self, **moved)

    def _tensors(self) -> dict[str, Tensor]:
        return {name: value for name, value in vars(self).items() if value is not None}

    def on_weight(self, weight: Tensor) -> Tensor:
        """The changed weight, float32 (N, K), of the float32 one."""
        if self.row_scale is not None:
            weight = weight * self.row_scale[:, None]
        if self.factors is not None:
            down, up = self.factors
            weight = weight + up.float() @ down.float().T
        if self.dense is not None:
            weight = weight + self.dense.float()
        return weight

    def on_output(self, y: Tensor, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """The changed layer's output (…, N) for x (…, K), of its plain output y and the bias
        stored with it. The tensors are cast to x, wherever they are.
        """

        def like_x(tensor: Tensor, dtype: torch.dtype = x.dtype) -> Tensor:
            return tensor.to(x.device, dtype, non_blocking=x.is_cuda)

        if self.row_scale is not None:
            if self.row_fold is not None:
                fold = like_x(self.row_fold)
                bias = fold if bias is None else bias + fold
            y = _scale_rows_of_output(y, like_x(self.row_scale, torch.float32), bias)
        if self.factors is not None:
            down, up = self.factors
            y = y + torch.nn.functional.linear(x @ like_x(down), like_x(up))
        if self.dense is not None:
            y = y + torch.nn.functional.linear(x, like_x(self.dense))
        return y

    def then(self, later: WeightDelta) -> WeightDelta:
        """This change and a later one as one: what is there already is scaled with the weight."""
        up, dense, scale = self.up, self.dense, self.row_scale
        if later.row_scale is not None:
            rows = later.row_scale[:, None]
            up = None if up is None else up * rows
            dense = None if dense is None else dense * rows
            scale = later.row_scale if scale is None else scale * later.row_scale
        return WeightDelta(
            down=_side_by_side(self.down, later.down),
            up=_side_by_side(up, later.up),
            dense=_sum(dense, later.dense),
            row_scale=scale,
            row_fold=self.row_fold if later.row_fold is None else later.row_fold,
        )


def append_factors(
    down: Tensor, up: Tensor, change: WeightDelta, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """A low-rank branch (K, R), (N, R) with a change's factors behind its own, in `dtype`. Raises
    ValueError for a change without low-rank part.
    """
    if change.factors is None:
        raise ValueError("a change without low-rank part has no factors to append")
    more_down, more_up = change.factors
    return (
        torch.cat([down.to(dtype), more_down.to(down.device, dtype)], 1),
        torch.cat([up.to(dtype), more_up.to(up.device, dtype)], 1),
    )


def _scale_rows_of_output(y: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    """scale ⊙ (y - bias) + bias, in y's dtype, with the bias that y really has."""
    if bias is None:
        return (y * scale).to(y.dtype)
    return torch.addcmul((1 - scale) * bias.float(), y.float(), scale).to(y.dtype)


def _side_by_side(first: Tensor | None, second: Tensor | None) -> Tensor | None:
    factors = [factor for factor in (first, second) if factor is not None]
    return torch.cat(factors, 1) if factors else None


def _sum(first: Tensor | None, second: Tensor | None) -> Tensor | None:
    if first is None or second is None:
        return second if first is None else first
    return first + second
