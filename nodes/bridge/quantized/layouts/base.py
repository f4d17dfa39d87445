"""What every format's layout does alike."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from comfy.quant_ops import QuantizedLayout, QuantizedTensor

from .....quant.weights.base import StoredWeight
from .....quant.weights.delta import SIDE, WeightDelta, append_factors
from .tensor import HookCell, LayoutParams, Tensors

_REFUSAL = (
    "A 4-bit Nibble weight is made once, from the 16-bit model (SVDQuant Quantize Checkpoint); "
    "it cannot be requantized while sampling."
)


class Layout(QuantizedLayout):
    """What all formats share: the way to and from the tensors of `quant.weights`, and a linear's
    arithmetic around the format's own product.
    """

    FORMAT = ""
    Params = LayoutParams

    @classmethod
    def read(cls, tensors: Tensors, settings: dict, dtype: torch.dtype) -> LayoutParams:
        """The parameters, out of a layer's tensors by their short names and its JSON."""
        raise NotImplementedError

    @classmethod
    def settings(cls, params: LayoutParams) -> dict:
        """The layer's JSON."""
        raise NotImplementedError

    @classmethod
    def stored(
        cls, qdata: torch.Tensor, params: LayoutParams, bias: torch.Tensor | None = None
    ) -> StoredWeight:
        """The weight as the arithmetic of `quant.weights` knows it, without `params.side`."""
        raise NotImplementedError

    @classmethod
    def stored_inputs(cls, weight: QuantizedTensor) -> int:
        """Columns of the matrix in the file: K, or K and zeros up to whole groups."""
        return nibble_shape(weight._qdata)[1]

    @classmethod
    def product(
        cls,
        x: torch.Tensor,
        weight: QuantizedTensor,
        bias: torch.Tensor | None,
        changes: Sequence[WeightDelta],
    ) -> tuple[torch.Tensor, Sequence[WeightDelta]]:
        """(the format's own product (…, N), the changes that it did not take into it)."""
        raise NotImplementedError

    @classmethod
    def linear(
        cls,
        x: torch.Tensor,
        weight: QuantizedTensor,
        bias: torch.Tensor | None,
        changes: Sequence[WeightDelta] = (),
    ) -> torch.Tensor:
        """x (…, K) → (…, N) in x's dtype, with all that patches added to the weight, then the
        changes, in order.
        """
        params, stored = weight.params, cls.stored_inputs(weight)
        if stored != params.orig_shape[1]:
            x = torch.nn.functional.pad(x, (0, stored - params.orig_shape[1]))
            changes = [change.for_inputs(stored) for change in changes]
        y, rest = cls.product(x, weight, bias, changes)
        for change in (params.side, *rest):
            y = change.on_output(y, x, bias)
        return y if params.hooked is None else params.hooked.on_output(y, x)

    @classmethod
    def quantize(cls, tensor, **kwargs):
        raise NotImplementedError(_REFUSAL)

    @classmethod
    def dequantize(cls, qdata: torch.Tensor, params: LayoutParams) -> torch.Tensor:
        """(N, K) in `orig_dtype`: the weight that raw x sees, low rank and patches included."""
        plain = cls.stored(qdata, params).dequantize()
        whole = params.side.on_weight(plain.float()).to(params.orig_dtype)
        return whole[:, : params.orig_shape[1]]

    @classmethod
    def get_plain_tensors(cls, qtensor: QuantizedTensor) -> tuple[torch.Tensor, ...]:
        return (qtensor._qdata, *qtensor.params.tensors().values())

    @classmethod
    def state_dict_tensors(cls, qdata: torch.Tensor, params: LayoutParams) -> Tensors:
        """Suffix to `X.weight` → tensor: the file's names."""
        named = {f"_{name}": tensor for name, tensor in params.tensors().items()}
        return {"": qdata} | named


def shared_fields(tensors: Tensors, dtype: torch.dtype) -> dict:
    """The fields that every format reads alike."""
    names = ["weight_proj_down", "weight_proj_up", *(name for name, _ in SIDE.values())]
    fields = {name.removeprefix("weight_"): tensors.get(name) for name in names}
    return {"orig_dtype": dtype, "hook": HookCell(), **fields}


def nibble_shape(codes: torch.Tensor) -> tuple[int, int]:
    """(N, K) of packed 4-bit codes (N, K/2)."""
    return codes.shape[0], codes.shape[1] * 2


def in_the_branch(
    params: LayoutParams, changes: Sequence[WeightDelta], dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor, list[WeightDelta]]:
    """(down, up, what is left): changes' factors join the layer's own low-rank branch, up to the
    first change with more than factors: one that scales rows would scale theirs, too.
    """
    down, up, rest = params.proj_down, params.proj_up, []
    for change in changes:
        scaled = change.row_scale is not None or params.row_scale is not None
        if change.up is not None and not scaled and not rest:
            down, up = append_factors(down, up, change, dtype)
            change = WeightDelta(dense=change.dense)
        if not change.is_empty:
            rest.append(change)
    return down, up, rest
