"""What others do, by answers that are known."""

import pytest
import torch

import checkout  # noqa: F401
from bench import baselines


@pytest.mark.parametrize(
    ("bits", "levels", "error"),
    [
        (1, [0.7979], 0.3634),
        (2, [0.4528, 1.5104], 0.1175),
        (3, [0.2451, 0.7560, 1.344, 2.152], 0.03454),
    ],
)
def test_the_levels_and_errors_of_max(bits, levels, error):
    """Max, Quantizing for minimum distortion, 1960, table 1."""
    found = baselines.lloyd_max(bits)
    assert found[2 ** (bits - 1) :].tolist() == pytest.approx(levels, abs=1e-3)
    assert torch.allclose(found, -found.flip(0), atol=1e-5)
    weight = torch.randn(256, 192, generator=torch.Generator().manual_seed(0))
    missed = (weight - baselines.orbitquant(weight, bits)).square().mean()
    assert missed.item() == pytest.approx(error, rel=0.05)


def test_rotation_spreads_an_outlier_and_rows_have_their_own_scale():
    weight = torch.randn(64, 256, generator=torch.Generator().manual_seed(1))
    weight[:, 7] *= 8
    scales = 10.0 ** torch.arange(64)[:, None].div(16)
    plain, scaled = (baselines.orbitquant(w, 3) for w in (weight, weight * scales))
    assert (weight - plain).square().sum() / weight.square().sum() < 0.05
    # norms are rounded to 16 bits, so that a weight at the edge between two levels may move
    assert (scaled / scales - plain).square().mean() < 1e-3
    assert not baselines.orbitquant(torch.zeros(2, 64), 2).any()
