"""Error control: how a measured error grows with the gap, what it allows, and that it follows how
smooth a path is.
"""

import math

import pytest

from nibble.accel.caching.error_control import ErrorControl
from nibble.accel.caching.extrapolate import Reuse, weights
from nibble.accel.caching.steps import Step, Window

STEPS = 28
SIGMAS = tuple(1 - i / STEPS for i in range(STEPS + 1))


def run(function, threshold: float, order: int = 1, **more) -> tuple[list[bool], float]:
    """(computed steps, largest error of a guess) for a velocity that is a known function of
    sigma.
    """
    rule = ErrorControl(threshold, SIGMAS, Reuse(order), **more)
    stream, nodes, computed, worst = rule.decider(), [], [], 0.0
    for i in range(STEPS):
        step = Step(i, STEPS, SIGMAS[i], SIGMAS[i])
        used = weights(nodes, step.time, rule.reuse) if nodes else []
        guess = (
            sum(w * function(s) for w, s in zip(used, nodes[-len(used) :], strict=True))
            if nodes
            else 0.0
        )
        error = abs(guess - function(step.time)) / abs(function(step.time))
        decision = stream.decide(step, nodes)
        computed.append(decision.compute)
        if not decision.compute:
            worst = max(worst, error)
            continue
        if len(nodes) > order:
            stream.measured(step, nodes, error)
        nodes = (nodes + [step.time])[-order - 1 :]
    return computed, worst


def test_what_a_guess_gets_right_is_skipped_as_long_as_allowed():
    computed, worst = run(lambda s: 1 + 2 * s, 0.01, most=5)
    assert worst < 1e-12
    assert "".join("C" if c else "." for c in computed).startswith("CCC.....C.....C")
    assert computed[-1]


def test_the_threshold_bounds_the_error_of_a_path_that_bends_evenly():
    """exp(-3 s) bends more and more; each guess is foretold from the last measured bend, which lags
    behind a little.
    """
    computed, worst = run(lambda s: math.exp(-3 * s), 0.02)
    assert worst < 0.03
    assert sum(computed) < STEPS - 6


def test_more_is_computed_for_less_error_and_for_a_rougher_path():
    counts = [
        sum(run(lambda s: 2 + math.sin(6 * s), threshold)[0]) for threshold in (0.001, 0.01, 0.1)
    ]
    assert counts[0] > counts[1] > counts[2]
    assert sum(run(lambda s: 2 + math.sin(9 * s), 0.02)[0]) > sum(
        run(lambda s: 2 + math.sin(2 * s), 0.02)[0]
    )


def test_zero_skips_nothing_even_on_a_straight_path():
    assert all(run(lambda s: 3.0, 0.0)[0])


def test_first_and_last_and_the_window_are_computed():
    computed, _ = run(lambda s: 1 + s, 1.0, window=Window(0.25, 0.75, 3, 2))
    assert all(computed[:7])
    assert all(computed[22:])
    assert not all(computed)


def test_the_rate_is_lagranges_remainder():
    """A parabola guessed linearly: the error at s is |(s - a)(s - b)| exactly, whatever the gap."""
    rule = ErrorControl(1.0, SIGMAS, Reuse(1))
    stream = rule.decider()
    stream.measured(Step(2, STEPS, 0.8, 0.8), [1.0, 0.9], abs((0.8 - 1.0) * (0.8 - 0.9)))
    assert stream.rates[0] == pytest.approx(1.0)


def test_a_schedule_that_shortens_its_steps_is_counted_in_steps():
    """Steps that halve: one step after nodes one and two steps away is an error as large as the
    last, not an eighth of it. With equal steps both ways of counting agree.
    """
    halving = tuple(2.0**-i for i in range(8))
    stream = ErrorControl(1.0, halving, Reuse(1)).decider()
    stream.measured(Step(2, 7, 0.25, 0.25), [1.0, 0.5], 0.2)
    foretold = stream.decide(Step(3, 7, 0.125, 0.125), [0.5, 0.25])
    mean = (halving[0] - halving[-1]) / 7
    assert foretold.change == pytest.approx(0.2 * (0.125 - 0.0625) / mean)
    equal = ErrorControl(1.0, SIGMAS, Reuse(1))
    in_time, in_steps = equal.distances(SIGMAS[3:5], SIGMAS[7])
    assert in_time == pytest.approx(in_steps / STEPS**2) == pytest.approx(12 / STEPS**2)
