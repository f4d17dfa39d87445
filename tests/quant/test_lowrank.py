"""The randomized SVDs, on matrices whose rank is known."""

import pytest
import torch

from nibble.quant.weights.lowrank import factors_of_lowest_rank, leading_components


def of_rank(rank: int) -> torch.Tensor:
    draw = torch.Generator().manual_seed(rank)
    return torch.randn(320, rank, generator=draw) @ torch.randn(rank, 256, generator=draw)


@pytest.mark.parametrize("rank", [1, 16, 40])
def test_a_matrix_of_known_rank_is_found_exactly(rank):
    delta = of_rank(rank)
    down, up = factors_of_lowest_rank(delta, negligible=0.0)
    assert down.shape == (256, rank)
    assert up.shape == (320, rank)
    assert (up @ down.T - delta).norm() / delta.norm() < 1.1e-3


def test_a_matrix_of_full_rank_is_left_dense():
    full = torch.randn(256, 256, generator=torch.Generator().manual_seed(0))
    assert factors_of_lowest_rank(full, negligible=0.0) is None


def test_the_leading_components_are_those_of_the_svd():
    matrix = of_rank(40)
    up, down = leading_components(matrix, 24)
    u, s, vh = torch.linalg.svd(matrix)
    best = (u[:, :24] * s[:24]) @ vh[:24]
    assert up.shape == (320, 24)
    assert down.shape == (24, 256)
    assert (matrix - up @ down).norm() < 1.02 * (matrix - best).norm()


def test_the_same_matrix_has_the_same_factors():
    first, second = (leading_components(of_rank(40), 24) for _ in range(2))
    assert torch.equal(first[0], second[0])
    assert torch.equal(first[1], second[1])
