"""A two-dimensional world in which everything is known: a ring of Gaussians, the exact velocity of
its rectified flow, and its couplings.

With x_t = (1 - t) x0 + t x1, x0 ~ N(0, I) and x1 from a mixture of N(mu_k, s^2 I), the marginal
velocity E[x1 - x0 | x_t] is a sum over the modes; integrating it gives the couplings that a perfect
teacher would make.
"""

import torch
from torch import Tensor, nn

MODES, RADIUS, SPREAD = 6, 4.0, 0.3


def centres() -> Tensor:
    """(modes, 2)."""
    angle = torch.arange(MODES) * (2 * torch.pi / MODES)
    return RADIUS * torch.stack([angle.cos(), angle.sin()], 1)


def velocity(x: Tensor, t: float) -> Tensor:
    """E[x1 - x0 | x_t = x] for x (batch, 2)."""
    mu, variance = centres(), (1 - t) ** 2 + (t * SPREAD) ** 2
    # (batch, modes, 2)
    away = x[:, None] - t * mu
    weight = torch.softmax(-away.square().sum(-1) / (2 * variance), 1)[..., None]
    data = mu + t * SPREAD**2 / variance * away
    noise = (1 - t) / variance * away
    return (weight * (data - noise)).sum(1)


def couplings(count: int, seed: int, steps: int = 200) -> tuple[Tensor, Tensor]:
    """(noise, data), each (count, 2): Heun's method along the exact velocity."""
    noise = torch.randn(count, 2, generator=torch.Generator().manual_seed(seed))
    x = noise
    for i in range(steps):
        first = velocity(x, i / steps)
        x = x + (first + velocity(x + first / steps, (i + 1) / steps)) / (2 * steps)
    return noise, x


class Net(nn.Module):
    """(x, t[, v0]) → 2 numbers: five layers of `width`, time as four sines."""

    def __init__(self, width: int = 128, seed: int = 0):
        super().__init__()
        torch.manual_seed(seed)
        sizes = [2 + 2 + 9, *[width] * 5, 2]
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in zip(sizes, sizes[1:], strict=False))

    def forward(self, x: Tensor, t: Tensor, start: Tensor | None = None) -> Tensor:
        """start: the initial velocity; zeros where there is none, as for the velocity net."""
        waves = t[:, None] * torch.pi * 2.0 ** torch.arange(4)
        hidden = torch.cat(
            [
                x,
                torch.zeros_like(x) if start is None else start,
                t[:, None],
                waves.sin(),
                waves.cos(),
            ],
            1,
        )
        for layer in self.layers[:-1]:
            hidden = nn.functional.silu(layer(hidden))
        return self.layers[-1](hidden)
