"""Constant acceleration without training: the second-order Adams-Bashforth step, and times spaced
as a decelerating path would have them.

Between two steps of a rectified flow the velocity is taken to change at the rate at which it
changed in the last step,

    x += dt ((1 + r/2) v_i - (r/2) v_(i-1)),    r = dt_i / dt_(i-1)

which is Adams-Bashforth of order 2 for steps of any length (Hairer, Norsett, Wanner 1993, section
III.5) and nothing new: ComfyUI's `lms` of order 2 takes the same step but ends with Euler's. Here
the last step is of second order too. The first is Euler's.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .flow import at, retimed


def average_velocity(
    velocity: Tensor, before: Tensor | None, ratio: float, limit: float | None = None
) -> Tensor:
    """The velocity to go with through the next step: that at its middle, if the last change goes
    on.

    velocity, before: at the beginning of this step and of the last one (None in the first step), of
        one shape (batch, …)
    ratio: this step's length over the last one's
    limit: the change is shortened to at most this share of the velocity's own length, a sample at a
        time; None: never
    """
    if before is None:
        return velocity
    change = (velocity - before) * (ratio / 2)
    if limit is not None:
        share = (
            limit * velocity.flatten(1).norm(dim=1) / change.flatten(1).norm(dim=1).clamp_min(1e-12)
        )
        change = change * at(share.clamp_max(1.0), change)
    return velocity + change


def integrate(
    velocity: Callable[[Tensor, int], Tensor],
    x: Tensor,
    times: Sequence[float],
    limit: float | None = None,
) -> Tensor:
    """x (batch, …) at times[0] → x at times[-1], one call of `velocity(x, i)` a step: dx/dt at
    times[i].

    Times, or sigmas, may run either way and turn round; a step of no length changes nothing and is
    not remembered.
    """
    before, last = None, 1.0
    for i, (start, stop) in enumerate(zip(times, times[1:], strict=False)):
        now, step = velocity(x, i), stop - start
        if step:
            x = x + step * average_velocity(now, before, step / last, limit)
            before, last = now, step
    return x


def retime(sigmas: Sequence[float] | Tensor, h: float) -> Tensor:
    """Sigmas of a rectified flow (1 = noise … 0 = data), each moved to where a path with v0 = h (x1
    - x0) would be at that time.

    h = 1 leaves them; h > 1 goes faster where there is most noise, so the steps grow shorter
    towards the picture. Raises ValueError for an h outside [0, 2], where the path would run
    backwards.
    """
    if not 0 <= h <= 2:
        raise ValueError(
            f"h = {h} is outside 0 to 2, where the path runs forwards only; 1 leaves the sigmas as"
            " they are, 1.5 is the paper's"
        )
    times = 1 - torch.as_tensor(sigmas)
    return 1 - retimed(times, h)
