"""Few-step objectives that need no couplings, on the ring of Gaussians (`mixture.py`).

Time runs as in CAF, from noise (0) to data (1); a net `u(x, t, to)` is asked at t for a step to
`to`, and learns from data with noise drawn for it, or from the velocity that a teacher has there.

MeanFlow (Geng et al. 2025, arXiv:2505.13447, eq. 6 to 11): u is the mean velocity of the step,
    u = v + (to - t) (v . grad u + du/dt), whose right side is the target, without a gradient
    (a Jacobian-vector product); v: data - noise, or the teacher's velocity
piFlow (Chen et al. 2025, arXiv:2510.14974, algorithm 1, its DX policy): u is the data as seen at
    GRID times of the step, from which every velocity in between follows without the net; it learns
    the teacher's velocity at one point of the curve that it draws itself
"""

from collections.abc import Callable

import torch
from torch import Generator, Tensor, nn

from bench import mixture

GRID = 10  # points of a piFlow step, as in its paper
SUBSTEPS = 32  # of Euler's method along a piFlow step
SAME = 0.75  # share of MeanFlow's draws with no step to go, as in its paper


class Net(nn.Module):
    """(x (batch, 2), t, to (batch,)) → `outputs` numbers: layers as in `mixture.Net`, both times
    as sines.
    """

    def __init__(self, outputs: int = 2, width: int = 128, seed: int = 0):
        super().__init__()
        torch.manual_seed(seed)
        sizes = [2 + 9 + 9, *[width] * 5, outputs]
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in zip(sizes, sizes[1:], strict=False))

    def forward(self, x: Tensor, t: Tensor, to: Tensor) -> Tensor:
        seen = [x]
        for time in (t, to - t):
            waves = time[:, None] * torch.pi * 2.0 ** torch.arange(4)
            seen += [time[:, None], waves.sin(), waves.cos()]
        hidden = torch.cat(seen, 1)
        for layer in self.layers[:-1]:
            hidden = nn.functional.silu(layer(hidden))
        return self.layers[-1](hidden)


def teacher(x: Tensor, t: Tensor) -> Tensor:
    """`mixture.velocity` with a time for each row (batch,)."""
    mu, t = mixture.centres(), t[:, None]
    variance = (1 - t) ** 2 + (t * mixture.SPREAD) ** 2
    away = x[:, None] - t[..., None] * mu
    weight = torch.softmax(-away.square().sum(-1) / (2 * variance), 1)[..., None]
    scale = (t * mixture.SPREAD**2 - (1 - t)) / variance
    return (weight * (mu + scale[..., None] * away)).sum(1)


def samples(count: int, generator: Generator) -> tuple[Tensor, Tensor]:
    """(noise, data), each (count, 2), of which neither knows the other."""
    noise, spread = (torch.randn(count, 2, generator=generator) for _ in range(2))
    mode = torch.randint(0, mixture.MODES, (count,), generator=generator)
    return noise, mixture.centres()[mode] + mixture.SPREAD * spread


def meanflow(net: Net, taught: bool, count: int = 256) -> Callable[[Generator], Tensor]:
    """generator → loss; taught: by the teacher's velocity."""

    def loss(generator: Generator) -> Tensor:
        noise, data = samples(count, generator)
        t, to = torch.rand(2, count, generator=generator).sort(0).values
        to = torch.where(torch.rand(count, generator=generator) < SAME, t, to)
        x, v = torch.lerp(noise, data, t[:, None]), data - noise
        if taught:
            v = teacher(x, t)
        ones, still = torch.ones_like(t), torch.zeros_like(t)
        u, change = torch.func.jvp(net, (x, t, to), (v, ones, still))
        # squares, p = 0 of the paper: p = 1 divides by each sample's own error, which here is
        # mostly the noise of its target
        return (u - (v + (to - t)[:, None] * change).detach()).square().mean()

    return loss


def meanflow_sample(net: Net, x: Tensor, calls: int) -> Tensor:
    for i in range(calls):
        t, to = (x.new_full((len(x),), (i + j) / calls) for j in range(2))
        x = x + net(x, t, to) / calls
    return x


def policy(grid: Tensor, t: Tensor, to: Tensor, x: Tensor, time: Tensor) -> Tensor:
    """The velocity at (x, time) of a step from t to `to` whose data are `grid` (batch, GRID, 2)."""
    place = (time - t) / (to - t) * (GRID - 1)
    low = place.floor().clamp(0, GRID - 2).long()
    rows = torch.arange(len(x))
    data = torch.lerp(grid[rows, low], grid[rows, low + 1], (place - low)[:, None])
    return (data - x) / (1 - time).clamp_min(1e-3)[:, None]


def rolled(grid: Tensor, t: Tensor, to: Tensor, x: Tensor, until: Tensor) -> Tensor:
    """x at t → at `until` (batch,), along the policy."""
    step = (until - t) / SUBSTEPS
    for i in range(SUBSTEPS):
        x = x + step[:, None] * policy(grid, t, to, x, t + i * step)
    return x


def piflow(net: Net, calls: tuple[int, ...], count: int = 256) -> Callable[[Generator], Tensor]:
    """generator → loss; calls: numbers of steps of a run, of which one is drawn for each row."""

    def loss(generator: Generator) -> Tensor:
        noise, data = samples(count, generator)
        steps = torch.tensor(calls)[torch.randint(0, len(calls), (count,), generator=generator)]
        t = (torch.rand(count, generator=generator) * steps).floor() / steps
        to = t + 1 / steps
        x = torch.lerp(noise, data, t[:, None])
        grid = net(x, t, to).reshape(count, GRID, 2)
        until = t + torch.rand(count, generator=generator) * (to - t)
        with torch.no_grad():
            x = rolled(grid, t, to, x, until)
        wanted = teacher(x, until)
        # as an error of the data: the velocity's grows without limit towards the end
        error = (1 - until)[:, None] * (policy(grid, t, to, x, until) - wanted)
        return error.square().mean()

    return loss


def piflow_sample(net: Net, x: Tensor, calls: int) -> Tensor:
    for i in range(calls):
        t, to = (x.new_full((len(x),), (i + j) / calls) for j in range(2))
        x = rolled(net(x, t, to).reshape(len(x), GRID, 2), t, to, x, to)
    return x
