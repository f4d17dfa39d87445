"""What is asked for while training: times, their ends, and that everything comes from one
generator.
"""

import torch

from nibble.accel.caf import objectives


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
