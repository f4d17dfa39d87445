"""The equations of constant acceleration, with answers worked out by hand, and what must hold for
any path.
"""

import pytest
import torch

from nibble.accel.caf import flow

NOISE, DATA = torch.tensor([[0.0, 0.0], [1.0, -1.0]]), torch.tensor([[2.0, 4.0], [3.0, 1.0]])


def test_a_path_worked_out_by_hand():
    """From 0 to 2 with v0 = 3 (h = 1.5): a = 2·2 - 2·3 = -2, and at t = 1/2 it stands at 0 + 3/2 -
    2/8 = 1.25.
    """
    velocity = flow.initial_velocity(NOISE, DATA, 1.5)
    assert velocity.tolist() == [[3.0, 6.0], [3.0, 3.0]]
    assert flow.acceleration(NOISE, DATA, velocity).tolist() == [[-2.0, -4.0], [-2.0, -2.0]]
    assert flow.interpolate(NOISE, DATA, velocity, torch.tensor([0.5, 0.5])).tolist() == [
        [1.25, 2.5],
        [2.25, 0.25],
    ]


@pytest.mark.parametrize("h", [0.5, 1.0, 1.5])
def test_paths_begin_and_end_where_they_should(h):
    velocity = flow.initial_velocity(NOISE, DATA, h)
    assert torch.equal(flow.interpolate(NOISE, DATA, velocity, torch.zeros(2)), NOISE)
    assert torch.equal(flow.interpolate(NOISE, DATA, velocity, torch.ones(2)), DATA)


@pytest.mark.parametrize("h", [0.5, 1.0, 1.5])
def test_a_path_with_the_ideal_velocity_is_a_straight_line_at_another_pace(h):
    t = torch.tensor([0.3, 0.8])
    path = flow.interpolate(NOISE, DATA, flow.initial_velocity(NOISE, DATA, h), t)
    torch.testing.assert_close(path, torch.lerp(NOISE, DATA, flow.retimed(t, h)[:, None]))


@pytest.mark.parametrize("ahead", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("steps", [1, 2, 5])
@pytest.mark.parametrize("h", [0.5, 1.0, 1.5])
def test_exact_nets_arrive_in_any_number_of_steps_and_lead_back(steps, h, ahead):
    """The midpoint rule is exact for a linear velocity, so constant acceleration needs one step."""
    start = flow.initial_velocity(NOISE, DATA, h)
    called = []

    def velocity(x, t):
        called.append("velocity")
        return start

    def accelerate(x, t, v):
        called.append("acceleration")
        assert torch.equal(v, start)
        return flow.acceleration(NOISE, DATA, start)

    arrived = flow.sample(velocity, accelerate, NOISE, flow.uniform(steps), ahead=ahead, h=h)
    torch.testing.assert_close(arrived, DATA)
    assert called == ["velocity"] + ["acceleration"] * steps, "steps + 1 calls"
    noise, found = flow.invert(velocity, accelerate, DATA, flow.uniform(steps)[::-1], ahead, h)
    torch.testing.assert_close(noise, NOISE)
    torch.testing.assert_close(
        flow.sample(velocity, accelerate, noise, flow.uniform(steps), found, ahead=ahead, h=h), DATA
    )


def test_the_initial_velocity_gets_no_gradient_from_the_acceleration():
    velocity = torch.ones(2, 2, requires_grad=True)
    weight = torch.tensor(1.0, requires_grad=True)
    flow.acceleration_loss(
        lambda x, t, v: weight * v, NOISE, DATA, velocity, torch.full((2,), 0.5)
    ).backward()
    assert velocity.grad is None
    assert weight.grad is not None


def test_losses_are_zero_for_nets_that_know_the_answer():
    t, v = torch.tensor([0.25, 0.75]), flow.initial_velocity(NOISE, DATA, 1.5)
    assert flow.velocity_loss(lambda x, t: v, NOISE, DATA, t, 1.5) == 0
    assert (
        flow.acceleration_loss(
            lambda x, t, start: 2 * (DATA - NOISE) - 2 * start, NOISE, DATA, v, t
        )
        == 0
    )


def test_the_acceleration_is_asked_for_ahead_on_the_path_so_far():
    """v0 = 1, h = 1: at t = 1/4 the path is at 1/4. It says 2, so at 3/4 x = 1/4 + 1/2 (1 + 1/2 ·
    2) = 5/4; it says 4: 5/4 + 1/4 (1 + 7/8 · 4) = 19/8.
    """
    asked = []

    def accelerate(x, t, v):
        asked.append((x.item(), t.item()))
        return torch.full_like(x, 2.0 * len(asked))

    found = flow.sample(
        lambda x, t: torch.ones_like(x), accelerate, torch.zeros(1, 1), flow.uniform(2), ahead=0.5
    )
    assert found.item() == 19 / 8
    assert asked == [(0.25, 0.25), (1.25, 0.75)]


def test_times_of_any_spacing_and_from_the_middle():
    """Exact nets stand where the path does at each of them; from t = 1/4 the velocity net is asked
    there.
    """
    start, asked, seen = flow.initial_velocity(NOISE, DATA, 1.5), [], []

    def velocity(x, t):
        asked.append(t.tolist())
        return start

    def accelerate(x, t, v):
        return flow.acceleration(NOISE, DATA, start)

    quarter = flow.interpolate(NOISE, DATA, start, torch.full((2,), 0.25))
    arrived = flow.sample(
        velocity, accelerate, quarter, [0.25, 0.375, 1.0], report=lambda step, x: seen.append(x)
    )
    torch.testing.assert_close(arrived, DATA)
    torch.testing.assert_close(
        seen[0], flow.interpolate(NOISE, DATA, start, torch.full((2,), 0.375))
    )
    assert asked == [[0.25, 0.25]]


@pytest.mark.parametrize("h", [0.0, 0.5, 1.0, 1.5, 2.0])
def test_a_share_of_the_line_has_its_time(h):
    t = torch.linspace(0, 1, 9, dtype=torch.float64)
    torch.testing.assert_close(flow.time_of(flow.retimed(t, h), h), t, atol=1e-7, rtol=0)
