"""The training-free step: exact where the acceleration is constant, of second order elsewhere, and
the sigmas' new pace.
"""

import math

import pytest
import torch

from nibble.accel.caf import adams_bashforth


def integrate(velocity, times, limit=None):
    """From 1 at times[0]; velocity depends on the time alone."""
    return adams_bashforth.integrate(
        lambda x, i: torch.full_like(x, velocity(times[i])), torch.ones(1, 1), times, limit
    ).item()


def test_a_step_worked_out_by_hand():
    """v was 2 and is 3, this step is half as long as the last: it goes on to 3.5 at its end, 3.25
    on average.
    """
    assert (
        adams_bashforth.average_velocity(torch.tensor([[3.0]]), torch.tensor([[2.0]]), 0.5).item()
        == 3.25
    )
    assert adams_bashforth.average_velocity(torch.tensor([[3.0]]), None, 0.5).item() == 3.0


def test_constant_acceleration_is_exact_after_the_first_step():
    """v = 2t: Euler's first step misses by (1/8)^2, and nothing is added to that by steps of any
    other length.
    """
    times = [0.0, 0.125, 0.25, 0.5, 1.0]
    assert integrate(lambda t: 2 * t, times) == 1 + 1 - times[1] ** 2


def test_it_is_of_second_order():
    errors = [abs(integrate(math.exp, [i / n for i in range(n + 1)]) - math.e) for n in (32, 64)]
    assert 3.3 < errors[0] / errors[1] < 4.7


def test_the_change_is_limited_sample_by_sample():
    now, before = torch.tensor([[3.0, 4.0], [3.0, 4.0]]), torch.tensor([[3.0, 3.9], [-30.0, -40.0]])
    limited = adams_bashforth.average_velocity(now, before, 1.0, limit=0.1)
    torch.testing.assert_close(limited[0], torch.tensor([3.0, 4.05]))
    torch.testing.assert_close(limited[1], torch.tensor([3.3, 4.4]))


def test_the_limit_is_for_pictures_too():
    now, before = torch.ones(2, 3, 4, 5), torch.zeros(2, 3, 4, 5)
    before[0] = 0.9
    limited = adams_bashforth.average_velocity(now, before, 2.0, limit=0.25)
    torch.testing.assert_close(
        limited, torch.tensor([1.1, 1.25]).reshape(2, 1, 1, 1).expand(2, 3, 4, 5)
    )


def test_time_may_turn_round_and_stand_still():
    """v = 2t is known after one step: there and back again adds nothing, and a step of no length is
    not remembered.
    """
    there, back = [0.0, 0.125, 0.5, 1.0], [1.0, 1.0, 0.5, 0.125]
    assert integrate(lambda t: 2 * t, there + back) == integrate(lambda t: 2 * t, there[:2])


def test_retimed_sigmas():
    sigmas = [1.0, 0.5, 0.0]
    assert adams_bashforth.retime(sigmas, 1.0).tolist() == sigmas
    assert adams_bashforth.retime(sigmas, 1.5).tolist() == [1.0, 0.375, 0.0]  # 1 - (0.75 - 0.125)
    assert adams_bashforth.retime(torch.linspace(1, 0, 9), 2.0).diff().max() <= 0
    with pytest.raises(ValueError, match="outside 0 to 2"):
        adams_bashforth.retime(sigmas, 2.5)
