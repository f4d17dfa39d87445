"""How close two pictures are: PSNR, and SSIM (Wang et al., "Image Quality Assessment", IEEE TIP
2004, eq. 13).
"""

import torch


def psnr(pictures: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """Peak signal-to-noise ratio of each picture, in dB. Both (batch, height, width, 3) in [0, 1] →
    (batch,).
    """
    return -10 * (pictures - reference).square().mean((1, 2, 3)).clamp(min=1e-10).log10()


def ssim(pictures: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """Structural similarity of each picture, at most 1: an 11-pixel Gaussian window of sigma 1.5.
    Shapes as in `psnr`.
    """
    axis = torch.exp(-(torch.arange(11.0) - 5).square() / (2 * 1.5**2))
    window = torch.outer(axis, axis)[None, None] / axis.sum() ** 2

    def blur(x):
        batch, height, width, channels = x.shape
        planes = x.permute(0, 3, 1, 2).reshape(batch * channels, 1, height, width)
        return torch.nn.functional.conv2d(planes, window).reshape(batch, -1)

    mean_a, mean_b = blur(pictures), blur(reference)
    var_a, var_b = blur(pictures**2) - mean_a**2, blur(reference**2) - mean_b**2
    covariance = blur(pictures * reference) - mean_a * mean_b
    c1, c2 = 0.01**2, 0.03**2
    similarity = (
        (2 * mean_a * mean_b + c1)
        * (2 * covariance + c2)
        / ((mean_a**2 + mean_b**2 + c1) * (var_a + var_b + c2))
    )
    return similarity.mean(1)
