"""The training loop's care for blocks that write to their tensors, for gradients that are no
numbers, and for every optimizer.
"""

import pytest
import torch
from torch import nn

from nibble.quant.files.errors import FileRefused
from nibble.quant.training import loop, recompute
from nibble.quant.training.loop import Options


class Block(nn.Module):
    """x + linear(norm(x)), the sum in place or not: the norm keeps x for its gradient, and `x +=
    ...` writes over it.
    """

    def __init__(self, in_place: bool):
        super().__init__()
        torch.manual_seed(0)
        self.norm, self.linear, self.in_place = nn.LayerNorm(8), nn.Linear(8, 8), in_place

    def forward(self, x, extra=None, scale=1.0):
        change = self.linear(self.norm(x)) * scale + extra["more"]
        if not self.in_place:
            return (x + change) * (x + change)[..., :1]
        x += change
        first = x[..., :1].clone()
        x *= first
        return x


def gradients(in_place: bool, allowed: bool, twice: bool) -> list[torch.Tensor]:
    """The gradient of every parameter, through two blocks that share one input."""
    blocks, x = [Block(in_place), Block(in_place)], torch.linspace(-1, 1, 24).reshape(3, 8)
    start = nn.Parameter(torch.ones(8))
    with (
        recompute.allowing_writes(blocks if allowed else ()),
        recompute.checkpointing(blocks if twice else ()),
    ):
        y = x * start
        for block in blocks:
            y = block(y, extra={"more": y.mean() * start[0]}, scale=1.5)
        y.square().sum().backward()
    assert not any("forward" in vars(block) for block in blocks)
    return [start.grad, *(p.grad for block in blocks for p in block.parameters())]


@pytest.mark.parametrize("twice", [False, True])
def test_blocks_that_write_to_their_inputs_get_the_gradients_of_those_that_do_not(twice):
    wanted = gradients(False, False, False)
    for found, grad in zip(gradients(True, True, twice), wanted, strict=True):
        torch.testing.assert_close(found, grad, rtol=1e-5, atol=1e-6)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        gradients(True, False, twice)


def test_inputs_of_a_block_that_is_computed_twice_are_left_alone():
    block, x = Block(True), torch.ones(2, 8)
    with recompute.checkpointing([block]):
        block(x, extra={"more": 0})
    assert torch.equal(x, torch.ones(2, 8))


def test_a_gradient_that_is_no_number_changes_nothing():
    weight = nn.Parameter(torch.zeros(3))
    with pytest.raises(
        ValueError, match="the gradient is not finite at step 1; lower the learning rate"
    ):
        list(loop.steps({"w": weight}, lambda generator: weight.sqrt().sum(), Options(steps=2)))
    assert torch.equal(weight, torch.zeros(3))


@pytest.mark.parametrize("optimizer", list(loop.OPTIMIZERS))
def test_every_optimizer_goes_on_from_its_state(optimizer, tmp_path):
    def run(steps: int, lr: float = 0.1, state=None):
        weight = nn.Parameter(torch.ones(4))

        def loss(generator):
            return ((weight - torch.rand(4, generator=generator)) ** 2).sum()

        losses = [
            value
            for _, value in loop.steps(
                {"w": weight}, loss, Options(steps=steps, lr=lr, optimizer=optimizer), state=state
            )
        ]
        return losses, weight.detach()

    losses, whole = run(6)
    first, _ = run(3, state=tmp_path / "state")
    rest, resumed = run(6, state=tmp_path / "state")
    assert first + rest == losses
    assert torch.equal(whole, resumed)
    assert not torch.equal(run(9, lr=0.01, state=tmp_path / "state")[1], run(9)[1]), (
        "the learning rate may change"
    )


def test_the_rate_falls_to_nothing_over_the_last_share_of_the_steps(tmp_path):
    """Warmed up over 2 of 8 steps, falling over the last 4."""
    options = Options(steps=8, lr=1.0, warmup=2, decay=0.5)
    assert [options.rate(done) for done in range(8)] == [0.5, 1, 1, 1, 1, 0.75, 0.5, 0.25]
    weight = nn.Parameter(torch.ones(4))
    list(
        loop.steps({"w": weight}, lambda generator: weight.sum(), options, state=tmp_path / "state")
    )
    with pytest.raises(FileRefused, match="other options"):
        list(
            loop.steps(
                {"w": weight},
                lambda generator: weight.sum(),
                Options(steps=9, lr=1.0, warmup=2, decay=0.5),
                state=tmp_path / "state",
            )
        )
    with pytest.raises(ValueError, match="decay=2 is not a share"):
        Options(decay=2)


def test_an_unknown_optimizer_is_refused():
    with pytest.raises(ValueError, match="optimizer='Lion' is not one of AdamW"):
        Options(optimizer="Lion")
