"""The equations of Constant Acceleration Flow, for any two callables that give a velocity and an
acceleration.

Time t runs from 0 (noise, x0) to 1 (data, x1), as in the paper. Along a path the acceleration is
constant, so from an initial velocity v0

    x_t = x0 + v0 t + a t^2 / 2 = (1 - t^2) x0 + t^2 x1 + (t - t^2) v0
    a   = 2 (x1 - x0) - 2 v0

The velocity net learns v0 = h (x1 - x0); the acceleration net learns what then is left, given its
own v0 ("initial velocity conditioning"), which tells it which of the crossing paths it is on. h = 1
is a straight line at constant speed, h > 1 slows down, h < 1 speeds up. arXiv:2411.00322: the ODE,
its path and both losses are section 4, sampling algorithm 2, inversion algorithm 3.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

# where in a step our nodes ask for the acceleration; tests/bench/results/caf-distilled.json has
# what it is worth
AHEAD = 0.5
# x (batch, …), t (batch,) → the velocity at t, in x's shape
Velocity = Callable[[Tensor, Tensor], Tensor]
Acceleration = Callable[[Tensor, Tensor, Tensor], Tensor]  # x, t, v0 → the acceleration
Distance = Callable[[Tensor, Tensor], Tensor]  # found, wanted (batch, …) → a scalar


def at(t: Tensor, like: Tensor) -> Tensor:
    """t (batch,) with as many dimensions as `like` (batch, …)."""
    return t.reshape(-1, *[1] * (like.dim() - 1))


def interpolate(noise: Tensor, data: Tensor, velocity: Tensor, t: Tensor) -> Tensor:
    """x_t (batch, …) of the path from `noise` to `data` that starts with `velocity`; t (batch,) in
    [0, 1].
    """
    t = at(t, noise)
    return (1 - t * t) * noise + t * t * data + (t - t * t) * velocity


def initial_velocity(noise: Tensor, data: Tensor, h: float) -> Tensor:
    """What the velocity net learns: h (x1 - x0)."""
    return h * (data - noise)


def acceleration(noise: Tensor, data: Tensor, velocity: Tensor) -> Tensor:
    """What the acceleration net learns: 2 (x1 - x0) - 2 v0."""
    return 2 * (data - noise) - 2 * velocity


def pseudo_huber(found: Tensor, wanted: Tensor) -> Tensor:
    """(sqrt(|e|^2 + c^2) - c) / d of each sample's error e of d numbers, c = 0.00054 d; their mean.

    The distance that the paper's nets were trained with, less its perceptual part (Song and
    Dhariwal 2023, arXiv:2310.14189, section 3.3, have c = 0.00054 sqrt(d)). A sample that is far
    off counts by its distance and not by the square of it.
    """
    size = found[0].numel()
    c = 0.00054 * size
    squares = (found - wanted).flatten(1).square().sum(1)
    # the same without the difference of two near numbers
    return (squares / ((squares + c * c).sqrt() + c) / size).mean()


def velocity_loss(  # noqa: PLR0913 (the parts of the loss)
    net: Velocity,
    noise: Tensor,
    data: Tensor,
    t: Tensor,
    h: float,
    distance: Distance = torch.nn.functional.mse_loss,
) -> Tensor:
    """How far the initial velocity is off, seen at every t: the net is asked at t = 0 in sampling
    and at t = 1 in inversion.
    """
    target = initial_velocity(noise, data, h)
    return distance(net(interpolate(noise, data, target, t), t), target)


def acceleration_loss(  # noqa: PLR0913 (the parts of the loss)
    net: Acceleration,
    noise: Tensor,
    data: Tensor,
    velocity: Tensor,
    t: Tensor,
    distance: Distance = torch.nn.functional.mse_loss,
) -> Tensor:
    """How far the acceleration is off along the path that starts with the velocity net's own
    `velocity` at (noise, 0).
    """
    velocity = velocity.detach()
    return distance(
        net(interpolate(noise, data, velocity, t), t, velocity), acceleration(noise, data, velocity)
    )


def uniform(steps: int) -> list[float]:
    """Times 0, 1/steps, …, 1, as algorithm 2 takes them."""
    return [i / steps for i in range(steps + 1)]


def sample(  # noqa: PLR0913 (algorithm 2 with its options)
    velocity: Velocity,
    accelerate: Acceleration,
    noise: Tensor,
    times: Sequence[float],
    start: Tensor | None = None,
    report: Callable[[int, Tensor], None] = lambda step, x: None,
    ahead: float = 0.0,
    h: float = 1.0,
) -> Tensor:
    """x (batch, …) at times[0] → at times[-1], by algorithm 2: one call of the velocity net, then
    one of the acceleration net a step.

    times: rising, of any spacing, 0 … 1 from noise to data; a first time above 0 begins at a
        picture with noise in it
    start: the initial velocity, where it is known from `invert`; the velocity net is not called
        then
    report: called as report(step, x) after each step
    ahead: where in a step the acceleration is asked for, 0 … 1: at its beginning (algorithm 2), or
        further on, where there is more to be seen; constant as it is, it is the same everywhere on
        the path. Up to there the path goes on with the last one, at first with the one that v0 = h
        (x1 - x0) implies.
    """
    v = velocity(noise, noise.new_full((len(noise),), times[0])) if start is None else start
    return _walk(accelerate, noise, v, times, ahead, h, report)


def invert(
    velocity: Velocity,
    accelerate: Acceleration,
    data: Tensor,
    times: Sequence[float],
    ahead: float = 0.0,
    h: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """data (batch, …) at times[0] → (noise, initial velocity), by algorithm 3; times fall, as 1 …
    0. `sample` with both leads back.
    """
    v = velocity(data, data.new_full((len(data),), times[0]))
    return _walk(accelerate, data, v, times, ahead, h), v


def _walk(  # noqa: PLR0913 (the arguments of sample)
    accelerate: Acceleration,
    x: Tensor,
    start: Tensor,
    times: Sequence[float],
    ahead: float,
    h: float,
    report: Callable[[int, Tensor], None] = lambda step, x: None,
) -> Tensor:
    """x at times[0] → at times[-1], forwards or back; exact where the acceleration is constant."""
    if h == 0:
        ahead = 0.0  # a path that begins at rest does not show where it leads
    accel = start  # not looked at where the acceleration is asked for at once
    if ahead:
        accel = 2 * (1 - h) / h * start
    for i, (t, t_next) in enumerate(zip(times, times[1:], strict=False)):
        t_eval = t + ahead * (t_next - t)
        x = _moved(x, start, accel, t, t_eval)
        accel = accelerate(x, x.new_full((len(x),), t_eval), start)
        x = _moved(x, start, accel, t_eval, t_next)
        report(i, x)
    return x


def _moved(x: Tensor, start: Tensor, accel: Tensor, t: float, t_next: float) -> Tensor:
    """x at time t → at t_next under a constant acceleration."""
    return x if t == t_next else x + (t_next - t) * (start + (t + t_next) / 2 * accel)


def retimed(t: Tensor, h: float) -> Tensor:
    """How far along a straight line a path with v0 = h (x1 - x0) is at time t: h t + (1 -
    h) t^2.
    """
    return h * t + (1 - h) * t * t


def time_of(share: Tensor, h: float) -> Tensor:
    """The time t at which `retimed(t, h)` is `share`, both in [0, 1]; h in [0, 2]."""
    return 2 * share / (h + (h * h + 4 * (1 - h) * share).clamp_min(0).sqrt()).clamp_min(1e-12)
