"""How a file of codewords spends its bits: how many codewords a layer really uses, and how evenly.

    H = - sum over codewords of p log2 p        p: share of a layer's sub-vectors that chose the
      codeword; H <= log2 C, the bits of an index

A codebook whose entropy is far below the bits of its indices has codewords to spare: another layout
would say the same in fewer bits.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

from ..files.checkpoint import QuantizedFile
from ..weights.vq import VQWeight


@dataclass(frozen=True)
class LayerUse:
    """One layer: C codewords of D weights, how many of them are used, entropy of the indices in
    bits, all bytes in bits a weight.
    """

    name: str
    codewords: int
    vector: int
    used: int
    entropy: float
    bits_per_weight: float
    weights: int
    nbytes: int

    @property
    def share(self) -> float:
        """The share of an index's bits that carry something: entropy / log2 C."""
        return self.entropy / math.log2(self.codewords)


def use_of(weight: VQWeight, name: str = "") -> LayerUse:
    """Counts a layer's indices."""
    (codewords, vector), (n, k) = weight.codebook.shape, weight.shape
    counts = torch.bincount(weight.codes().flatten().long(), minlength=codewords).double()
    shares = counts[counts > 0] / counts.sum()
    entropy = max(0.0, -(shares * shares.log2()).sum().item())
    return LayerUse(
        name, codewords, vector, len(shares), entropy, weight.bits_per_weight, n * k, weight.nbytes
    )


def inspect(
    file: QuantizedFile, progress: Callable[[int, int, str], None] = lambda done, total, name: None
) -> list[LayerUse]:
    """Every layer of codewords in a file, in its order, one in memory at a time. Raises ValueError
    for a file without any.
    """
    names = [name for name, facts in file.layers.items() if facts["format"] == VQWeight.FORMAT]
    if not names:
        raise ValueError(f"{file.path.name} has no layer of codewords")
    uses = []
    for done, name in enumerate(names):
        progress(done, len(names), name)
        uses.append(use_of(VQWeight.from_tensors(file.layer(name), name), name))
    return uses
