"""Guesses from unequal steps: exact on polynomials of their order, damped towards the last value,
and what a history keeps.
"""

import pytest
import torch

from nibble.accel.caching.extrapolate import History, Reuse, node_product, weights

NODES = [1.0, 0.93, 0.81, 0.6]


@pytest.mark.parametrize("order", [0, 1, 2, 3])
def test_a_polynomial_of_the_order_is_guessed_exactly(order):
    coefficients = [0.3, -1.2, 0.7, 2.0][: order + 1]

    def value(s):
        return sum(c * s**i for i, c in enumerate(coefficients))

    found = weights(NODES, 0.37, Reuse(order))
    assert len(found) == order + 1
    assert sum(found) == pytest.approx(1)
    assert sum(
        w * value(s) for w, s in zip(found, NODES[-len(found) :], strict=True)
    ) == pytest.approx(value(0.37))


def test_equal_steps_give_the_textbook_weights():
    """Linear: 2 f1 - f0. Quadratic: 3 f2 - 3 f1 + f0 (Newton's backward differences)."""
    assert weights([3.0, 2.0], 1.0, Reuse(1)) == pytest.approx([-1, 2])
    assert weights([3.0, 2.0, 1.0], 0.0, Reuse(2)) == pytest.approx([1, -3, 3])


def test_damping_goes_from_holding_to_extrapolating():
    assert weights(NODES, 0.3, Reuse(2, 0.0)) == pytest.approx([0, 0, 1])
    half, full = weights(NODES, 0.3, Reuse(1, 0.5)), weights(NODES, 0.3, Reuse(1))
    assert half == pytest.approx([full[0] / 2, (full[1] + 1) / 2])


def test_fewer_nodes_than_the_order_needs_lower_it():
    assert weights([1.0], 0.5, Reuse(2)) == [1.0]
    assert len(weights([1.0, 0.9], 0.5, Reuse(2))) == 2


def test_the_spread_is_lagranges_product():
    assert node_product([1.0, 0.8], 0.6, Reuse(1)) == pytest.approx(0.4 * 0.2)
    assert node_product([1.0, 0.8], 0.6, Reuse(0)) == pytest.approx(0.2)


def test_a_history_keeps_what_it_needs_and_starts_again_with_another_shape():
    history = History(Reuse(1))
    for sigma in (1.0, 0.8, 0.6):
        history.store(sigma, torch.full((2, 3), sigma * 2))
    assert history.nodes == [0.8, 0.6]
    assert torch.allclose(history.guess(0.5), torch.full((2, 3), 1.0))
    history.store(0.6, torch.zeros(2, 3))
    assert history.nodes == [0.8, 0.6]
    assert history.values[-1].sum() == 0
    history.store(0.5, torch.zeros(4, 3))
    assert history.nodes == [0.5]


def test_holding_returns_the_kept_tensor_bit_for_bit():
    kept = torch.randn(5, generator=torch.Generator().manual_seed(0)).bfloat16()
    history = History(Reuse(0))
    history.store(1.0, kept)
    assert torch.equal(history.guess(0.2), kept)


def test_guesses_in_16_bit_are_summed_in_32():
    a, b = torch.tensor([1000.0]).bfloat16(), torch.tensor([1008.0]).bfloat16()
    history = History(Reuse(1))
    history.store(2.0, a)
    history.store(1.0, b)
    assert history.guess(0.5).item() == torch.tensor(1012.0).bfloat16().item()
    assert history.guess(0.5).dtype == torch.bfloat16


@pytest.mark.parametrize("wrong", [{"order": 4}, {"order": -1}, {"damping": 1.5}])
def test_settings_out_of_range_are_refused(wrong):
    with pytest.raises(ValueError, match="extrapolation"):
        Reuse(**wrong)
