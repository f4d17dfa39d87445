"""The auxiliary matrix: known values, an independent computation in plain integers, and its
statistics.
"""

import hashlib

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nibble.quant.intlora import auxiliary

MASK = 0xFFFFFFFF
KNOWN = [[0, 16, 69, -5, 0, 6, -24, -7, -35, 2], [-18, 21, 0, 14, 7, -7, 26, 3, 7, -36]]
SHA = "a10b5f68078fbac4"


def mix(x: int) -> int:
    x ^= x >> 16
    x = x * 0x7FEB352D & MASK
    x ^= x >> 15
    x = x * 0x846CA68B & MASK
    return x ^ (x >> 16)


def entry(n: int, j: int, k: int, seed: int, name: str) -> int:
    first, second = auxiliary.key_of(seed, name)
    word = mix((mix((n * -(-k // 4) + j // 4) ^ first) + second) & MASK)
    return auxiliary.TABLE[word >> 8 * (j % 4) & 255]


def test_known_values():
    """Written down once: a change of torch, device or this code that moved them would change every
    adapter with an R.
    """
    assert auxiliary.laplace(range(2), 10, 7, "a.b").tolist() == KNOWN
    assert (
        hashlib.sha256(auxiliary.laplace(range(64), 256, 7, "a.b").numpy().tobytes()).hexdigest()[
            :16
        ]
        == SHA
    )


@settings(max_examples=15, deadline=None)
@given(
    st.integers(0, 2**31),
    st.integers(1, 6),
    st.integers(1, 70),
    st.integers(0, 5_000_000),
    st.text(max_size=8),
)
def test_it_is_the_hash_of_the_place(seed, n, k, start, name):
    drawn = auxiliary.laplace(range(start, start + n), k, seed, name)
    assert drawn.dtype == torch.int8
    assert drawn.tolist() == [
        [entry(start + i, j, k, seed, name) for j in range(k)] for i in range(n)
    ]


def test_rows_come_in_parts(device):
    whole = auxiliary.laplace(range(96), 100, 3, "x", device)
    assert torch.equal(whole.cpu(), auxiliary.laplace(range(96), 100, 3, "x"))
    assert torch.equal(
        torch.cat(
            [
                auxiliary.laplace(range(40), 100, 3, "x"),
                auxiliary.laplace(range(40, 96), 100, 3, "x"),
            ]
        ),
        whole.cpu(),
    )


def test_it_looks_like_a_laplace_distribution():
    drawn = auxiliary.laplace(range(512), 512, 0, "layer").double()
    assert abs(drawn.mean().item()) < 0.2
    assert abs(drawn.std().item() / auxiliary.TABLE_SIGMA - 1) < 0.02
    # E|x| of a Laplace distribution is its scale
    assert abs(drawn.abs().mean().item() / 22 - 1) < 0.03
    lagged = (drawn[:, 1:] * drawn[:, :-1]).mean() / drawn.square().mean()
    assert abs(lagged.item()) < 0.01
    assert abs((drawn[1:] * drawn[:-1]).mean().item() / drawn.square().mean().item()) < 0.01


def test_layers_and_seeds_differ():
    draws = [
        auxiliary.laplace(range(8), 64, seed, name) for seed, name in ((0, "a"), (1, "a"), (0, "b"))
    ]
    assert not torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])


@pytest.mark.parametrize("size", [1e-3, 1.0, 40.0])
def test_variance_is_matched(size):
    weight = torch.randn(32, 512, generator=torch.Generator().manual_seed(0)) * size
    matrix = auxiliary.Noise(5, "a", auxiliary.scales(weight, rho=0.25)).matrix(512, torch.float64)
    assert abs((matrix.std() / weight.std()).item() - 0.25) < 0.0125
    paper = auxiliary.Noise(5, "a", auxiliary.scales(weight, alpha=1.5)).matrix(512, torch.float64)
    r = weight.std().item() / 0.5**0.5
    assert abs(paper.std().item() / (r**1.5 * 0.5**0.5) - 1) < 0.05


def test_parts_and_held_tables_are_the_same_matrix():
    whole = auxiliary.Noise(1, "a", torch.rand(20))
    assert torch.equal(whole.hold(48).matrix(48, torch.float64), whole.matrix(48, torch.float64))
    assert torch.equal(
        whole.rows(3, 9).matrix(48, torch.float64), whole.matrix(48, torch.float64)[3:9]
    )
    assert torch.equal(
        whole.hold(48).rows(3, 9).matrix(48, torch.float64), whole.matrix(48, torch.float64)[3:9]
    )
