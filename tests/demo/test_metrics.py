import pytest
import torch

from nibble.demo import metrics


def test_psnr_of_a_constant_error():
    picture = torch.zeros(1, 16, 16, 3)
    assert metrics.psnr(picture + 0.1, picture).item() == pytest.approx(20.0, abs=1e-3)


def test_ssim_is_one_for_equals_and_falls_with_noise():
    picture = torch.rand(2, 32, 32, 3, generator=torch.Generator().manual_seed(0))
    noise = torch.randn(picture.shape, generator=torch.Generator().manual_seed(1))
    scores = [
        metrics.ssim((picture + s * noise).clamp(0, 1), picture).mean().item()
        for s in (0, 0.05, 0.2)
    ]
    assert scores[0] == pytest.approx(1.0, abs=1e-5)
    assert scores[0] > scores[1] > scores[2]


def test_ssim_agrees_with_its_formula_on_one_window():
    """An 11-pixel picture has one window: the formula by hand."""
    g = torch.Generator().manual_seed(0)
    a, b = torch.rand(1, 11, 11, 1, generator=g), torch.rand(1, 11, 11, 1, generator=g)
    axis = torch.exp(-((torch.arange(11.0) - 5) ** 2) / 4.5)
    w = torch.outer(axis, axis) / axis.sum() ** 2

    def mean(x):
        return (w * x[0, :, :, 0]).sum()

    ma, mb = mean(a), mean(b)
    va, vb, cov = mean(a * a) - ma**2, mean(b * b) - mb**2, mean(a * b) - ma * mb
    by_hand = (2 * ma * mb + 1e-4) * (2 * cov + 9e-4) / ((ma**2 + mb**2 + 1e-4) * (va + vb + 9e-4))
    assert metrics.ssim(a, b).item() == pytest.approx(by_hand.item(), abs=1e-5)
