"""A layer to decompose whose inputs are correlated, off-centre and have outlier channels, as a
transformer's are; and how close its decomposition is.
"""

import torch

from nibble.quant.calibration.statistics import InputStats

N, K = 192, 256


def layer(seed: int = 0, n: int = N, k: int = K) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    strong = torch.randn(n, 8, generator=g) @ torch.randn(8, k, generator=g)
    return (torch.randn(n, k, generator=g) + 0.5 * strong) / k**0.5, torch.randn(n, generator=g)


def inputs(tokens: int, seed: int = 1, k: int = K) -> torch.Tensor:
    """Every call with another seed gives other tokens of the same distribution."""
    g = torch.Generator().manual_seed(99)
    mix = torch.randn(24, k, generator=g)
    size, mean = torch.exp(torch.randn(k, generator=g)), torch.randn(k, generator=g)
    g.manual_seed(seed)
    return (
        torch.randn(tokens, 24, generator=g) @ mix * 0.3
        + 0.5 * torch.randn(tokens, k, generator=g)
        + mean
    ) * size


def recorded(x: torch.Tensor, **options) -> InputStats:
    stats = InputStats.empty(x.shape[-1], **options)
    stats.update(x)
    return stats


def db(weight, bias, result, x) -> float:
    y = x @ weight.T
    error = result.forward(x) - (0 if bias is None else bias) - y
    return (10 * torch.log10(y.square().sum() / error.square().sum())).item()
