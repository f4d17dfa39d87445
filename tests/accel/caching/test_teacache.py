"""TeaCache's decisions against the published rule, written here once more from the paper's
repository: every shipped polynomial, the same features.
"""

import numpy as np
import pytest
import torch

from nibble.accel.caching import coefficients
from nibble.accel.caching.steps import Step, Window
from nibble.accel.caching.teacache import IDENTITY, Polynomial, TeaCache, distance, fit

STEPS = 40


def features(seed: int, scale: float) -> list[torch.Tensor]:
    """A walk that changes fast at both ends, as modulated inputs do."""
    generator = torch.Generator().manual_seed(seed)
    value, found = torch.randn(4, 16, generator=generator), []
    for i in range(STEPS):
        found.append(value)
        pace = scale * (0.2 + abs(2 * i / STEPS - 1) ** 2)
        value = value + pace * torch.randn(4, 16, generator=generator)
    return found


def published(seen: list[torch.Tensor], poly: list[float], threshold: float) -> list[bool]:
    """As the official scripts loop: np.poly1d, previous features always updated, first and last
    computed and the sum put to zero there.
    """
    rescale, total, previous, out = np.poly1d(poly), 0, None, []
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


@pytest.mark.parametrize("entry", coefficients.every(), ids=lambda entry: entry.model)
def test_decisions_are_the_published_ones_for_every_shipped_polynomial(entry):
    kinds = set()
    for seed in range(4):
        for scale in (0.02, 0.06, 0.2):
            for threshold in (*entry.thresholds, entry.thresholds[-1] * 4):
                seen = features(seed, scale)
                found = ours(seen, entry.polynomial, threshold)
                assert found == published(seen, list(entry.polynomial.coefficients), threshold)
                kinds |= set(found)
    assert kinds == {True, False}  # the cases do reuse steps


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
    assert Polynomial((1.0, -0.1))(0.05) == pytest.approx(-0.05)


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
    assert [i for i, computed in enumerate(found) if not computed] == list(range(4, 11))
    # asked otherwise: only the first has nothing to reuse
    assert not any(ours(still, IDENTITY, 1.0, Window(first=0, last=0))[1:])


@pytest.mark.parametrize("wrong", [{"start": -0.1}, {"start": 0.6, "end": 0.5}, {"first": -1}])
def test_a_wrong_window_is_refused(wrong):
    with pytest.raises(ValueError):
        Window(**wrong)


def test_coefficients_are_chosen_by_the_models_facts():
    flux = {"hidden": 3072, "blocks": [19, 38]}
    assert (
        coefficients.lookup(["Flux"], flux | {"reference": False}).model
        == "FLUX.1 dev, schnell, Krea"
    )
    assert coefficients.lookup(["Flux"], flux | {"reference": True}).model == "FLUX.1 Kontext"
    assert (
        coefficients.lookup(["Flux"], {"hidden": 256, "blocks": [2, 4], "reference": False}) is None
    )
    assert (
        coefficients.lookup(
            ["VaceWanModel", "WanModel"], {"hidden": 1536, "model_type": "t2v"}
        ).model
        == "Wan 2.1 T2V 1.3B"
    )
    assert coefficients.lookup(["SomethingElse"], {}) is None
    assert all(
        entry.source and entry.date and len(entry.polynomial.coefficients) in (4, 5)
        for entry in coefficients.every()
    )


def test_flux_2_has_the_polynomial_that_its_source_prints():
    """TensorRT-LLM, FLUX2_TEACACHE_COEFFICIENTS["dev"]."""
    (entry,) = (entry for entry in coefficients.every() if entry.model == "FLUX.2 dev")
    assert list(entry.polynomial.coefficients) == [
        1.04582360e02,
        -6.87605554,
        -8.61659379e-02,
        5.37600252e-02,
    ]
    assert entry.polynomial(0.05) == pytest.approx(0.0453, abs=5e-5)
