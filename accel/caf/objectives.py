"""What to minimise for the two nets of Constant Acceleration Flow, for any model: a loss that draws
its batch, and times, from one generator.

Batches are couplings: noise and the data that a teacher's sampler made of it, with whatever the
model is conditioned on. Couplings are deterministic, so paths hardly cross, and what is left of
crossings the acceleration net resolves by the initial velocity that it is given.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Generator, Tensor

from . import flow

# noise (batch, …), data of the same shape, condition: anything the nets understand
Batch = tuple[Tensor, Tensor, Any]
Batches = Callable[[Generator], Batch]
# by the name that the node shows
DISTANCES: dict[str, flow.Distance] = {
    "MSE": torch.nn.functional.mse_loss,
    "Huber": flow.pseudo_huber,
}
# `ends` of `times` for trainings of hundreds of steps: tests/bench/results/caf-distilled.json
ENDS = {"velocity": (0.5, 0.15), "acceleration": (0.25, 0.15)}
# t is one of 0, 1/1000, …, 1, as in the paper's code: both ends are asked for in sampling and
# inversion
_TIMES = 1000


def times(
    count: int,
    generator: Generator,
    device: torch.device | str = "cpu",
    ends: tuple[float, float] = (0.0, 0.0),
) -> Tensor:
    """t (count,) float32, uniform over {0, 1/1000, …, 1}; the shares `ends` of all draws are t = 0
    and t = 1 instead.

    Few steps ask for t = 0 most of all and inversion for t = 1: a short training spends its
    time best there. The paper's is (0, 0).
    """
    drawn = torch.randint(0, _TIMES + 1, (count,), generator=generator) / _TIMES
    if any(ends):
        chance = torch.rand(count, generator=generator)
        drawn = torch.where(chance < ends[0], 0.0, torch.where(chance < sum(ends), 1.0, drawn))
    return drawn.to(device)


def velocity_objective(
    net: Callable[[Tensor, Tensor, Any], Tensor],
    batches: Batches,
    h: float,
    ends: tuple[float, float] = (0.0, 0.0),
    distance: str = "MSE",
) -> Callable[[Generator], Tensor]:
    """generator → loss of the velocity net `net(x, t, condition)`; ends: of `times`; distance: a
    key of DISTANCES.
    """

    def loss(generator: Generator) -> Tensor:
        noise, data, condition = batches(generator)
        return flow.velocity_loss(
            lambda x, t: net(x, t, condition),
            noise,
            data,
            times(len(noise), generator, noise.device, ends),
            h,
            DISTANCES[distance],
        )

    return loss


def acceleration_objective(
    net: Callable[[Tensor, Tensor, Tensor, Any], Tensor],
    velocity: Callable[[Tensor, Tensor, Any], Tensor],
    batches: Batches,
    ends: tuple[float, float] = (0.0, 0.0),
    distance: str = "MSE",
) -> Callable[[Generator], Tensor]:
    """generator → loss of the acceleration net `net(x, t, v0, condition)`, with v0 from the trained
    velocity net; ends: of `times`; distance: a key of DISTANCES.
    """

    def loss(generator: Generator) -> Tensor:
        noise, data, condition = batches(generator)
        with torch.no_grad():
            start = velocity(noise, noise.new_zeros(len(noise)), condition)
        drawn = times(len(noise), generator, noise.device, ends)
        return flow.acceleration_loss(
            lambda x, t, v: net(x, t, v, condition), noise, data, start, drawn, DISTANCES[distance]
        )

    return loss


def rectified_objective(
    net: Callable[[Tensor, Tensor, Any], Tensor], batches: Batches
) -> Callable[[Generator], Tensor]:
    """generator → loss of 2-rectified flow (Liu et al. 2022, arXiv:2209.03003) on the same
    couplings: the baseline, a constant velocity.
    """

    def loss(generator: Generator) -> Tensor:
        noise, data, condition = batches(generator)
        t = times(len(noise), generator, noise.device)
        x = torch.lerp(noise, data, flow.at(t, noise))
        return torch.nn.functional.mse_loss(net(x, t, condition), data - noise)

    return loss
