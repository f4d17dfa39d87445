"""What is asked for while training: times, their ends, and that everything comes from one
generator.
"""

import pytest
import torch

from nibble.accel.caf import flow, objectives


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def test_times_are_the_papers_by_default():
    drawn = objectives.times(20000, generator())
    assert torch.equal(drawn, torch.randint(0, 1001, (20000,), generator=generator()) / 1000)
    assert drawn.min() == 0
    assert drawn.max() == 1


def test_ends_get_their_shares_and_the_rest_stays_uniform():
    drawn = objectives.times(20000, generator(), ends=(0.5, 0.125))
    shares = [(drawn == end).double().mean().item() for end in (0, 1)]
    assert abs(shares[0] - 0.5) < 0.02
    assert abs(shares[1] - 0.125) < 0.02
    between = drawn[(drawn > 0) & (drawn < 1)]
    assert abs(between.mean().item() - 0.5) < 0.02
    assert abs(between.std().item() - 12**-0.5) < 0.02


def test_a_loss_depends_on_the_generator_alone():
    def batches(generator):
        return torch.randn(4, 2, generator=generator), torch.randn(4, 2, generator=generator), None

    def net(x, t, condition):
        return x * t[:, None]

    loss = objectives.velocity_objective(net, batches, 1.5, (0.5, 0.1))
    assert loss(generator(3)) == loss(generator(3)) != loss(generator(4))
    push = objectives.acceleration_objective(
        lambda x, t, v, condition: v * t[:, None], net, batches, (0.5, 0.1)
    )
    assert push(generator(3)) == push(generator(3)) != push(generator(4))


def test_huber_is_the_distance_far_off_and_its_square_close_by():
    """c = 0.00054 x 1000 = 0.54; a sample whose error has length L costs (sqrt(L^2 + c^2) - c) /
    1000.
    """
    found = torch.zeros(2, 10, 100)
    found[0, 0, :4] = 1.5  # L = 3
    far = ((9 + 0.54**2) ** 0.5 - 0.54) / 1000
    assert flow.pseudo_huber(found, torch.zeros(2, 10, 100)).item() == pytest.approx(far / 2)
    close = flow.pseudo_huber(torch.full((1, 1000), 1e-4), torch.zeros(1, 1000)).item()
    assert close == pytest.approx(1000 * 1e-8 / (2 * 0.54) / 1000, rel=1e-3)


def test_one_pair_of_a_hundred_that_does_not_fit_moves_huber_less():
    """The best single answer to 99 ones and a hundred: 1.99 by squares, close to 1 by Huber."""

    def batches(generator):
        data = torch.ones(100, 1)
        data[0] = 100.0
        return torch.zeros(100, 1), data, None

    answers = {}
    for distance in objectives.DISTANCES:
        answer = torch.zeros(1, requires_grad=True)
        optimizer = torch.optim.Adam([answer], lr=0.02)
        loss = objectives.velocity_objective(
            lambda x, t, c, answer=answer: answer.expand(len(x), 1), batches, 1.0, distance=distance
        )
        for _ in range(400):
            optimizer.zero_grad()
            loss(generator()).backward()
            optimizer.step()
        answers[distance] = answer.item()
    assert answers["MSE"] == pytest.approx(1.99, abs=0.02)
    assert answers["Huber"] == pytest.approx(1, abs=0.05)
