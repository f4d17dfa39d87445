"""Small bases and adapters of every kind, for the tests of this room."""

import torch

from nibble.quant.intlora.adapter import LayerAdapter
from nibble.quant.intlora.factors import quantize
from nibble.quant.intlora.linear import Grid, rule_for, separated
from nibble.quant.merge.integer_grid import IntBase
from nibble.quant.weights.awq_w4a16 import W4A16Weight
from nibble.quant.weights.packing import pack_int4
from nibble.quant.weights.svdquant_w4a4 import SVDQuantWeight

N, K = 48, 128


def normal(*shape: int, seed: int = 0, size: float = 0.1) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * size


def svdquant(n: int = N, k: int = K, rank: int = 16, **options) -> SVDQuantWeight:
    codes = torch.randint(
        -8, 8, (n, k), generator=torch.Generator().manual_seed(1), dtype=torch.int8
    )
    smooth = (normal(k, seed=5, size=0.3).exp() * normal(k, seed=6).sign()).bfloat16()
    return SVDQuantWeight(
        pack_int4(codes),
        normal(k // 64, n, seed=2, size=0.02).bfloat16(),
        normal(k, rank, seed=3).bfloat16(),
        normal(n, rank, seed=4).bfloat16(),
        smooth,
        normal(n, seed=7).bfloat16(),
        **options,
    )


def w4a16(n: int = N, k: int = K, zeros: bool = True) -> W4A16Weight:
    codes = torch.randint(
        0, 16, (n, k), generator=torch.Generator().manual_seed(1), dtype=torch.int8
    )
    scale = normal(k // 64, n, seed=2, size=0.02).bfloat16()
    return W4A16Weight(
        pack_int4(codes),
        scale,
        normal(k // 64, n, seed=3, size=0.01).bfloat16() if zeros else None,
        normal(n, seed=7).bfloat16(),
    )


def bases() -> dict[str, IntBase]:
    """One of each kind, N x K."""
    weight = normal(N, K, size=0.03)
    return {
        "w4a16": IntBase.of(w4a16()),
        "symmetric": IntBase.of(w4a16(zeros=False)),
        "svdquant": IntBase.of(svdquant()),
        "rotated": IntBase.of(svdquant(rotation=64)),
        "unsigned": IntBase.of(svdquant(act_unsigned=True)),
        "int4": IntBase.from_weight(weight),
        "rows": IntBase.from_weight(weight, group=0),
        "int8": IntBase.from_weight(weight, bits=8, group=32),
        "odd": IntBase.from_weight(weight, odd=True),
    }


def factors(
    n: int = N,
    k: int = K,
    rank: int = 4,
    size: float = 0.01,
    seed: int = 10,
    dtype: torch.dtype = torch.int8,
):
    return quantize(
        normal(n, rank, seed=seed, size=size), normal(rank, k, seed=seed + 1, size=1.0), dtype
    )


def adapters(base: IntBase, size: float = 0.003, seed: int = 10) -> dict[str, LayerAdapter]:
    """One of each variant on a base; MUL and SHIFT anchored, without R."""
    return {
        variant: LayerAdapter(
            rule_for(base, variant, 6), base.digest(), factors(*base.shape, size=size, seed=seed)
        )
        for variant in ("shift_add", "mul", "shift")
    }


def paper(
    variant: str, bits: int = 4, group: int = 64, seed: int = 3
) -> tuple[IntBase, LayerAdapter, torch.Tensor]:
    """Base with R, adapter, and the 16-bit weight."""
    weight = normal(N, K, size=0.03)
    base, rule = separated(weight, variant, seed, "blocks.0.proj", Grid(bits, group))
    return base, LayerAdapter(rule, base.digest(), factors(size=0.003)), weight
