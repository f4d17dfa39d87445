"""One flow model as both nets: with untrained heads nothing is lost, and heads that know the answer
give it.
"""

import pytest
import torch

from nibble.accel.caf import flow, heads

NOISE, DATA = torch.tensor([[0.0, 0.0], [1.0, -1.0]]), torch.tensor([[2.0, 4.0], [3.0, 1.0]])


def curved(x, sigma, start):
    """A field that depends on place and noise level."""
    return torch.sin(x) + sigma[:, None] ** 2 * torch.tensor([1.0, -2.0])


@pytest.mark.parametrize("h", [0.5, 1.0, 1.5])
def test_untrained_heads_take_eulers_step_to_the_end(h):
    """Two steps are Euler's at the levels of the path: the acceleration at the start is asked where
    the velocity was.
    """
    velocity, accelerate = heads.velocity_net(curved, h), heads.acceleration_net(curved, h)
    share = flow.retimed(torch.tensor(0.5), h).item()
    middle = NOISE + share * curved(NOISE, torch.ones(2), None)
    euler = middle + (1 - share) * curved(middle, torch.full((2,), 1 - share), None)
    torch.testing.assert_close(flow.sample(velocity, accelerate, NOISE, flow.uniform(2)), euler)


def test_one_step_is_the_models_own():
    velocity, accelerate = heads.velocity_net(curved, 1.5), heads.acceleration_net(curved, 1.5)
    torch.testing.assert_close(
        flow.sample(velocity, accelerate, NOISE, flow.uniform(1)),
        NOISE + curved(NOISE, torch.ones(2), None),
    )


@pytest.mark.parametrize("h", [0.5, 1.0, 1.5])
@pytest.mark.parametrize("wrong", [0.0, 0.3])
def test_a_head_that_knows_the_mean_velocity_of_the_rest_knows_the_acceleration(h, wrong):
    """Also where the velocity net was wrong: from its path, the rest leads to the data."""
    start = flow.initial_velocity(NOISE, DATA, h) + wrong
    t = torch.tensor([0.25, 0.75])
    x = flow.interpolate(NOISE, DATA, start, t)
    rest = (DATA - x) / flow.at(1 - t, x)
    known = heads.acceleration_net(lambda x, sigma, v: rest / flow.at(1 + (1 - h) * t, x), h)
    torch.testing.assert_close(known(x, t, start), flow.acceleration(NOISE, DATA, start))


def test_the_model_is_asked_where_the_path_is():
    """At h = 1.5 and t = 1/2 the path is 5/8 of the way, so 3/8 is noise; only the acceleration
    head is shown the velocity.
    """
    asked = []

    def model(x, sigma, start):
        asked.append((sigma.tolist(), start))
        return x

    half = torch.full((2,), 0.5)
    heads.velocity_net(model, 1.5)(NOISE, half)
    heads.acceleration_net(model, 1.5)(NOISE, half, DATA)
    assert asked == [([0.375, 0.375], None), ([0.375, 0.375], DATA)]
