"""Strengths, stacks, fused layers, overflow, and the ways beside the kernel and into a layer's own
format.
"""

from dataclasses import replace

import pytest
import torch

from intlora_bases import K, N, adapters, bases, factors, paper, svdquant
from nibble.quant.intlora.adapter import LayerAdapter
from nibble.quant.intlora.merge import Overflow, branch, change, merge, unmerged
from nibble.quant.intlora.variants import ShiftAdd
from nibble.quant.merge.integer_grid import IntBase
from nibble.quant.merge.refit import fold_into_branch, rounded_to_base
from nibble.quant.weights.delta import WeightDelta

every_base = pytest.mark.parametrize("kind", list(bases()))


def use(base: IntBase, k: int = 6, seed: int = 10, size: float = 0.003, rows=None) -> LayerAdapter:
    part = base if rows is None else base.rows(*rows)
    return LayerAdapter(
        ShiftAdd(k), part.digest(), factors(*part.shape, size=size, seed=seed), rows=rows
    )


@every_base
def test_strengths_scale_the_change(kind):
    base = bases()[kind]
    one = use(base, 10)
    wanted = one.factors.delta()
    for strength in (-1.0, 0.3, 1.0, 2.0):
        moved = change(base, [(one, strength)]).double()
        # kind's step at k = 10 against a small change
        assert (moved - strength * wanted).norm() / (strength * wanted).norm() < 0.12


@every_base
def test_stacks_add_up_in_integers(kind):
    base = bases()[kind]
    first, second = use(base, 6, 10), use(base, 4, 20)
    both = merge(base, [(first, 1.0), (second, 0.5)]).base
    p = (
        (base.integers() << 6)
        + first.rule.addend(base, first.change(base))
        + (second.rule.addend(base, second.change(base, 0.5)) << 2)
    )
    assert torch.equal(both.integers(), p)
    assert torch.equal(both.weight(), merge(base, [(second, 0.5), (first, 1.0)]).base.weight())


def test_sums_of_adapters_differ_from_the_adapter_of_the_sum_by_one_step():
    base = bases()["int4"]
    a, b = use(base, 6, 10), use(base, 6, 20)
    whole = ShiftAdd(6).addend(base, a.change(base) + b.change(base))
    apart = a.rule.addend(base, a.change(base)) + b.rule.addend(base, b.change(base))
    assert (whole - apart).abs().max() <= 1


@every_base
def test_fused_projections_are_merged_part_by_part(kind):
    base = bases()[kind]
    q, v = use(base, 6, 10, rows=(0, 16)), use(base, 8, 20, rows=(32, 48))
    merged = merge(base, [(q, 1.0), (v, 1.0)]).base
    alone = replace(q, rows=None), replace(v, rows=None)
    assert torch.equal(
        merged.weight()[:16], merge(base.rows(0, 16), [(alone[0], 1.0)]).base.weight()
    )
    assert torch.equal(merged.weight()[16:32], base.weight()[16:32])
    assert torch.equal(
        merged.weight()[32:], merge(base.rows(32, 48), [(alone[1], 1.0)]).base.weight()
    )
    low_rank = branch(base, [(q, 1.0), (v, 0.5)])
    down, up = low_rank.down, low_rank.up
    assert up[16:32].abs().max() == 0
    torch.testing.assert_close((up @ down.T)[:16].double(), q.factors.delta(), rtol=1e-4, atol=1e-6)


def test_overflow_lowers_k_and_says_so_or_refuses():
    base = bases()["int4"]
    big = use(base, 12, size=0.02)
    merged = merge(base, [(big, 1.0)])
    assert merged.base.bits == 16
    assert "k was lowered from 12 to" in merged.notes[0]
    assert "int16" in merged.notes[0]
    with pytest.raises(Overflow, match=r"do not fit int16; choose k <= \d+") as refusal:
        merge(base, [(big, 1.0)], lower_k=False)
    assert (
        merge(
            base, [(replace(big, rule=ShiftAdd(refusal.value.largest_k)), 1.0)], lower_k=False
        ).base.bits
        == 16
    )
    with pytest.raises(Overflow, match="lower the strength"):
        merge(base, [(big, 1e6)])
    assert merge(base, [(use(base, 3), 1.0)], bits=8, lower_k=False).base.bits == 8


def test_int32_is_there_when_asked_for():
    base = bases()["int4"]
    assert merge(base, [(use(base, 12, size=0.02), 1.0)], bits=32).base.bits == 32


def test_a_multiplicative_adapter_stands_alone_or_under_additive_ones():
    base, multiplied, _ = paper("mul")
    added = use(base, 4)
    with pytest.raises(ValueError, match="two MUL or SHIFT adapters cannot share a layer"):
        merge(base, [(multiplied, 1.0), (multiplied, 0.5)])
    both = merge(base, [(multiplied, 1.0), (added, 1.0)]).base
    first = merge(base, [(multiplied, 1.0)]).base
    moved, wanted = both.weight() - first.weight(), added.change(base).float()
    assert (moved - wanted).norm() / wanted.norm() < 0.1


@every_base
@pytest.mark.parametrize("variant", ["shift_add", "mul", "shift"])
def test_beside_the_kernel_is_what_merging_changes(kind, variant):
    base = bases()[kind]
    adapter = adapters(base)[variant]
    dense = change(base, [(adapter, 1.0)])
    torch.testing.assert_close(
        base.into(dense),
        merge(base, [(adapter, 1.0)]).base.weight() - base.weight(),
        rtol=1e-4,
        atol=1e-6,
    )
    if variant == "shift_add":
        low_rank = branch(base, [(adapter, 1.0)])
        down, up = low_rank.down, low_rank.up
        step = base.spread(base.scale, torch.float32).abs() * 2.0**-adapter.rule.k
        assert ((base.into(up @ down.T) - base.into(dense)).abs() <= 0.5 * step + 1e-6).all()
    else:
        with pytest.raises(ValueError, match=f"{variant.upper()} has no low rank"):
            branch(base, [(adapter, 1.0)])


def test_dense_changes_merge_to_what_they_say():
    base = bases()["rotated"]
    dense = LayerAdapter(
        ShiftAdd(5), base.digest(), dense=torch.randint(-100, 100, (N, K), dtype=torch.int16)
    )
    assert torch.equal(
        merge(base, [(dense, 1.0)]).base.integers(), (base.integers() << 5) + dense.dense
    )
    assert torch.equal(merge(base, [(dense, 1.0)]).base.weight(), unmerged(base, dense))
    with pytest.raises(ValueError, match="dense change has no low rank"):
        branch(base, [(dense, 1.0)])


@pytest.mark.parametrize(
    "options", [{}, {"rotation": 64}, {"act_unsigned": True}], ids=["plain", "rotated", "unsigned"]
)
def test_folding_into_the_branch_keeps_the_integers_and_the_change(options):
    weight, (down, up) = svdquant(**options), factors(size=0.01).floats()
    joined, kept = fold_into_branch(weight, WeightDelta(down, up))
    assert joined.rank == 32
    assert kept > 0.99
    assert torch.equal(joined.qweight, weight.qweight)
    assert torch.equal(joined.bias, weight.bias)
    torch.testing.assert_close(
        joined.dequantize() - weight.dequantize(), up @ down.T, rtol=0.02, atol=2e-3
    )
    same, share = fold_into_branch(weight, WeightDelta(down, up), rank=16)
    assert same.rank == 16
    assert 0 <= share < kept
    none, everything = fold_into_branch(weight, WeightDelta(down * 0, up))
    assert everything == 1.0
    assert torch.equal(none.dequantize(), weight.dequantize())


def test_cutting_the_branch_back_keeps_a_large_change_better():
    weight = svdquant()
    shares = [
        fold_into_branch(weight, WeightDelta(*factors(rank=2, size=size).floats()), rank=16)[1]
        for size in (0.003, 0.03, 0.3)
    ]
    assert shares == sorted(shares)
    assert shares[-1] > 0.9


def test_nearest_rounding_loses_what_is_smaller_than_half_a_step():
    for kind in ("int4", "odd"):
        base = bases()[kind]
        level = base.spread(base.scale, torch.float64) * (2 if base.odd else 1)
        assert rounded_to_base(base, 0.4 * level).abs().max() == 0
        inside = base.integers().abs() < 6
        torch.testing.assert_close(rounded_to_base(base, level)[inside], level[inside])
