"""The three rules: their equations, integer purity, and merged weights that equal unmerged ones to
the bit.
"""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from intlora_bases import K, N, adapters, bases, factors, normal, paper
from nibble.quant.intlora.adapter import LayerAdapter
from nibble.quant.intlora.auxiliary import Noise
from nibble.quant.intlora.factors import Factors, fake_quantize, quantize
from nibble.quant.intlora.merge import merge, unmerged
from nibble.quant.intlora.variants import Mul, Shift, ShiftAdd, merged_weight, multiplier
from nibble.quant.merge.integer_grid import IntBase
from nibble.quant.weights.lowrank import balanced

every_base = pytest.mark.parametrize("kind", list(bases()))
every_variant = pytest.mark.parametrize("variant", ["shift_add", "mul", "shift"])


@every_base
@every_variant
def test_merged_equals_unmerged(kind, variant, device):
    base = bases()[kind].to(device)
    use = adapters(base)[variant].to(device)
    merged = merge(base, [(use, 1.0)]).base
    assert merged.codes.dtype in (torch.int8, torch.int16)
    assert not torch.equal(merged.weight(), base.weight())
    assert torch.equal(merged.weight(), unmerged(base, use))
    assert torch.equal(merged.weight().bfloat16(), unmerged(base, use).bfloat16())
    x = normal(4, K).to(device)
    assert torch.equal(
        torch.nn.functional.linear(x, merged.weight()),
        torch.nn.functional.linear(x, unmerged(base, use)),
    )


@pytest.mark.parametrize("variant", ["mul", "shift"])
@pytest.mark.parametrize("group", [0, 64])
@pytest.mark.parametrize("bits", [4, 8])
def test_merged_equals_unmerged_with_an_auxiliary_matrix(variant, group, bits):
    base, use, _ = paper(variant, bits, group)
    merged = merge(base, [(use, 1.0)]).base
    assert use.rule.noise is not None
    assert torch.equal(merged.weight(), unmerged(base, use))


@every_base
@every_variant
def test_nothing_added_is_the_base_bit_for_bit(kind, variant):
    """At strength 0, and for factors of zeros."""
    base = bases()[kind]
    use = adapters(base)[variant]
    assert torch.equal(merge(base, [(use, 0.0)]).base.weight(), base.weight())
    none = LayerAdapter(use.rule, use.base, quantize(torch.zeros(N, 4), torch.zeros(4, K)))
    assert torch.equal(merge(base, [(none, 1.0)]).base.weight(), base.weight())


@pytest.mark.parametrize("variant, most", [("mul", 0.2), ("shift", 0.28)])
def test_the_paper_s_base_starts_near_the_weight(variant, most):
    base, use, weight = paper(variant)
    start = merged_weight(base, use.rule.product(base, torch.zeros(N, K, dtype=torch.float64)))
    assert (start - weight).norm() / weight.norm() < most
    # the integers alone are those of W - R, not of W
    assert (base.weight() - weight).norm() / weight.norm() > 0.2


@pytest.mark.parametrize("variant, most", [("mul", 0.2), ("shift", 0.28)])
def test_at_strength_zero_the_auxiliary_matrix_stays(variant, most):
    base, use, weight = paper(variant)
    merged = merge(base, [(use, 0.0)]).base
    assert (merged.weight() - weight).norm() / weight.norm() < most
    assert torch.equal(merged.weight(), unmerged(base, use, 0.0))


def test_aqs_identity():
    """Unrounded U times Z is s Z + R + D wherever Z is not 0, and 0 where it is; an odd grid has no
    zeros.
    """
    for odd in (False, True):
        noise = Noise(1, "a", torch.full((N,), 1e-4))
        base = IntBase.from_weight(normal(N, K, size=0.03), odd=odd)
        z, delta = base.integers(), normal(N, K, seed=3, size=0.004).double()
        change = delta + noise.matrix(K, torch.float64)
        product = multiplier(base, change, z) * z * base.spread(base.scale, torch.float64)
        torch.testing.assert_close(
            product,
            torch.where(z == 0, 0.0, base.weight(torch.float64) + change),
            rtol=1e-9,
            atol=1e-12,
        )
        assert bool((z == 0).any()) is not odd


def test_products_are_integer_products():
    """Recomputed by numpy in int64."""
    base = bases()["int4"]
    z = base.integers().numpy().astype(np.int64)
    delta = adapters(base)["mul"].change(base)
    mul, shift, add = (adapters(base)[v].rule for v in ("mul", "shift", "shift_add"))
    levels = mul.levels(base, delta, base.integers())[0].numpy().astype(np.int64)
    assert np.array_equal(mul.product(base, delta).p.numpy(), levels * z)
    sign, left, _, _ = (
        t.numpy().astype(np.int64) for t in shift.shifts(base, delta, base.integers())
    )
    assert np.array_equal(shift.product(base, delta).p.numpy(), sign * (z << left))
    assert left.min() >= 0
    assert left.max() <= shift.window
    assert np.array_equal(
        add.product(base, delta).p.numpy(), (z << add.k) + add.addend(base, delta).numpy()
    )
    assert all(rule.product(base, delta).p.dtype == torch.int32 for rule in (mul, shift, add))


def test_shift_rounds_the_logarithm():
    u = torch.tensor(
        [0.5, 0.70, 0.72, 1.0, 1.41, 1.42, 3.0, -2.0, -0.3, 1e-9, 0.0], dtype=torch.float64
    )
    z = torch.full((1, 64), 3)
    base = IntBase(z.to(torch.int8), torch.ones(1, 1), bits=8)
    change = torch.zeros(1, 64, dtype=torch.float64)
    change[0, : len(u)] = (u - 1) * 3
    sign, left, top, seen = Shift(11).shifts(base, change, base.integers())
    torch.testing.assert_close(seen[0, : len(u)], u, rtol=1e-6, atol=1e-12)
    expected = [max(0, 11 - (2 - round(np.log2(abs(v))))) if v else 0 for v in u.tolist()]
    assert top.item() == 2
    assert left[0, : len(u)].tolist()[:-1] == expected[:-1]
    assert sign[0, : len(u)].tolist() == [1] * 7 + [-1, -1, 1, 0]


def test_anchored_multiplication_has_one_as_a_level():
    base = bases()["int4"]
    for bits in (2, 4, 8):
        rule = Mul.anchored(base, bits)
        one = 1 / rule.u_scale[0].item()
        assert one == round(one)
        assert -rule.u_zero[0] <= one <= 2**bits - 1 - rule.u_zero[0]


def test_known_answer_of_shift_add():
    """Z = 3, s = 0.5, D = 0.3: at k = 4 the addend is round(0.3 * 16 / 0.5) = 10 and W' = (48 + 10)
    / 32.
    """
    base = IntBase(torch.full((1, 64), 3, dtype=torch.int8), torch.full((1, 1), 0.5), bits=8)
    product = ShiftAdd(4).product(base, torch.full((1, 64), 0.3, dtype=torch.float64))
    assert product.p.unique().tolist() == [58]
    assert merged_weight(base, product).unique().tolist() == [58 / 32]


def test_a_group_of_scale_zero_is_left_alone():
    base = IntBase(torch.zeros(2, 64, dtype=torch.int8), torch.zeros(1, 2), bits=8)
    for variant in ("shift_add", "mul", "shift"):
        merged = merge(base, [(adapters(base)[variant], 1.0)]).base
        assert merged.weight().abs().max() == 0


@settings(max_examples=30, deadline=None)
@given(
    st.integers(0, 2**31),
    st.sampled_from(["shift_add", "mul", "shift"]),
    st.sampled_from([4, 8]),
    st.sampled_from([0, 32, 64]),
    st.floats(-4, 4),
    st.sampled_from([1e-6, 1e-3, 1e-2, 0.3]),
    st.booleans(),
)
def test_fuzz_merged_equals_unmerged_and_is_finite(seed, variant, bits, group, strength, size, odd):
    base = IntBase.from_weight(normal(8, 64, seed=seed % 1000, size=0.03), bits, group, odd)
    use = adapters(base, size, seed)[variant]
    merged = merge(base, [(use, strength)], bits=32)
    assert not merged.notes
    assert merged.base.weight().isfinite().all()
    wanted = unmerged(base, use, strength) if strength else base.weight()
    assert torch.equal(merged.base.weight(), wanted)


# ---- factors -------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.int8, torch.int16])
def test_the_product_of_factors_is_exact(dtype):
    """Against Python's unbounded integers, in exact fractions."""
    from fractions import Fraction

    f = factors(6, 10, 5, dtype=dtype)
    delta = f.delta()
    for n, k in np.ndindex(6, 10):
        total = sum(int(f.b[n, r]) * int(f.a[r, k]) for r in range(5))
        assert Fraction(delta[n, k].item()) == total * Fraction(f.b_scale[n].item()) * Fraction(
            f.a_scale[k].item()
        )


def test_the_product_does_not_depend_on_the_order_of_sums(device):
    f = factors(64, 256, 32, dtype=torch.int16)
    order = torch.randperm(32, generator=torch.Generator().manual_seed(0))
    turned = Factors(f.a[order], f.b[:, order], f.a_scale, f.b_scale).to(device)
    assert torch.equal(f.delta(), turned.delta().cpu())
    assert torch.equal(f.rows(3, 40).delta(), f.delta()[3:40])
    down, up = f.floats()
    torch.testing.assert_close((up @ down.T).double(), f.delta(), rtol=1e-4, atol=1e-6)


def test_factors_lose_little_when_balanced():
    up, down = normal(96, 8) * torch.logspace(0, -3, 8), normal(8, 128, seed=1)
    wanted = up.double() @ down.double()
    torch.testing.assert_close(
        (lambda a, b: a.double() @ b.double())(*balanced(up, down)), wanted, rtol=1e-4, atol=1e-5
    )
    errors = {
        d: ((quantize(*balanced(up, down), d).delta() - wanted).norm() / wanted.norm()).item()
        for d in (torch.int8, torch.int16)
    }
    assert errors[torch.int8] < 0.01
    assert errors[torch.int16] < 1e-4


def test_fake_factors_are_the_stored_ones_and_pass_gradients():
    up, down = normal(N, 4).requires_grad_(), normal(4, K, seed=1).requires_grad_()
    fake_up, fake_down = fake_quantize(up, down)
    stored_down, stored_up = quantize(up.detach(), down.detach()).floats()
    assert torch.equal(fake_up, stored_up)
    assert torch.equal(fake_down.T, stored_down)
    (fake_up.sum() + 2 * fake_down.sum()).backward()
    assert (up.grad == 1).all()
    assert (down.grad == 2).all()
