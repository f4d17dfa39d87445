"""Layers whose inputs are no multiple of the group size: columns of zeros fill up the last group.

    y = W x = [W 0] [x; 0]

So a file's formats stay as they are, and the matrix in it has a few columns more than its layer has
inputs. Whoever computes with it puts zeros behind x.
"""

import torch
from torch import Tensor

from ..files.architectures import whole_groups


def with_zeros(values: Tensor) -> Tensor:
    """A matrix (N, K) or inputs (..., K) with zeros up to whole groups."""
    missing = whole_groups(values.shape[-1]) - values.shape[-1]
    return torch.nn.functional.pad(values, (0, missing)) if missing else values
