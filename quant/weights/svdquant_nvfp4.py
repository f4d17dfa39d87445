"""A linear of 4-bit floats with a low-rank branch (SVDQuant on NVFP4), on disk and in memory.

    y = sum over parts p of  (Q(x_p / smooth_p) . (E2M1 * scale_p)^T) * scale_2[p]
        + (x . proj_down) . proj_up^T + bias

`kernels/reference/nvfp4.py` says how inputs are rounded. A part is a run of input columns with row
scales of its own: one, or as many as linears were joined along K (FLUX's linear2). All inputs are
signed.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ...kernels import ops
from ...kernels.params import NVFP4Params
from ...kernels.reference import nvfp4 as reference
from .base import StoredWeight
from .fuse import own_columns
from .svdquant_w4a4 import spans


@dataclass
class NVFP4Weight(StoredWeight):
    """N outputs, K inputs, R rank, P parts.

    Shapes:
        qweight        int8 (N, K/2)    two e2m1 codes a byte, bit 3 the sign; low nibble = even
          column
        scale          e4m3 (N, K/16)
        scale_2        float32 (P, N)
        proj_down      16 bit (K, R)    acts on raw x
        proj_up        16 bit (N, R)
        smooth_factor  16 bit (K,)      nonzero
        bias           16 bit (N,) | None
    scale_columns: widths of the parts; (): one of all columns. rounded: inputs are coded by the
        rounded scale (Nibble's own files), not by the exact one (Nunchaku's).
    """

    qweight: Tensor
    scale: Tensor
    scale_2: Tensor
    proj_down: Tensor
    proj_up: Tensor
    smooth_factor: Tensor
    bias: Tensor | None = None
    scale_columns: tuple[int, ...] = ()
    rounded: bool = False

    FORMAT = "svdquant_nvfp4"
    SUFFIXES = {
        "qweight": "weight",
        "scale": "weight_scale",
        "scale_2": "weight_scale_2",
        "proj_down": "weight_proj_down",
        "proj_up": "weight_proj_up",
        "smooth_factor": "weight_smooth_factor",
        "bias": "bias",
    }
    OUTPUT_DIM = {"qweight": 0, "scale": 0, "scale_2": 1, "proj_up": 0, "bias": 0}

    def __post_init__(self):
        n, k = self.shape
        r = self.proj_down.shape[-1]
        self.scale_columns = tuple(self.scale_columns)
        if k % 64:
            raise ValueError(f"K={k} is not a multiple of the group size 64")
        if self.scale_columns and (
            sum(self.scale_columns) != k or any(w % 64 or w < 1 for w in self.scale_columns)
        ):
            raise ValueError(
                f"scale_columns={self.scale_columns} must be widths in whole groups of 64 that add"
                f" up to K={k}"
            )
        self._check_shapes(
            f"a {n} x {k} linear of rank {r}",
            {
                "scale": (n, k // reference.COLUMNS),
                "scale_2": (len(self.scale_columns) or 1, n),
                "proj_down": (k, r),
                "proj_up": (n, r),
                "smooth_factor": (k,),
                "bias": (n,),
            },
        )

    @property
    def shape(self) -> tuple[int, int]:
        return self.qweight.shape[0], self.qweight.shape[1] * 2

    @property
    def rank(self) -> int:
        """R of the low-rank branch."""
        return self.proj_down.shape[1]

    @property
    def branch_dtype(self) -> torch.dtype:
        return self.proj_down.dtype

    def facts(self) -> dict:
        options = {"scale_columns": list(self.scale_columns), "rounded": self.rounded}
        return {"format": self.FORMAT, "rank": self.rank} | {
            name: value for name, value in options.items() if value
        }

    @classmethod
    def from_tensors(cls, tensors: dict[str, Tensor], prefix: str) -> "NVFP4Weight":
        """The inverse of `tensors`. Raises ValueError for a missing tensor, another format, or an
        option that it does not know.
        """
        parts, facts = cls._read(tensors, prefix)
        cls._refuse_unknown(prefix, facts, {"format", "rank", "scale_columns", "rounded"})
        weight = cls(
            **parts,
            scale_columns=tuple(facts.get("scale_columns", ())),
            rounded=bool(facts.get("rounded", False)),
        )
        if facts.get("rank", weight.rank) != weight.rank:
            raise ValueError(f"{prefix} says rank {facts['rank']}, its factors have {weight.rank}")
        return weight

    def residual(self) -> Tensor:
        """The 4-bit part as a matrix on raw x, float32 (N, K)."""
        plain = reference.decoded_weight(self.qweight, self.scale, torch.float32)
        widths = torch.tensor(self.scale_columns or (self.shape[1],), device=plain.device)
        rows = self.scale_2.float().repeat_interleave(widths, 0)
        return plain * rows.T / self.smooth_factor.float()

    def dequantize(self) -> Tensor:
        """The whole matrix on raw x, float32 (N, K)."""
        return self.residual() + self.proj_up.float() @ self.proj_down.float().T

    def effective_bias(self) -> Tensor | None:
        """The bias that goes with `dequantize`, float32 (N,) | None."""
        return None if self.bias is None else self.bias.float()

    def forward(self, x: Tensor) -> Tensor:
        """x (..., K) → (..., N) in x's dtype; parts are added in float32 where x is 16 bit."""
        return linear_nvfp4(x, self, self.proj_down, self.proj_up)

    def rows(self, start: int, stop: int) -> "NVFP4Weight":
        """The linear that computes outputs start..stop; shares the rest with the whole."""
        return replace(self, **self._output_slices(start, stop))

    @staticmethod
    def cat(pieces: Sequence["NVFP4Weight"]) -> "NVFP4Weight":
        """The inverse of `rows`. Raises ValueError unless all pieces share proj_down, smooth_factor
        and options.
        """
        first = pieces[0]
        if any(
            p.facts() != first.facts()
            or not torch.equal(p.proj_down, first.proj_down)
            or not torch.equal(p.smooth_factor, first.smooth_factor)
            for p in pieces
        ):
            raise ValueError(
                "only pieces with one proj_down, smooth_factor and set of options can be joined"
                " along N"
            )
        return replace(first, **NVFP4Weight._joined_outputs(pieces))


def linear_nvfp4(x: Tensor, w: "NVFP4Weight", proj_down: Tensor, proj_up: Tensor) -> Tensor:
    """x (..., K) → (..., N) in x's dtype, with these factors in the place of w's own."""
    if not w.scale_columns:
        p = NVFP4Params(
            w.qweight, w.scale, w.scale_2[0], w.smooth_factor, proj_down, proj_up, w.bias, w.rounded
        )
        return ops.linear_nvfp4(x, p)
    y = None
    for i, (a, b) in enumerate(spans(w.scale_columns)):
        last = i == len(w.scale_columns) - 1
        p = NVFP4Params(
            w.qweight[:, a // 2 : b // 2].contiguous(),
            w.scale[:, a // reference.COLUMNS : b // reference.COLUMNS].contiguous(),
            w.scale_2[i],
            w.smooth_factor[a:b],
            proj_down[a:b],
            proj_up,
            w.bias if last else None,
            w.rounded,
        )
        part = ops.linear_nvfp4(x[..., a:b], p)
        y = part if y is None else y + part
    assert y is not None
    return y


def join_rows(pieces: Sequence[NVFP4Weight]) -> NVFP4Weight:
    """One linear whose outputs are those of the pieces one behind the other. Raises ValueError
    unless they read and smooth one input alike.
    """
    first = pieces[0]
    if len(pieces) == 1:
        return first
    if any(
        (p.scale_columns, p.rounded) != (first.scale_columns, first.rounded)
        or p.smooth_factor.shape != first.smooth_factor.shape
        or not torch.equal(p.smooth_factor, first.smooth_factor)
        for p in pieces
    ):
        raise ValueError("linears of 4-bit floats that smooth their input differently")
    shared = all(
        p.proj_down.shape == first.proj_down.shape and torch.equal(p.proj_down, first.proj_down)
        for p in pieces
    )
    ups = [p.proj_up for p in pieces]
    biases = [p.bias for p in pieces]
    some = next((bias for bias in biases if bias is not None), None)
    return replace(
        first,
        qweight=torch.cat([p.qweight for p in pieces]),
        scale=_cat8([p.scale for p in pieces], 0),
        scale_2=torch.cat([p.scale_2 for p in pieces], 1),
        proj_down=first.proj_down if shared else torch.cat([p.proj_down for p in pieces], 1),
        proj_up=torch.cat(ups) if shared else torch.block_diag(*ups),
        bias=None
        if some is None
        else torch.cat([some.new_zeros(p.shape[0]) if p.bias is None else p.bias for p in pieces]),
    )


def join_columns(pieces: Sequence[NVFP4Weight]) -> NVFP4Weight:
    """One linear over the pieces' inputs side by side, whose result is the sum of theirs. Raises
    ValueError for pieces of unequal height.
    """
    first = pieces[0]
    if len(pieces) == 1:
        return first
    if len({p.shape[0] for p in pieces}) > 1 or any(p.rounded != first.rounded for p in pieces):
        raise ValueError("linears of unequal height, or of different rounding, cannot be one")
    downs = [p.proj_down for p in pieces]
    shared = all(
        p.proj_up.shape == first.proj_up.shape and torch.equal(p.proj_up, first.proj_up)
        for p in pieces
    )
    biases = [p.bias for p in pieces if p.bias is not None]
    loud = [bias for bias in biases if bias.any()]
    bias = next(iter(loud or biases), None)
    if len(loud) > 1:
        bias = torch.stack([b.double() for b in loud]).sum(0).to(loud[0].dtype)
    return replace(
        first,
        qweight=torch.cat([p.qweight for p in pieces], 1),
        scale=_cat8([p.scale for p in pieces], 1),
        scale_2=torch.cat([p.scale_2 for p in pieces]),
        proj_down=torch.cat(downs) if shared else torch.block_diag(*downs),
        proj_up=first.proj_up if shared else torch.cat([p.proj_up for p in pieces], 1),
        smooth_factor=torch.cat([p.smooth_factor for p in pieces]),
        bias=bias,
        scale_columns=tuple(width for p in pieces for width in (p.scale_columns or (p.shape[1],))),
    )


def _cat8(scales: Sequence[Tensor], dim: int) -> Tensor:
    """8-bit floats side by side; as bytes, for torch joins no floats of 8 bits on some devices."""
    joined = torch.cat([scale.view(torch.uint8) for scale in scales], dim)
    return joined.view(torch.float8_e4m3fn)


def split_rows(weight: NVFP4Weight, sizes: Sequence[int]) -> list[NVFP4Weight]:
    """The inverse of `join_rows` for pieces of `sizes` outputs."""
    pieces = [weight.rows(start, stop) for start, stop in spans(sizes)]
    columns = own_columns([piece.proj_up for piece in pieces], weight.rank)
    if columns is None:
        return pieces
    return [
        replace(p, proj_down=p.proj_down[:, own], proj_up=p.proj_up[:, own])
        for p, own in zip(pieces, columns, strict=True)
    ]


def split_columns(weight: NVFP4Weight, sizes: Sequence[int]) -> list[NVFP4Weight]:
    """The inverse of `join_columns` for pieces of `sizes` inputs; the bias stays with the last.
    Raises ValueError where the row scales change within a piece.
    """
    bounds = spans(sizes)
    if weight.scale_columns and weight.scale_columns != tuple(sizes):
        raise ValueError("a linear whose scales change within a piece cannot be split there")
    downs = [weight.proj_down[start:stop] for start, stop in bounds]
    columns = own_columns(downs, weight.rank) or [slice(None)] * len(bounds)
    pieces = []
    for i, ((start, stop), own) in enumerate(zip(bounds, columns, strict=True)):
        last = stop == weight.shape[1]
        bias = weight.bias
        pieces.append(
            replace(
                weight,
                qweight=weight.qweight[:, start // 2 : stop // 2],
                scale=weight.scale[:, start // 16 : stop // 16],
                scale_2=weight.scale_2[i : i + 1] if weight.scale_columns else weight.scale_2,
                proj_down=downs[i][:, own],
                proj_up=weight.proj_up[:, own],
                smooth_factor=weight.smooth_factor[start:stop],
                bias=bias if last or bias is None else torch.zeros_like(bias),
                scale_columns=(),
            )
        )
    return pieces
