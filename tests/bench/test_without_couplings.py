"""The objectives without couplings where their answers are known."""

import torch

from bench import mixture, without_couplings


def test_the_teacher_has_the_exact_velocity_for_a_time_a_row():
    x, t = torch.randn(3, 2), torch.tensor([0.0, 0.3, 0.9])
    wanted = torch.cat([mixture.velocity(x[i : i + 1], t[i].item()) for i in range(3)])
    torch.testing.assert_close(without_couplings.teacher(x, t), wanted, rtol=1e-4, atol=1e-4)


def test_a_policy_that_sees_one_picture_leads_straight_to_it():
    """From x at t = 0.5 half of what is left is done at 0.75, and all of it at 1."""
    picture, x = torch.tensor([[3.0, -1.0]]), torch.tensor([[1.0, 1.0]])
    grid = picture.expand(1, without_couplings.GRID, 2)
    t, to = torch.tensor([0.5]), torch.tensor([1.0])
    for until, wanted in ((0.75, (x + picture) / 2), (1.0, picture)):
        found = without_couplings.rolled(grid, t, to, x, torch.tensor([until]))
        torch.testing.assert_close(found, wanted)


def test_the_mean_velocity_of_a_constant_one_is_itself():
    """A net that says the same everywhere has no change, so its target is the teacher's."""
    net = without_couplings.Net()
    for parameter in net.parameters():
        torch.nn.init.zeros_(parameter)
    drawn = torch.Generator().manual_seed(0)
    noise, data = without_couplings.samples(256, torch.Generator().manual_seed(0))
    loss = without_couplings.meanflow(net, False)(drawn)
    torch.testing.assert_close(loss, (data - noise).square().mean())
