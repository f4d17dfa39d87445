"""Both nets of Constant Acceleration Flow from one flow model with two heads, so that training
starts from what the model knows.

A flow model, asked at noise level sigma, gives w = dx/dt towards the data. A path with v0 = h (x1 -
x0) runs along a straight line, at time t the share s(t) = h t + (1 - h) t^2 of it; so the model is
asked at sigma = 1 - s(t), where pictures look as they do on the path:

    v(x, t)     = h w(x, sigma)
    a(x, t, v0) = 2 (r - v0) / (1 + t),    r = (1 + (1 - h) t) w(x, sigma, v0)

r is the mean velocity over what is left of the path, for x1 - x_t = (1 - t) ((1 + t) (x1 - x0) - t
v0). Hence with untrained heads a step to the end is Euler's from where x is, and what is to be
learned is the model's own error. (The nets are those of arXiv:2411.00322, section 4; there they
begin as a teacher whose velocity they replace, here what they give is written in terms of it.)
"""

from collections.abc import Callable

from torch import Tensor

from .flow import Acceleration, Velocity, at, retimed

# x (batch, …), sigma (batch,) 1 … 0, initial velocity or None → dx/dt, in x's shape
Model = Callable[[Tensor, Tensor, Tensor | None], Tensor]


def velocity_net(model: Model, h: float) -> Velocity:
    """The velocity net that a model is; it is given no initial velocity."""
    return lambda x, t: h * model(x, 1 - retimed(t, h), None)


def acceleration_net(model: Model, h: float) -> Acceleration:
    """The acceleration net that a model is, conditioned on the initial velocity."""

    def net(x: Tensor, t: Tensor, start: Tensor) -> Tensor:
        rest = at(1 + (1 - h) * t, x) * model(x, 1 - retimed(t, h), start)
        return at(2 / (1 + t), x) * (rest - start)

    return net
