"""Fitted guesses: exact where an exact sum exists, the best there is elsewhere, and lines where
nothing was fitted.
"""

import numpy as np
import pytest

from nibble.accel.caching.extrapolate import Reuse, weights
from nibble.accel.caching.fitted import NODES, FittedReuse, fit

LINE = Reuse(1)
TIMES = np.linspace(1, 0, 11).tolist()
MASK = [True, False, True, False, False, True, False, False, False, True]


def grams_of(velocities: np.ndarray) -> np.ndarray:
    """Of (prompts, steps, channels)."""
    return np.einsum("pic,pjc->pij", velocities, velocities)


def ends(velocities: np.ndarray, reuse: Reuse) -> np.ndarray:
    """What the guesses leave behind after each step: (steps, prompts, channels)."""
    left, out, computed = 0.0, [], []
    for i, wanted in enumerate(MASK):
        if wanted:
            computed.append(i)
        else:
            factors = reuse.weights([TIMES[j] for j in computed], TIMES[i])
            used = computed[-len(factors) :]
            guess = sum(w * velocities[:, j] for w, j in zip(factors, used, strict=True))
            left = left + (TIMES[i + 1] - TIMES[i]) * (guess - velocities[:, i])
        out.append(np.zeros_like(velocities[:, 0]) + left)
    return np.stack(out)


def test_on_a_straight_path_it_is_the_line():
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(2, 3, 1, 8))
    velocities = a + b * np.array(TIMES[:-1])[None, :, None]
    fitted = fit(MASK, TIMES, grams_of(velocities), LINE)
    # before two steps are computed there is no line yet: step 1 holds, and its error is taken back
    for i in range(5, 9):
        if not MASK[i]:
            nodes = [TIMES[j] for j in range(i) if MASK[j]]
            found, line = fitted.weights(nodes, TIMES[i]), weights(nodes, TIMES[i], LINE)
            nothing = [0.0] * (len(found) - 2)
            assert found == pytest.approx(nothing + line, abs=0.2)
    errors = np.linalg.norm(ends(velocities, fitted), axis=(1, 2))
    assert errors[-1] < 1e-3 * errors[1], "the error of holding at step 1 is taken back"


def test_a_fading_velocity_is_guessed_exactly_where_a_line_is_wrong():
    """v = u exp(-5 t): a sum of computed ones that gives it, and takes back what was wrong."""
    u = np.random.default_rng(1).normal(size=(1, 1, 8))
    velocities = u * np.exp(-5 * np.array(TIMES[:-1]))[None, :, None]
    fitted = fit(MASK, TIMES, grams_of(velocities), LINE)
    line, found = (np.linalg.norm(ends(velocities, reuse)[-1]) for reuse in (LINE, fitted))
    assert line > 0.01 * np.linalg.norm(u)
    assert found < 1e-3 * line


def test_no_other_weights_leave_the_state_less_wrong():
    velocities = np.random.default_rng(2).normal(size=(4, 10, 6)).cumsum(axis=1)
    grams = grams_of(velocities)
    fitted = fit(MASK, TIMES, grams, LINE)
    skipped = [i for i, wanted in enumerate(MASK) if not wanted]
    best = (ends(velocities, fitted) ** 2).sum((1, 2))
    for i in skipped:
        time = round(TIMES[i], 6)
        nodes, own = fitted.table[time]
        for place in range(len(own)):
            for change in (-0.05, 0.05):
                moved = list(own)
                moved[place] += change
                other = FittedReuse(1, table=dict(fitted.table) | {time: (nodes, moved)})
                assert (ends(velocities, other)[i] ** 2).sum() > best[i]
    lines = (ends(velocities, LINE) ** 2).sum((1, 2))
    assert (best[skipped] < lines[skipped]).all()


def test_what_was_not_foreseen_is_guessed_by_the_line():
    velocities = np.random.default_rng(3).normal(size=(1, 10, 6))
    fitted = fit(MASK, TIMES, grams_of(velocities), LINE)
    assert fitted.kept == NODES
    seen = [TIMES[0], TIMES[2], TIMES[5]]
    assert fitted.weights(seen, TIMES[6]) == fitted.table[round(TIMES[6], 6)][1]
    in_float32 = [float(np.float32(time)) for time in seen]
    assert fitted.weights(in_float32, float(np.float32(TIMES[6]))) == fitted.weights(seen, TIMES[6])
    between, others = 0.35, [TIMES[0], TIMES[3]]
    assert fitted.weights(seen, between) == weights(seen, between, LINE)
    assert fitted.weights(others, TIMES[6]) == weights(others, TIMES[6], LINE)


def test_a_run_without_any_change_is_guessed_by_the_line():
    fitted = fit(MASK, TIMES, np.zeros((1, 10, 10)), LINE)
    assert fitted.weights([TIMES[0]], TIMES[1]) == [1.0]
    assert fitted.weights([TIMES[0], TIMES[2]], TIMES[3]) == pytest.approx([-0.5, 1.5])
