"""The equations of Constant Acceleration Flow, for any two callables that give a velocity and an acceleration.

Time t runs from 0 (noise, x0) to 1 (data, x1), as in the paper. Along a path the acceleration is constant, so from an initial velocity v0

    x_t = x0 + v0 t + a t^2 / 2 = (1 - t^2) x0 + t^2 x1 + (t - t^2) v0
    a   = 2 (x1 - x0) - 2 v0

The velocity net learns v0 = h (x1 - x0); the acceleration net learns what then is left, given its own v0 ("initial velocity conditioning"),
which tells it which of the crossing paths it is on. h = 1 is a straight line at constant speed, h > 1 slows down, h < 1 speeds up.
arXiv:2411.00322: the ODE, its path and both losses are section 4, sampling algorithm 2, inversion algorithm 3.
"""

from collections.abc import Callable

import torch
from torch import Tensor

Velocity = Callable[[Tensor, Tensor], Tensor]              # x (batch, …), t (batch,) → the velocity at t, in x's shape
Acceleration = Callable[[Tensor, Tensor, Tensor], Tensor]  # x, t, v0 → the acceleration


def at(t: Tensor, like: Tensor) -> Tensor:
    """t (batch,) with as many dimensions as `like` (batch, …)."""
    return t.reshape(-1, *[1] * (like.dim() - 1))


def interpolate(noise: Tensor, data: Tensor, velocity: Tensor, t: Tensor) -> Tensor:
    """x_t (batch, …) of the path from `noise` to `data` that starts with `velocity`; t (batch,) in [0, 1]."""
    t = at(t, noise)
    return (1 - t * t) * noise + t * t * data + (t - t * t) * velocity


def initial_velocity(noise: Tensor, data: Tensor, h: float) -> Tensor:
    """What the velocity net learns: h (x1 - x0)."""
    return h * (data - noise)


def acceleration(noise: Tensor, data: Tensor, velocity: Tensor) -> Tensor:
    """What the acceleration net learns: 2 (x1 - x0) - 2 v0."""
    return 2 * (data - noise) - 2 * velocity


def velocity_loss(net: Velocity, noise: Tensor, data: Tensor, t: Tensor, h: float) -> Tensor:
    """Mean squared error of the initial velocity, seen at every t: the net is asked at t = 0 in sampling and at t = 1 in inversion."""
    target = initial_velocity(noise, data, h)
    return torch.nn.functional.mse_loss(net(interpolate(noise, data, target, t), t), target)


def acceleration_loss(net: Acceleration, noise: Tensor, data: Tensor, velocity: Tensor, t: Tensor) -> Tensor:
    """Mean squared error of the acceleration along the path that starts with the velocity net's own `velocity` at (noise, 0)."""
    velocity = velocity.detach()
    return torch.nn.functional.mse_loss(net(interpolate(noise, data, velocity, t), t, velocity), acceleration(noise, data, velocity))


def sample(velocity: Velocity, accelerate: Acceleration, noise: Tensor, steps: int, start: Tensor | None = None,
           report: Callable[[int, Tensor], None] = lambda step, x: None) -> Tensor:
    """noise (batch, …) → data, by algorithm 2: one call of the velocity net, then `steps` of the acceleration net, so steps + 1 calls.

    start: the initial velocity, where it is known from `invert`; the velocity net is not called then.
    """
    v = velocity(noise, noise.new_zeros(len(noise))) if start is None else start
    x = noise
    for i in range(steps):
        t = noise.new_full((len(noise),), i / steps)
        x = x + (v + (2 * i + 1) / (2 * steps) * accelerate(x, t, v)) / steps
        report(i, x)
    return x


def invert(velocity: Velocity, accelerate: Acceleration, data: Tensor, steps: int) -> tuple[Tensor, Tensor]:
    """data (batch, …) → (noise, initial velocity), by algorithm 3; `sample` with both leads back."""
    v = velocity(data, data.new_ones(len(data)))
    x = data
    for i in range(steps, 0, -1):
        t = data.new_full((len(data),), i / steps)
        x = x - (v + (2 * i - 1) / (2 * steps) * accelerate(x, t, v)) / steps
    return x, v


def retimed(t: Tensor, h: float) -> Tensor:
    """How far along a straight line a path with v0 = h (x1 - x0) is at time t: h t + (1 - h) t^2."""
    return h * t + (1 - h) * t * t
