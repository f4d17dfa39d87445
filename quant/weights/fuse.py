"""Several SVDQuant linears as one, and one as several: what one program keeps apart, another keeps
together.

Joined along N, linears that smooth their input alike share its 4-bit codes, others keep a smoothing
each (`smooth_rows`); joined along K, linears whose results are added lie side by side. Their
low-rank branches stand block by block, unless they are the same:

    along N   proj_down = [D1 D2], proj_up = diag(U1, U2)        along K   proj_down = diag(D1, D2),
      proj_up = [U1 U2]

Nothing is rounded: the joined linear computes what its parts do, and comes apart into the very same
numbers.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from .svdquant_w4a4 import SVDQuantWeight, spans


def join_rows(pieces: list[SVDQuantWeight]) -> SVDQuantWeight:
    """One linear whose outputs are those of the pieces one behind the other. Raises ValueError
    unless they quantize the input alike.
    """
    first = pieces[0]
    if len(pieces) == 1:
        return first
    if any(
        (p.act_unsigned, p.rotation, p.unsigned_from, p.act_bits)
        != (first.act_unsigned, first.rotation, first.unsigned_from, first.act_bits)
        for p in pieces
    ):
        raise ValueError("linears that quantize their input differently cannot be one")
    if len({p.shape[1] for p in pieces}) > 1:
        raise ValueError(
            f"linears of {' and '.join(str(p.shape[1]) for p in pieces)} inputs cannot be one"
        )
    shared = all(
        p.proj_down.shape == first.proj_down.shape and torch.equal(p.proj_down, first.proj_down)
        for p in pieces
    )
    down = first.proj_down if shared else torch.cat([p.proj_down for p in pieces], 1)
    up = (
        torch.cat([p.proj_up for p in pieces])
        if shared
        else torch.block_diag(*(p.proj_up for p in pieces))
    )
    smooth, heights = smoothings(
        [p.smooth_factor for p in pieces], [p.smooth_rows or (p.shape[0],) for p in pieces]
    )
    return replace(
        first,
        qweight=torch.cat([p.qweight for p in pieces]),
        scale=torch.cat([p.scale for p in pieces], 1),
        proj_down=down,
        proj_up=up,
        bias=_stacked([p.bias for p in pieces], [p.shape[0] for p in pieces]),
        smooth_factor=smooth,
        smooth_rows=heights,
    )


def smoothings(
    factors: Sequence[Tensor], rows: Sequence[tuple[int, ...]]
) -> tuple[Tensor, tuple[int, ...]]:
    """smooth_factor and smooth_rows of pieces one above another, from those of each: neighbours
    that smooth alike are one run.
    """
    runs: list[tuple[Tensor, int]] = []
    for factor, heights in zip(factors, rows, strict=True):
        for smooth, height in zip(factor.reshape(len(heights), -1), heights, strict=True):
            if runs and torch.equal(runs[-1][0], smooth):
                runs[-1] = (smooth, runs[-1][1] + height)
            else:
                runs.append((smooth, height))
    smooths, heights = zip(*runs, strict=True)
    return (smooths[0], ()) if len(runs) == 1 else (torch.stack(smooths), heights)


def split_rows(weight: SVDQuantWeight, sizes: list[int]) -> list[SVDQuantWeight]:
    """The inverse of `join_rows` for pieces of `sizes` outputs."""
    bounds = spans(sizes)
    pieces = [weight.rows(start, stop) for start, stop in bounds]
    if columns := own_columns([p.proj_up for p in pieces], weight.rank):
        pieces = [
            replace(p, proj_down=p.proj_down[:, own], proj_up=p.proj_up[:, own])
            for p, own in zip(pieces, columns, strict=True)
        ]
    return pieces


def join_columns(pieces: list[SVDQuantWeight]) -> SVDQuantWeight:
    """One linear over the pieces' inputs side by side, whose result is the sum of theirs. Unsigned
    pieces must stand behind signed ones. Raises ValueError for any other order, for a rotation, and
    for pieces of unequal height.
    """
    first = pieces[0]
    if len(pieces) == 1:
        return first
    if any(p.smooth_rows for p in pieces):
        raise ValueError("linears with several smoothings cannot stand side by side")
    signs = [p.act_unsigned for p in pieces]
    if (
        signs != sorted(signs)
        or any(p.rotation or p.unsigned_from for p in pieces)
        or len({(p.shape[0], p.act_bits) for p in pieces}) > 1
    ):
        raise ValueError(
            "linears of unequal height or activations, or with unsigned inputs before signed ones,"
            " cannot be one"
        )
    shared = all(
        p.proj_up.shape == first.proj_up.shape and torch.equal(p.proj_up, first.proj_up)
        for p in pieces
    )
    down = (
        torch.cat([p.proj_down for p in pieces])
        if shared
        else torch.block_diag(*(p.proj_down for p in pieces))
    )
    up = first.proj_up if shared else torch.cat([p.proj_up for p in pieces], 1)
    signed = sum(p.shape[1] for p in pieces if not p.act_unsigned)
    return SVDQuantWeight(
        torch.cat([p.qweight for p in pieces], 1),
        torch.cat([p.scale for p in pieces]),
        down,
        up,
        torch.cat([p.smooth_factor for p in pieces]),
        _summed([p.bias for p in pieces]),
        act_unsigned=signed == 0,
        unsigned_from=signed if any(signs) and signed else 0,
        act_bits=first.act_bits,
    )


def split_columns(weight: SVDQuantWeight, sizes: list[int]) -> list[SVDQuantWeight]:
    """The inverse of `join_columns` for pieces of `sizes` inputs; the bias stays with the last.
    Raises ValueError for a rotated linear, and where the inputs' signs do not change at a seam.
    """
    bounds = spans(sizes)
    if (
        weight.rotation
        or weight.smooth_rows
        or (weight.unsigned_from and weight.unsigned_from not in [start for start, _ in bounds])
    ):
        raise ValueError(
            "a rotated linear, or one whose smoothing or inputs' signs change within a piece,"
            " cannot be split"
        )
    downs = [weight.proj_down[start:stop] for start, stop in bounds]
    ups = [weight.proj_up] * len(bounds)
    if columns := own_columns(downs, weight.rank):
        downs, ups = (
            [t[:, own] for t, own in zip(tensors, columns, strict=True)] for tensors in (downs, ups)
        )
    pieces = []
    for (start, stop), down, up in zip(bounds, downs, ups, strict=True):
        bias = (
            weight.bias
            if stop == weight.shape[1] or weight.bias is None
            else torch.zeros_like(weight.bias)
        )
        unsigned = weight.act_unsigned or bool(
            weight.unsigned_from and start >= weight.unsigned_from
        )
        pieces.append(
            SVDQuantWeight(
                weight.qweight[:, start // 2 : stop // 2],
                weight.scale[start // 64 : stop // 64],
                down,
                up,
                weight.smooth_factor[start:stop],
                bias,
                unsigned,
                act_bits=weight.act_bits,
            )
        )
    return pieces


def own_columns(blocks: list[Tensor], rank: int) -> list[slice] | None:
    """Which ranks belong to which block where a matrix is block-diagonal with blocks of one width;
    None where it is not.
    """
    if rank % len(blocks) or not rank:
        return None
    width = rank // len(blocks)
    columns = [slice(i * width, (i + 1) * width) for i in range(len(blocks))]
    clean = all(
        not block[:, other].any()
        for i, block in enumerate(blocks)
        for j, other in enumerate(columns)
        if i != j
    )
    return columns if clean and len(blocks) > 1 else None


def _stacked(biases: list[Tensor | None], sizes: list[int]) -> Tensor | None:
    some = next((bias for bias in biases if bias is not None), None)
    if some is None:
        return None
    return torch.cat(
        [
            some.new_zeros(size) if bias is None else bias
            for bias, size in zip(biases, sizes, strict=True)
        ]
    )


def _summed(biases: list[Tensor | None]) -> Tensor | None:
    """The sum; where only one is not zero, that one as it is."""
    real = [bias for bias in biases if bias is not None]
    loud = [bias for bias in real if bias.any()]
    if len(loud) > 1:
        return torch.stack([bias.double() for bias in loud]).sum(0).to(loud[0].dtype)
    return next(iter(loud or real), None)
