"""Sampling with a MODEL that has CAF heads (`load.py`), inside ComfyUI's own samplers, guiders and
masks.

At a level of noise (a flow's sigma; `accel/caf/coordinates.py`) the time of a path is t =
time_of(1 - level) (`accel/caf/flow.py`), so any scheduler's sigmas will do; those of `sigmas` are
evenly spaced in t, as in algorithm 2 of arXiv:2411.00322. Masks need nothing more: what they
protect is put on the straight line from noise to picture at the sigma that is asked for, which is
where a path of constant acceleration is at that time.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass

import comfy.samplers
import torch
from comfy.model_patcher import ModelPatcher
from torch import Tensor
from tqdm.auto import tqdm

from ....accel.caf import flow
from ....accel.caf.coordinates import Coordinates
from ....accel.caf.heads import Model, acceleration_net, velocity_net
from .load import asking, heads_of
from .straight import coordinates_of
from .training_free import row

AHEAD = flow.AHEAD


@dataclass(frozen=True)
class Velocity:
    """The initial velocity of a picture's path. start: (batch, …) float32 on the CPU, on the
    straight line; name: the CAF file by which it was found.
    """

    start: Tensor
    name: str

    def of(self, x: Tensor, name: str) -> Tensor:
        """The velocity for a latent x that is drawn with a CAF file. Raises ValueError where either
        does not fit.
        """
        if self.start.shape != x.shape:
            raise ValueError(
                f"The velocity from CAF Invert is of a latent {shape_of(self.start)}, and this one"
                f" is {shape_of(x)}; sample at the size and in the number that was inverted, or"
                " take the velocity off CAF Sampler."
            )
        if self.name != name:
            raise ValueError(
                f"The velocity from CAF Invert was found with {self.name}, and the connected model"
                f" has {name}; use one file for both."
            )
        return self.start.to(x)


def shape_of(tensor: Tensor) -> str:
    return " x ".join(map(str, tensor.shape))


def sigmas(model: ModelPatcher, steps: int, denoise: float = 1.0) -> Tensor:
    """SIGMAS (steps + 1,) float32, evenly spaced in the time of the model's paths, of which only
    the last share `denoise` is walked.
    """
    h = heads_of(model).adapter.h
    times = torch.linspace(1 - denoise, 1, steps + 1, dtype=torch.float64)
    levels = 1 - flow.retimed(times, h)
    levels[-1] = 0
    return coordinates_of(model.get_model_object("model_sampling")).sigma(levels).float()


def sampler(velocity: Velocity | None = None, ahead: float = AHEAD) -> comfy.samplers.KSAMPLER:
    """A SAMPLER; velocity: the initial velocity, where it is known; ahead: as in `flow.sample`."""
    return comfy.samplers.KSAMPLER(
        constant_acceleration_flow, {"velocity": velocity, "ahead": ahead}
    )


@torch.no_grad()
def constant_acceleration_flow(  # noqa: PLR0913 (as KSAMPLER calls it)
    model,
    x: Tensor,
    sigmas: Tensor,
    extra_args: dict | None = None,
    callback=None,
    disable: bool | None = None,
    velocity: Velocity | None = None,
    ahead: float = AHEAD,
) -> Tensor:
    """A sampler function as KSAMPLER calls it; one call of the model a step and one more, which
    finds the velocity where it is not given.

    Raises ValueError for a model without CAF heads, for sigmas that do not fall between its largest
    and 0, and for a velocity that does not fit.
    """
    heads = heads_of(model.inner_model.model_patcher)
    start = None if velocity is None else velocity.of(x, heads.name)
    where = coordinates_of(model.inner_model.inner_model.model_sampling)
    times = _times(sigmas, where, heads.adapter.h)
    if len(times) < 2:
        return x
    steps = len(times) - 1

    def seen(step: int, x: Tensor, denoised: Tensor) -> None:
        if callback is not None:
            callback(
                {
                    "x": x,
                    "i": step,
                    "sigma": sigmas[step],
                    "sigma_hat": sigmas[step],
                    "denoised": denoised,
                }
            )

    with tqdm(total=steps + (start is None), disable=disable) as bar:
        ask = asking(model, extra_args or {}, where)
        initial, accelerate = nets(ask, heads.adapter.h, seen, bar)
        z = flow.sample(
            initial,
            accelerate,
            where.straight(x, sigmas[:1]),
            times,
            start,
            ahead=ahead,
            h=heads.adapter.h,
        )
        return where.own(z, sigmas[-1:])


def _times(sigmas: Tensor, where: Coordinates, h: float) -> list[float]:
    """The time of each sigma on the model's paths. Raises ValueError for sigmas that do not fall
    between the largest and 0.
    """
    found = sigmas.double().cpu()
    if (found.diff() > 0).any():
        raise ValueError(
            "CAF Sampler goes from noise to picture only, and these sigmas rise; use CAF Invert for"
            " the reverse."
        )
    largest = 1.0 if where.largest is None else where.largest
    if len(found) and (found.min() < 0 or found.max() > largest * (1 + 1e-4)):
        raise ValueError(
            f"CAF Sampler needs sigmas between {largest:.4g} and 0, and these run from"
            f" {found.max():.4g} to {found.min():.4g}; connect those of its own."
        )
    return flow.time_of((1 - where.level(found)).clamp_min(0), h).tolist()


def nets(
    ask: Model, h: float, seen: Callable[[int, Tensor, Tensor], None], bar: tqdm
) -> tuple[flow.Velocity, flow.Acceleration]:
    """The velocity net and the acceleration net; `seen(step, x, denoised)` hears where each step's
    path leads, if it goes on as it is.
    """
    velocity, acceleration = velocity_net(ask, h), acceleration_net(ask, h)
    steps = itertools.count()

    def initial(x: Tensor, t: Tensor) -> Tensor:
        start = velocity(x, t)
        bar.update()
        return start

    def accelerate(x: Tensor, t: Tensor, start: Tensor) -> Tensor:
        accel = acceleration(x, t, start)
        time = flow.at(t, x)
        seen(next(steps), x, x + (1 - time) * (start + (1 + time) / 2 * accel))
        bar.update()
        return accel

    return initial, accelerate


def chart(model: ModelPatcher, levels: Tensor, velocity: Velocity | None) -> dict:
    """A chart of kind "facts" (`charts.py`): what sampling will cost."""
    heads, steps = heads_of(model), len(levels) - 1
    calls = steps + (velocity is None)
    why = (
        "one for the velocity, then one per step"
        if velocity is None
        else "one per step; the velocity is given"
    )
    return {
        "kind": "facts",
        "title": f"{count(steps, 'step')}, {count(calls, 'call')} of the model",
        "summary": [
            ["calls", why],
            ["pace", f"h = {heads.adapter.h:g}"],
            ["sigmas", row(levels)],
            ["file", heads.name],
        ],
    }


def count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"
