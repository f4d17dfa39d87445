"""Models that predict noise or v, on the straight line: a Gaussian, whose flow is known."""

from functools import partial

import pytest
import torch

from nibble.accel.caf import adams_bashforth
from nibble.accel.caf.coordinates import Coordinates

LARGEST, SPREAD, MEAN = 14.6, 0.5, 2.0
SDXL = Coordinates(LARGEST)


def denoised(x, sigma):
    """E[data | x = data + sigma noise] for data of N(MEAN, SPREAD^2)."""
    sigma = sigma[:, None]
    return (SPREAD**2 * x + sigma**2 * MEAN) / (SPREAD**2 + sigma**2)


def exact(x):
    """Where the probability-flow ODE leads from x at the largest sigma: the quantile stays."""
    return MEAN + (x - MEAN) * SPREAD / (SPREAD**2 + LARGEST**2) ** 0.5


def asked(z, level):
    """dz/ds as CAF asks a model for it."""
    level = torch.full((len(z),), level)
    sigma = SDXL.sigma(level)
    x = SDXL.own(z, sigma)
    return SDXL.velocity(x, denoised(x, sigma), sigma)


def _towards_noise(levels, z, step):
    return -asked(z, levels[step])


def test_steps_on_the_straight_line_lead_where_the_probability_flow_does():
    x = LARGEST * torch.linspace(-2, 2, 9)[:, None].double()
    z = SDXL.straight(x, torch.full((9,), LARGEST))
    errors = {}
    for steps in (50, 200):
        levels = torch.linspace(1, 0, steps + 1, dtype=torch.float64).tolist()
        velocity = partial(_towards_noise, levels)
        found = adams_bashforth.integrate(velocity, z, levels)
        errors[steps] = (found - exact(x)).abs().max().item()
    assert errors[200] < 1e-3
    assert errors[200] < errors[50] / 8, "second order"


def test_a_point_of_data_is_reached_in_one_step_of_any_length():
    """All lines lead to it, so the velocity is the same all along them."""
    noise, data = torch.tensor([[1.0, -2.0]]), torch.tensor([[3.0, 0.5]])
    start = SDXL.straight(data + LARGEST * noise, torch.tensor([LARGEST]))
    for level in (1.0, 0.5, 0.01):
        sigma = SDXL.sigma(torch.tensor([level]))
        x = data + sigma * noise
        speed = SDXL.velocity(x, data, sigma)
        torch.testing.assert_close(speed, data - start)
        torch.testing.assert_close(SDXL.straight(x, sigma) + level * speed, data)


def test_levels_run_from_1_at_the_largest_sigma_to_0():
    assert SDXL.level(torch.tensor(LARGEST)) == 1
    assert SDXL.level(torch.tensor(0.0)) == 0
    # tau = 1/2, T = 14.6 / 15.6
    assert SDXL.level(torch.tensor(1.0)).item() == pytest.approx(0.5 * 15.6 / 14.6)
    levels = torch.linspace(0, 1, 11, dtype=torch.float64)
    torch.testing.assert_close(SDXL.level(SDXL.sigma(levels)), levels)


def test_a_rectified_flow_is_left_as_it_is():
    flow, x, sigma = Coordinates(), torch.randn(2, 3), torch.tensor([0.25, 1.0])
    for back in (flow.straight, flow.own):
        assert back(x, sigma) is x
    assert flow.level(sigma) is flow.sigma(sigma) is sigma
    assert torch.equal(flow.velocity(x, 0 * x, sigma), -x / sigma[:, None])
