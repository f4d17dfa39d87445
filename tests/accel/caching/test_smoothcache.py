"""SmoothCache's greedy mask against the published loop, written here once more; curves that are
recorded, kept and moved to other schedules.
"""

import math
import random

import pytest

from nibble.accel.caching.smoothcache import Curve, Recorder, greedy_mask


def published(rows: list[list[float]], alpha: float, steps: int) -> list[int]:
    """The paper repository's generate-greedy_mask loop: rows[j][i] is the mean error between step i
    and step i + j + 1.
    """
    out, i = [None] * steps, 0
    while i < steps:
        for j in range(len(rows) - 1, -1, -1):
            if i < len(rows[j]) and rows[j][i] <= alpha:
                out[i] = 1
                for skipped in range(i + 1, i + j + 2):
                    out[skipped] = 0
                i += j + 2
                break
        else:
            out[i] = 1
            i += 1
    out[0] = out[-1] = 1
    return out


@pytest.mark.parametrize("seed", range(20))
def test_schedules_are_the_published_ones(seed):
    rng = random.Random(seed)
    steps, farthest = rng.randint(6, 50), rng.randint(1, 5)
    rows = [[rng.random() * k / farthest for _ in range(steps - k)] for k in range(1, farthest + 1)]
    for alpha in (0.0, 0.1, 0.3, 0.7, 2.0):
        assert [int(value) for value in greedy_mask(rows, alpha)] == published(rows, alpha, steps)


def test_a_schedule_worked_by_hand():
    """Six steps, k <= 2: step 0 may give 1 and 2 (0.1), step 3 only 4 (0.1), step 5 is the last."""
    rows = [[0.05, 0.9, 0.9, 0.1, 0.9], [0.1, 0.9, 0.9, 0.9]]
    assert greedy_mask(rows, 0.1) == [True, False, False, True, False, True]


def test_alpha_zero_computes_everything_and_a_large_one_keeps_first_and_last():
    rows = [[0.5] * 9, [0.7] * 8]
    assert all(greedy_mask(rows, 0.0))
    assert greedy_mask(rows, 1.0) == [True, False, False] * 3 + [True]


def test_a_recorder_averages_layers_and_samples():
    recorder = Recorder(4, farthest=2)
    for start, end, errors in (
        (0, 1, (0.1, 0.3)),
        (1, 2, (0.2,)),
        (2, 3, (0.4,)),
        (0, 2, (0.5,)),
        (1, 3, (0.6,)),
        (0, 3, (9.0,)),
    ):
        for error in errors:
            recorder.add(start, end, error)
    curve = recorder.curve()
    assert curve.mean == [[pytest.approx(0.2), 0.2, 0.4], [0.5, 0.6]]
    assert curve.samples == 2
    assert curve.half[0][0] == pytest.approx(1.96 * math.sqrt(0.02) / math.sqrt(2))
    with pytest.raises(ValueError, match="every step"):
        Recorder(4).curve()


def test_curves_move_to_another_number_of_steps_by_sigma():
    """Errors that grow with the stretch of sigma, one unit each: on twice as many steps of half the
    length they halve.
    """
    known = [1 - i / 10 for i in range(10)]
    curve = Curve([[0.1] * 9, [0.2] * 8, [0.3] * 7], [[0.0] * 9, [0.0] * 8, [0.0] * 7], 1)
    assert curve.at(known, known) is curve
    finer = curve.at(known, [1 - i / 20 for i in range(20)])
    assert finer.mean[0] == pytest.approx([0.05] * 19)
    assert finer.mean[2] == pytest.approx([0.15] * 17)
    coarser = curve.at(known, [1 - i / 5 for i in range(5)])
    assert coarser.mean[0] == pytest.approx([0.2] * 4)
    assert all(math.isinf(value) for value in coarser.mean[1])
