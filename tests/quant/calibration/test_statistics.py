"""Recorded statistics equal the plain formulas, however the tokens arrive."""

import pytest
import torch

from nibble.quant.calibration.statistics import InputStats, block_size


def tokens(count: int = 500, k: int = 128, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, k, generator=generator) * torch.arange(1, k + 1) + 3


@pytest.mark.parametrize("parts", [[500], [1, 99, 250, 150]], ids=["at once", "in parts"])
def test_statistics_are_those_of_all_tokens(parts):
    x, stats = tokens(), InputStats.empty(128, samples=32, hessian_block=64)
    for part in x.split(parts):
        stats.update(part)
    assert stats.count == 500
    torch.testing.assert_close(stats.mean, x.mean(0))
    torch.testing.assert_close(stats.mean_square, x.square().mean(0))
    whole = x.T @ x / 500
    torch.testing.assert_close(
        stats.hessian, torch.stack([whole[:64, :64], whole[64:, 64:]]), rtol=1e-4, atol=1e-2
    )


def test_samples_are_distinct_rows_of_the_input_and_respect_the_cap():
    x, stats = tokens().bfloat16(), InputStats.empty(128, samples=32)
    for part in x.split(7):
        stats.update(part.reshape(1, *part.shape))
    assert stats.samples.shape == (32, 128)
    found = (stats.samples[:, None] == x[None]).all(-1)
    assert (found.sum(1) == 1).all()
    assert len(found.int().argmax(1).unique()) == 32


def test_samples_are_drawn_evenly_over_time():
    drawn = torch.zeros(4)
    for seed in range(60):
        stats = InputStats.empty(64, samples=8, hessian_block=0, seed=seed)
        for quarter in range(4):
            stats.update(torch.full((50, 64), float(quarter)))
        drawn += stats.samples[:, 0].float().long().bincount(minlength=4)
    assert (drawn - 120).abs().max() < 35  # 480 draws; the spread of a quarter's share is about 9


def test_same_seed_same_samples():
    one, two = (InputStats.empty(128, samples=16, seed=5) for _ in range(2))
    one.update(tokens())
    two.update(tokens())
    assert torch.equal(one.samples, two.samples)


def test_inputs_of_another_width_are_refused():
    with pytest.raises(ValueError, match="128 inputs"):
        InputStats.empty(128).update(torch.zeros(3, 64))


def test_no_tokens_change_nothing():
    stats = InputStats.empty(64)
    stats.update(torch.zeros(0, 64))
    assert stats.count == 0
    assert torch.isfinite(stats.mean).all()


@pytest.mark.parametrize(
    "k, size", [(64, 64), (384, 384), (3072, 512), (1152, 384), (15360, 512), (1280, 320)]
)
def test_blocks_are_the_largest_that_divide(k, size):
    assert block_size(k) == size


def test_a_width_off_the_group_size_is_refused_with_the_rule():
    with pytest.raises(ValueError, match="K=100 is not a multiple of the group size 64"):
        block_size(100)


def test_statistics_follow_the_input_to_its_device(device):
    stats = InputStats.empty(64, samples=4)
    stats.update(torch.ones(3, 64, device=device))
    assert stats.hessian.device.type == device
    assert stats.samples.device.type == device
