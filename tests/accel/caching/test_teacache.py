"""TeaCache's decisions against the published rule, written here once more from the paper's
repository: every shipped polynomial, the same features. Their numbers: test_coefficients.py.
"""

import itertools
import math

import numpy as np
import pytest
import torch

from nibble.accel.caching import coefficients
from nibble.accel.caching.steps import Step, Window
from nibble.accel.caching.teacache import IDENTITY, MOST, Polynomial, TeaCache, distance, fit

STEPS = 40


def features(seed: int, scale: float, even: bool = False) -> list[torch.Tensor]:
    """A walk that changes fast at both ends, as modulated inputs do; even: at about one pace."""
    generator = torch.Generator().manual_seed(seed)
    value, found = torch.randn(4, 16, generator=generator), []
    for i in range(STEPS):
        found.append(value)
        pace = scale * (1 + i / STEPS if even else 0.2 + abs(2 * i / STEPS - 1) ** 2)
        value = value + pace * torch.randn(4, 16, generator=generator)
    return found


def published(seen: list[torch.Tensor], poly: list[float], threshold: float) -> list[bool]:
    """As the official scripts loop: np.poly1d, previous features always updated, first and last
    computed and the sum put to zero there.
    """
    rescale, total, previous = np.poly1d(poly), 0, None
    out: list[bool] = []
    for count, now in enumerate(seen):
        if count == 0 or count == len(seen) - 1:
            compute, total = True, 0
        else:
            total += rescale(((now - previous).abs().mean() / previous.abs().mean()).cpu().item())
            compute = not total < threshold
            total = 0 if compute else total
        previous = now
        out.append(compute)
    return out


def ours(
    seen: list[torch.Tensor], polynomial: Polynomial, threshold: float, window=None
) -> list[bool]:
    stream, out, previous = TeaCache(polynomial, threshold, window or Window()).decider(), [], None
    for index, now in enumerate(seen):
        d = None if previous is None else float(distance(now, previous))
        out.append(stream.decide(Step(index, len(seen), 1 - index / len(seen)), d).compute)
        previous = now
    return out


def within(seen: list[torch.Tensor], poly: list[float]) -> bool:
    """Whether every change of the walk is one where the polynomial still counts it: not negative,
    and not beyond the peak from which it falls below 0.
    """
    bare = np.poly1d(poly)
    changes = [float(distance(now, before)) for before, now in itertools.pairwise(seen)]
    return min(bare(changes)) >= 0 and max(changes) <= peak(bare)


def peak(bare: np.poly1d) -> float:
    """From where it falls below 0; infinite where it does not."""
    falls = [r.real for r in bare.roots if abs(r.imag) < 1e-9 and bare.deriv()(r.real) < 0 < r.real]
    rises = [r.real for r in bare.deriv().roots if abs(r.imag) < 1e-9 and falls]
    return max((r for r in rises if 0 < r < min(falls)), key=bare, default=math.inf)


WALKS = [(scale, False) for scale in (0.002, 0.005, 0.02, 0.04, 0.06, 0.2)]
WALKS += [(scale, True) for scale in (0.08, 0.15, 0.2, 0.25)]


@pytest.mark.parametrize("entry", coefficients.every(), ids=lambda entry: entry.model)
def test_decisions_are_the_published_ones_wherever_the_polynomial_holds(entry):
    """With no row of reused steps longer than the cap, and the polynomial bare as the scripts have
    it. Wan's plain sets are below 0 up to a change of 0.06 or 0.13: only even walks keep to them.
    """
    polynomial = Polynomial(entry.polynomial.coefficients)
    compared = 0
    for seed in range(4):
        for scale, even in WALKS:
            seen = features(seed, scale, even)
            if not within(seen, list(polynomial.coefficients)):
                continue
            for threshold in (*entry.thresholds, entry.thresholds[-1] * 4):
                wanted = published(seen, list(polynomial.coefficients), threshold)
                if longest_row(wanted) > MOST:
                    continue
                assert ours(seen, polynomial, threshold) == wanted
                compared += False in wanted
    assert compared > 0


WAN = [entry for entry in coefficients.every() if entry.model.startswith("Wan 2.1")]


@pytest.mark.parametrize("entry", WAN, ids=lambda entry: entry.model)
def test_wan_s_two_prompts_are_decided_as_its_script_counts_calls(entry):
    """Even calls have the prompt, odd ones have none: the two sets count 5 * 2 calls at the start
    and none at the end, or (plain) 1 * 2 and the last two.
    """
    bare, compared = np.poly1d(entry.polynomial.coefficients), 0
    kept, cutoff = (2, STEPS * 2 - 2) if entry.plain else (10, STEPS * 2)
    grid = np.linspace(0.001, 0.3 if entry.plain else 0.05, 400)
    valid = grid[(bare(grid) > 0) & (grid <= peak(bare))]
    for seed in range(20):
        changes = np.random.default_rng(seed).choice(valid, size=2 * STEPS)
        for threshold in entry.thresholds:
            sums, wanted = [0.0, 0.0], []
            for call, change in enumerate(changes):
                if call < kept or call >= cutoff:
                    sums[call % 2], compute = 0.0, True
                else:
                    sums[call % 2] += bare(change)
                    compute = not sums[call % 2] < threshold
                    sums[call % 2] *= not compute
                wanted.append(compute)
            if max(longest_row(wanted[0::2]), longest_row(wanted[1::2])) > MOST:
                continue
            rule = TeaCache(entry.polynomial, threshold, entry.window(Window(last=entry.last)))
            deciders = rule.decider(), rule.decider()
            found = [
                deciders[call % 2].decide(Step(call // 2, STEPS, 0.5), change).compute
                for call, change in enumerate(changes)
            ]
            assert found == wanted
            compared += False in wanted
    assert compared > 5


def longest_row(computed: list[bool]) -> int:
    """Of reused steps."""
    words = "".join("C" if value else "." for value in computed)
    return max(map(len, words.split("C")))


@pytest.mark.parametrize("entry", coefficients.every(), ids=lambda entry: entry.model)
@pytest.mark.parametrize("scale", [0.0, 0.0005, 0.01, 0.1, 1.0])
def test_no_entry_freezes_a_run_and_zero_computes_all(entry, scale):
    seen = features(1, scale)
    assert all(ours(seen, entry.polynomial, 0.0))
    for threshold in (*entry.thresholds, 3.0):
        assert longest_row(ours(seen, entry.polynomial, threshold)) <= MOST


def test_one_large_change_is_computed_and_does_not_free_the_next():
    """Wan 2.1 T2V 14B at d = 0.12: the bare polynomial takes 9.6 from the sum there."""
    wan = next(entry for entry in coefficients.every() if entry.model == "Wan 2.1 T2V 14B")
    decider = TeaCache(wan.polynomial, 0.2, Window(first=0, last=0)).decider()
    changes = [0.12, 0.03, 0.03, 0.03]
    found = [decider.decide(Step(i, 40, 0.5), d) for i, d in enumerate(changes, 10)]
    assert [decision.compute for decision in found] == [True, False, True, False]
    # p(0.03) is 0.135499, by hand
    assert found[2].change == pytest.approx(2 * 0.135499, abs=2e-6)


@pytest.mark.parametrize("d", [math.nan, math.inf])
def test_a_change_that_is_no_number_is_computed(d):
    decider = TeaCache(IDENTITY, 3.0).decider()
    assert decider.decide(Step(5, 40, 0.5), d).compute
    assert not decider.decide(Step(6, 40, 0.5), 0.1).compute


def test_the_floor_of_flux_bounds_runs_of_reused_steps():
    """FLUX's polynomial is at least 0.18 for every change, so a threshold of 0.4 allows two reused
    steps in a row however still the input.
    """
    flux = next(entry for entry in coefficients.every() if entry.model.startswith("FLUX.1 dev"))
    still = [torch.ones(4, 4)] * 20
    found = "".join("C" if computed else "." for computed in ours(still, flux.polynomial, 0.4))
    assert found[1:].split("C")[0] == "."
    assert "..." not in found


def test_a_threshold_of_zero_computes_everything():
    assert all(ours(features(0, 0.001), IDENTITY, 0.0))


def test_a_known_range_clamps_and_is_never_negative():
    line = Polynomial((1.0, -0.1), x_min=0.0, x_max=0.5)
    assert line(5.0) == pytest.approx(0.4)
    assert line(0.05) == 0.0
    assert line(0.3) == pytest.approx(0.2)


def test_an_unknown_range_ends_at_the_last_peak_before_the_fall():
    bell = Polynomial((-1.0, 1.0, 0.0))  # d - d^2: highest at 0.5, 0 at 1
    assert bell(0.2) == pytest.approx(0.16)
    assert bell(0.9) == bell(40.0) == pytest.approx(0.25)
    falling = Polynomial((-1.0, 0.3))
    assert falling(0.1) == falling(9.0) == pytest.approx(0.3)
    assert Polynomial((1.0, -0.1))(0.05) == 0.0
    assert Polynomial((0.0,))(0.5) == 0.0


def test_a_fit_finds_the_polynomial_and_its_quality():
    x = np.linspace(0.01, 0.4, 50)
    found = fit(x, 3 * x**2 + 0.5 * x, order=2)
    assert found.coefficients == pytest.approx((3, 0.5, 0), abs=1e-9)
    assert found.r2 == pytest.approx(1)
    assert (found.x_min, found.x_max) == pytest.approx((0.01, 0.4))
    with_constant = fit(x, 2 * x + 0.1, order=1, through_origin=False)
    assert with_constant.coefficients == pytest.approx((2, 0.1), abs=1e-9)
    with pytest.raises(ValueError, match="too few"):
        fit([0.1, 0.2], [0.1, 0.2], order=2)


def test_the_window_computes_outside_and_starts_the_sum_again():
    still = [torch.ones(2, 2)] * 20
    found = ours(still, IDENTITY, 1.0, Window(start=0.2, end=0.5, first=2, last=3))
    assert [i for i, computed in enumerate(found) if not computed] == [4, 5, 6, 7, 8, 10]
    # asked otherwise: only the first has nothing to reuse, and every sixth is computed anyhow
    found = ours(still, IDENTITY, 1.0, Window(first=0, last=0))
    assert [i for i, computed in enumerate(found) if computed] == [0, 6, 12, 18]


@pytest.mark.parametrize("wrong", [{"start": -0.1}, {"start": 0.6, "end": 0.5}, {"first": -1}])
def test_a_wrong_window_is_refused(wrong):
    with pytest.raises(ValueError):
        Window(**wrong)
