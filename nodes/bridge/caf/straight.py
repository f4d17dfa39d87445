"""On which line a ComfyUI model's latents lie between noise and data, for all of CAF that is
trained (`accel/caf/coordinates.py`).
"""

from __future__ import annotations

import comfy.model_sampling as kinds
from torch import Tensor

from ....accel.caf.coordinates import Coordinates

# of x = data + sigma noise, whatever they predict
_ADDED = (kinds.EPS, kinds.V_PREDICTION_DDPM, kinds.COSMOS_RFLOW)


def coordinates_of(sampling, node: str = "CAF") -> Coordinates:
    """Those of a model's sampling. Raises ValueError, naming the node, for a model that does not
    lead from noise to pictures.
    """
    if isinstance(sampling, kinds.CONST):
        return Coordinates()
    if isinstance(sampling, _ADDED) and not isinstance(sampling, kinds.IMG_TO_IMG):
        return Coordinates(float(sampling.sigma_max))
    raise ValueError(
        f"{node} needs a model that leads from noise to pictures, such as FLUX, SD3, Qwen-Image,"
        f" Wan or SDXL; this one's sampling is {type(sampling).__name__}, which is not known to it."
    )


def noise_of(sampling, start: Tensor) -> Tensor:
    """The noise of unit variance with which ComfyUI's samplers begin at `start` (batch, …), the
    beginning of a path.
    """
    where, one = coordinates_of(sampling), start.new_ones(1)
    if where.largest is None:
        return start / getattr(sampling, "noise_scale", 1.0)
    sigma = where.largest * one
    return where.own(start, sigma) / sampling.noise_scaling(sigma, one, 0 * one, True)
