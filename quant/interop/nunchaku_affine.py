"""What Nunchaku adds to codes and results in another place than Nibble: zero points, and the 1 of a
modulation's "1 + scale".
"""

import torch
from torch import Tensor


def centred_zeros(zeros: Tensor, scale: Tensor) -> Tensor:
    """W = q * scale + zeros → W = (q - 8) * scale + result: exact, in the scale's dtype where that
    can hold it, else in float32.
    """
    exact = zeros.float() + 8 * scale.float()
    short = exact.to(scale.dtype)
    return (short if torch.equal(short.float(), exact) else exact).contiguous()


def shift_of_one(bias: Tensor, splits: int, sign: int) -> Tensor:
    """Adds sign to the scales of a modulation's bias (its second vector and the last but one),
    float32.
    """
    rows = bias.float().reshape(splits, -1).clone()
    for row in {1, splits - 2}:
        rows[row] += sign
    return rows.reshape(-1)
