"""Masks of a budget: even spacing, the error that is foretold from inner products alone, and the
search against trying all masks.
"""

import itertools

import numpy as np
import pytest

from nibble.accel.caching.extrapolate import Reuse
from nibble.accel.caching.mask_search import (
    StepMask,
    contributions,
    error,
    search,
    transferred,
    uniform,
)
from nibble.accel.caching.steps import Step, Window


def path(steps: int, seed: int = 0, prompts: int = 2) -> tuple[np.ndarray, list[float]]:
    """Velocities (prompts, steps, channels) along smooth curves with a kink, and the sigmas (steps
    + 1).
    """
    rng, s = np.random.default_rng(seed), np.linspace(1, 0, steps + 1)
    a, b, c = rng.normal(size=(3, prompts, 1, 8))
    t = s[:-1][None, :, None]
    return a + b * np.sin(3 * t) + c * np.maximum(0, 0.4 - t) ** 1.5 * 6, s.tolist()


def grams_of(velocities: np.ndarray) -> np.ndarray:
    return np.einsum("pic,pjc->pij", velocities, velocities)


def test_uniform_masks_are_even_and_keep_the_ends():
    assert uniform(7, 4) == [True, False, True, False, True, False, True]
    for computed in range(2, 29):
        mask = uniform(28, computed)
        assert sum(mask) == computed
        assert mask[0]
        assert mask[-1]
    with pytest.raises(ValueError):
        uniform(10, 1)


@pytest.mark.parametrize("order", [0, 1, 2])
def test_the_foretold_error_is_the_integral_of_the_guesses_errors(order):
    """Integrated step by step with guessed velocities on the skipped steps, against the inner
    products' answer.
    """
    velocities, sigmas = path(12, prompts=1)
    mask = [True, False, False, True, True, False, True, False, False, False, True, True]
    x = exact = np.zeros(8)
    computed = []
    from nibble.accel.caching.extrapolate import weights

    for i, wanted in enumerate(mask):
        v = velocities[0, i]
        exact = exact + (sigmas[i + 1] - sigmas[i]) * v
        if wanted:
            computed.append(i)
        else:
            used = weights([sigmas[j] for j in computed], sigmas[i], Reuse(order))
            v = sum(w * velocities[0, j] for w, j in zip(used, computed[-len(used) :], strict=True))
        x = x + (sigmas[i + 1] - sigmas[i]) * v
    assert error(mask, sigmas, grams_of(velocities), Reuse(order)) == pytest.approx(
        np.linalg.norm(x - exact)
    )


def test_computing_everything_costs_nothing():
    velocities, sigmas = path(9)
    assert not contributions([True] * 9, sigmas, Reuse(1)).any()
    assert error([True] * 9, sigmas, grams_of(velocities), Reuse(1)) == 0


@pytest.mark.parametrize("order", [0, 1])
def test_the_search_is_close_to_the_best_of_all_masks(order):
    velocities, sigmas = path(10)
    grams, reuse = grams_of(velocities), Reuse(order)
    every = [
        [i in chosen or i in (0, 9) for i in range(10)]
        for chosen in itertools.combinations(range(1, 9), 3)
    ]
    best = min(error(mask, sigmas, grams, reuse) for mask in every)
    found = search(5, sigmas, grams, reuse)
    assert sum(found) == 5
    assert found[0]
    assert found[-1]
    assert error(found, sigmas, grams, reuse) <= 1.05 * best
    assert error(found, sigmas, grams, reuse) <= error(uniform(10, 5), sigmas, grams, reuse)


def test_the_search_repeats_itself():
    velocities, sigmas = path(14)
    assert search(6, sigmas, grams_of(velocities), Reuse(1)) == search(
        6, sigmas, grams_of(velocities), Reuse(1)
    )


def test_a_mask_moves_to_another_number_of_steps_with_its_density():
    mask = [True] + [False] * 9 + [True] * 10
    sigmas = np.linspace(1, 0, 21).tolist()
    assert transferred(mask, sigmas, sigmas) == mask
    other = transferred(mask, sigmas, np.linspace(1, 0, 41).tolist())
    assert other[0]
    assert other[-1]
    assert abs(sum(other) - 22) <= 1
    assert sum(other[:18]) < 4


def test_a_fixed_rule_computes_the_ends_and_what_it_has_nothing_for():
    stream = StepMask((False,) * 6, Window(first=1, last=1)).decider()
    assert [stream.decide(Step(i, 6, 1 - i / 6), [1.0][:i]).why for i in (0, 1, 5)] == [
        "first",
        "reused",
        "last",
    ]
    assert stream.decide(Step(2, 6, 0.5), []).why == "new"
