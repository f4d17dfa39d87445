"""Constant acceleration without training as ComfyUI's SAMPLER and SIGMAS, on any rectified-flow
model (`accel/caf/adams_bashforth.py`).

For such a model x = (1 - sigma) data + sigma noise, so dx/dsigma = (x - denoised) / sigma, whatever
guidance, LoRAs and masks are in `denoised`.
"""

from __future__ import annotations

import comfy.model_sampling
import comfy.samplers
import torch
from tqdm.auto import tqdm

from ....accel.caf import adams_bashforth
from ..host.progress import Progress

LIMIT = 0.05  # the default: see tests/bench/results/caf.json


def sampler(limit: float) -> comfy.samplers.KSAMPLER:
    """A SAMPLER; limit as in `adams_bashforth.average_velocity`."""
    return comfy.samplers.KSAMPLER(constant_acceleration, {"limit": limit})


@torch.no_grad()
def constant_acceleration(  # noqa: PLR0913 (as KSAMPLER calls it)
    model,
    x: torch.Tensor,
    sigmas: torch.Tensor,
    extra_args: dict | None = None,
    callback=None,
    disable: bool | None = None,
    limit: float | None = None,
) -> torch.Tensor:
    """A sampler function as KSAMPLER calls them: model(x, sigma (batch,), **extra_args) → the
    denoised latent; one call a step.

    Raises ValueError for a model that is no rectified flow, and for sigmas that reach 0 before
    their end.
    """
    check_model(model.inner_model.inner_model.model_sampling)
    times = sigmas.tolist()
    if 0 in times[:-1]:
        raise ValueError(
            "The sigmas reach 0 before their end, where there is nothing left to sample; cut them"
            " off there, for example with Split Sigmas."
        )
    bar = tqdm(total=len(times) - 1, disable=disable)

    def velocity(x: torch.Tensor, i: int) -> torch.Tensor:
        Progress.check()
        denoised = model(x, x.new_ones(len(x)) * sigmas[i], **(extra_args or {}))
        if callback is not None:
            callback(
                {"x": x, "i": i, "sigma": sigmas[i], "sigma_hat": sigmas[i], "denoised": denoised}
            )
        bar.update()
        return (x - denoised) / times[i]

    with bar:
        return adams_bashforth.integrate(velocity, x, times, limit)


def check_model(
    sampling,
    node: str = "Constant-Acceleration Sampler",
    instead: str = "Choose dpmpp_2m or euler for it.",
) -> None:
    """Raises ValueError, naming the node and what to do instead, unless the model's sampling is a
    rectified flow's.
    """
    if not isinstance(sampling, comfy.model_sampling.CONST):
        raise ValueError(
            f"{node} needs a rectified-flow model, such as FLUX, SD3, Qwen-Image or Wan; "
            f"this model predicts something else, as SD 1.5 and SDXL do. {instead}"
        )


def retimed(sigmas: torch.Tensor, h: float) -> torch.Tensor:
    """SIGMAS (steps + 1,), each moved by `adams_bashforth.retime` between the first and the last,
    which stay: denoise and Split Sigmas keep their meaning.

    Raises ValueError for sigmas that do not run between 1 and 0, or not in one direction.
    """
    if len(sigmas) < 3:
        return sigmas
    low, high = sigmas.min().item(), sigmas.max().item()
    if low < 0 or high > 1 + 1e-4:
        raise ValueError(
            "CAF Sigmas is for models whose sigmas run from 1 to 0, such as FLUX, SD3, Qwen-Image"
            f" or Wan; these run from {high:.4g} to {low:.4g}. Connect the scheduler to such a"
            " model, or leave this node out."
        )
    steps = sigmas.diff()
    if not ((steps <= 0).all() or (steps >= 0).all()) or low == high:
        raise ValueError(
            "CAF Sigmas needs sigmas that run in one direction; put it before the node that joins"
            " or repeats them."
        )
    first, last = sigmas[0].double(), sigmas[-1].double()
    moved = last + (first - last) * adams_bashforth.retime(
        (sigmas.double() - last) / (first - last), h
    )
    moved[0], moved[-1] = first, last  # to the bit
    return moved.to(sigmas)


def chart(before: torch.Tensor, after: torch.Tensor) -> dict:
    """A chart of kind "facts" (`charts.py`): the sigmas before and after."""
    return {
        "kind": "facts",
        "title": f"{max(len(after) - 1, 0)} steps",
        "summary": [["before", row(before)], ["after", row(after)]],
    }


def row(sigmas: torch.Tensor) -> str:
    """Sigmas in a line; of many the first and the last four."""
    shown = [f"{sigma:.3f}" for sigma in sigmas.tolist()]
    return "  ".join(shown if len(shown) <= 9 else [*shown[:4], "…", *shown[-4:]])
