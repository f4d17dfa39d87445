"""The steps of a diffusers scheduler as flow times (accel/caching/flow_time.py).

flows                           sigma is the scheduler's own, 1 to 0
sigmas of "variance exploding"  x = x0 + sigma n (Euler, DPM++, EDM)
alphas_cumprod alone            x = sqrt(a) x0 + sqrt(1 - a) n: sigma = sqrt((1 - a) / a)  (DDIM)
"""

from __future__ import annotations

from typing import Any

import torch

from ..caching.flow_time import FlowTime


def flow_times(scheduler: Any) -> tuple[float, ...]:
    """The times of the steps that were set (`set_timesteps`), and of the end: steps + 1 values from
    noise to data. Raises ValueError for a scheduler that tells no noise levels.
    """
    return flow_of(scheduler).times(sigmas(scheduler))


def flow_of(scheduler: Any) -> FlowTime:
    """How its noise levels become times."""
    data = float(scheduler.config.get("sigma_data") or 1.0)
    return FlowTime(mixes=is_flow(scheduler), data=data)


def sigmas(scheduler: Any) -> list[float]:
    """The noise levels of the steps that were set, in the scheduler's unit, and the end's."""
    steps = len(scheduler.timesteps)
    own = getattr(scheduler, "sigmas", None)
    if own is not None and len(own) > steps:
        return [float(sigma) for sigma in own[: steps + 1]]
    kept = getattr(scheduler, "alphas_cumprod", None)
    if kept is None:
        raise ValueError(
            f"{type(scheduler).__name__} tells no noise levels: neither sigmas nor alphas_cumprod;"
            " choose another scheduler."
        )
    signal = [float(kept[int(time)]) for time in scheduler.timesteps]
    return [((1 - share) / share) ** 0.5 for share in signal] + [0.0]


def is_flow(scheduler: Any) -> bool:
    """Whether data fades as noise comes, x = (1 - sigma) x0 + sigma n."""
    config = scheduler.config
    return (
        "FlowMatch" in type(scheduler).__name__
        or bool(config.get("use_flow_sigmas"))
        or str(config.get("prediction_type", "")).startswith("flow")
    )


def velocity(
    scheduler: Any, output: torch.Tensor, sample: torch.Tensor, index: int
) -> torch.Tensor:
    """The flow's velocity n - x0 at step `index`, of what a model predicts there. Raises ValueError
    for predictions that are neither a flow's, nor of noise, data or v.
    """
    if is_flow(scheduler):
        return output
    kind = scheduler.config.get("prediction_type", "epsilon")
    sigma = sigmas(scheduler)[index]
    signal = (1 + sigma**2) ** -0.5
    noise = sigma * signal
    x = sample * signal if float(scheduler.init_noise_sigma) > 1.001 else sample
    if kind == "epsilon":
        return output - (x - noise * output) / signal
    if kind == "v_prediction":
        return (signal * output + noise * x) - (signal * x - noise * output)
    if kind == "sample":
        return (x - signal * output) / noise - output
    raise ValueError(
        f"{type(scheduler).__name__} predicts {kind}, of which no calibration is made."
    )
