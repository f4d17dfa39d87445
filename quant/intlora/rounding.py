"""A 16-bit weight as IntLoRA's base: rounded to the nearest integers after the auxiliary matrix R
was taken off it ("adaptation-quantization separation"; Guo et al., 2024, arXiv:2410.21759).

    Q[W - R] = s Z,   Z = clamp(round((W - R) / s), -2^(b-1), 2^(b-1) - 1)

with one s a row, or a row and group. The paper's grid has a zero point too; this one is symmetric,
with the s of least squared error. The integers themselves are never stored: a file holds b and s,
and R's seed and scales. Whoever has the 16-bit weight makes Z again, elementwise in float64, so
every device finds the same.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..merge.integer_grid import IntBase
from ..weights.packing import pack_int4
from .auxiliary import Noise

BLOCK = 2**22  # weights at once: 32 MB in float64


@dataclass(frozen=True)
class Rounding:
    """How a base comes of a 16-bit weight. bits: 4 | 8; scale s: float32 (G, N), for each row and
    group; odd: the integers are odd.
    """

    bits: int
    scale: Tensor
    odd: bool = False

    def __post_init__(self):
        if self.bits not in (4, 8):
            raise ValueError(f"a base is rounded to 4 or 8 bits, not to {self.bits}")
        if self.scale.dim() != 2 or self.scale.dtype != torch.float32:
            raise ValueError(
                f"the base's scale is {self.scale.dtype} {tuple(self.scale.shape)} and must be"
                " float32 (groups, rows)"
            )

    @classmethod
    def of(cls, base: IntBase) -> "Rounding":
        """The rounding that `IntBase.from_weight` found."""
        return cls(base.bits, base.scale, base.odd)

    def base(self, weight: Tensor, noise: Noise | None) -> IntBase:
        """Z of a weight (N, K) of any float dtype, on its device, where scale and noise must be."""
        n, k = weight.shape
        groups = self.scale.shape[0]
        if self.scale.shape[1] != n or k % groups:
            raise ValueError(
                f"the base's scale {tuple(self.scale.shape)} does not fit a {n} x {k} weight"
            )
        codes = [self._codes(weight, noise, start, stop) for start, stop in blocks(n, k)]
        return IntBase(torch.cat(codes), self.scale, self.bits, odd=self.odd)

    def _codes(self, weight: Tensor, noise: Noise | None, start: int, stop: int) -> Tensor:
        k = weight.shape[1]
        moved = weight[start:stop].double()
        if noise is not None:
            moved = moved - noise.rows(start, stop).matrix(k, torch.float64)
        scale = self.scale[:, start:stop].T.double()[..., None]
        grouped = moved.unflatten(1, (len(self.scale), -1))
        integers = (grouped / (2 * scale)).floor() if self.odd else (grouped / scale).round()
        limit = 2 ** (self.bits - 1)
        codes = integers.clamp(-limit, limit - 1).to(torch.int8).flatten(1)
        return pack_int4(codes) if self.bits == 4 else codes

    def rows(self, start: int, stop: int) -> "Rounding":
        """The rounding of outputs start..stop."""
        return replace(self, scale=self.scale[:, start:stop])

    def to(self, device: torch.device | str) -> "Rounding":
        """The rounding on a device."""
        return replace(self, scale=self.scale.to(device))


def blocks(n: int, k: int) -> list[tuple[int, int]]:
    """(start, stop) of row blocks of an N x K weight, of at most BLOCK weights each."""
    step = max(1, BLOCK // k)
    return [(row, min(row + step, n)) for row in range(0, n, step)]
