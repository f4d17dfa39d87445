"""Smoothing factors of each channel, learned from where a searched formula ends.

What rounding makes of a layer's output is, with steps of absmax / 7 (8 bits: / 127) and errors
evenly spread over a step, for a group g of 64 inputs of x' = x / s . R and W' = W s . R

    J(s) = sum_g  E[max |x'_g|^2] / (12 * 7^2)  *  |R_g|^2               activations, through W'
         + w sum_g  sum_n max |R_ng|^2 / (12 * 7^2)  *  E|x'_g|^2        weights, through x'

with R = W' - L what the branch leaves; |R_g|^2 and E|x'_g|^2 do not depend on the rotation. J costs
no quantization, and its gradient is followed in log s (Adam, Kingma and Ba, 2014, arXiv:1412.6980),
as OmniQuant (Shao et al., 2023, arXiv:2308.13137, section 3.3) learns equivalent transformations.
Smoothing stays a vector of the file, so what is learned costs nothing when the model runs.
"""

from dataclasses import replace

import torch
from torch import Tensor

from .smooth import InputSpace

RATE = 0.03  # of the first step in log s; it falls evenly to zero
ROWS = 256  # of the weight that its groups' ranges are seen on
# w: the share of a weight's rounding error to nearest that is left by GPTQ, clipped ranges and the
# branch; an estimate
LEFT = 0.3


def learned(space: InputSpace, residual: Tensor, x: Tensor, steps: int) -> InputSpace:
    """A space with the factors that so many steps lead to, signs unchanged.

    residual (N, K): the weight on raw x without its branch; x (T, K): rows of raw inputs.
    """
    with torch.inference_mode(False), torch.enable_grad():
        start = space.smooth.clone()
        cost = _Cost(space, residual.clone(), x.clone())
        shift = torch.zeros_like(start, requires_grad=True)
        optimizer = torch.optim.Adam([shift], lr=RATE)
        for step in range(steps):
            optimizer.param_groups[0]["lr"] = RATE * (1 - step / steps)
            optimizer.zero_grad()
            cost(start * shift.exp()).backward()
            optimizer.step()
        found = (start * shift.detach().exp()).bfloat16().float()
    return replace(space, smooth=found, label=f"{space.label}, learned")


class _Cost:
    """J of the factors, (K,) → a number."""

    def __init__(self, space: InputSpace, residual: Tensor, x: Tensor):
        self.space, self.x = space, x
        self.rows = residual[:: max(1, len(residual) // ROWS)]
        self.parts = len(residual) / len(self.rows)
        self.columns = residual.square().sum(0)
        self.energy = x.square().mean(0)

    def __call__(self, smooth: Tensor) -> Tensor:
        space = replace(self.space, smooth=smooth)
        steps = _steps(space.inputs(self.x), space)
        activations = steps.square().mean(0) * _groups(self.columns * smooth.square()).sum(-1)
        ranges = _groups(space.weight(self.rows)).abs().amax(-1) / 7
        weights = ranges.square().sum(0) * _groups(self.energy / smooth.square()).sum(-1)
        return (activations.sum() + LEFT * self.parts * weights.sum()) / 12


def _groups(values: Tensor) -> Tensor:
    return values.unflatten(-1, (-1, 64))


def _steps(inputs: Tensor, space: InputSpace) -> Tensor:
    """The step between two codes of each row's groups: (T, K) → (T, K/64)."""
    groups = inputs.flatten(1)[:, None] if space.per_token else _groups(inputs)
    if space.act_bits == 4 and space.act_unsigned:
        return groups.amax(-1).clamp_min(0) / 15
    return groups.abs().amax(-1) / (127 if space.act_bits == 8 else 7)
