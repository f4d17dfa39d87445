"""The time of noise: worked by hand, the same state whatever the schedule, and a flow's own left
as it is.
"""

import pytest
import torch

from nibble.accel.caching.flow_time import FlowTime

FLOW, ADDED = FlowTime(), FlowTime(mixes=False)
EDM = FlowTime(mixes=False, data=0.5)
LOUD = FlowTime(noise=8.0)  # HiDream O1's pixels


def test_a_flows_time_is_its_sigma_bit_for_bit():
    sigmas = [1.0, 0.7, 1 / 3, 0.1, 0.0]
    assert FLOW.times(sigmas) == tuple(sigmas)
    x, denoised = torch.randn(2, 3), torch.randn(2, 3)
    sigma = torch.tensor([[0.7], [0.3]])
    assert torch.equal(FLOW.velocity(x, denoised, sigma), (x - denoised) / sigma)
    assert torch.equal(FLOW.denoised(x, denoised, sigma), x - sigma * denoised)


@pytest.mark.parametrize(
    "flow, sigma, time",
    [
        (ADDED, 1.0, 0.5),
        (ADDED, 3.0, 0.75),
        (ADDED, 80.0, 80 / 81),
        (ADDED, 0.0, 0.0),
        (EDM, 0.5, 0.5),  # noise as large as the data
        (EDM, 1.5, 0.75),
        (LOUD, 1.0, 1.0),
        (LOUD, 1 / 9, 0.5),  # 8 / 9 of noise and 8 / 9 of data
    ],
)
def test_times_worked_by_hand(flow, sigma, time):
    assert flow.time(sigma) == pytest.approx(time, rel=1e-12)


@pytest.mark.parametrize("flow", [FLOW, ADDED, EDM, LOUD])
def test_the_velocity_of_a_state_is_noise_minus_data_of_unit_size(flow):
    """x made of known data and noise at a level, as the schedule mixes them."""
    generator = torch.Generator().manual_seed(0)
    data, noise = torch.randn(2, 4, 5, generator=generator, dtype=torch.float64)
    data = data * flow.data
    for sigma in (0.9, 0.4, 0.01):
        level = torch.tensor(sigma, dtype=torch.float64)
        kept = 1 - sigma if flow.mixes else 1.0
        x = kept * data + flow.noise * sigma * noise
        velocity = flow.velocity(x, data, level)
        assert torch.allclose(velocity, noise - data / flow.data, atol=1e-10)
        assert torch.allclose(flow.denoised(x, velocity, level), data, atol=1e-10)
        time = flow.time(sigma)
        state = (1 - time) * data / flow.data + time * noise
        assert torch.allclose(x / flow.data / flow.scale(sigma), state, atol=1e-10)


@pytest.mark.parametrize("flow", [ADDED, EDM, LOUD])
def test_eulers_step_in_sigma_is_eulers_step_in_time(flow):
    x, data = torch.randn(2, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    now, then = torch.tensor(0.8, dtype=torch.float64), torch.tensor(0.3, dtype=torch.float64)
    stepped = data + then / now * (x - data)
    velocity = flow.velocity(x, data, now)

    def state(of, level):
        return of / flow.data / flow.scale(level)

    moved = state(x, now) + (flow.time(then) - flow.time(now)) * velocity
    assert torch.allclose(state(stepped, then), moved, atol=1e-12)


def test_sizes_that_are_none_are_refused():
    for size in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="above 0"):
            FlowTime(data=size)
