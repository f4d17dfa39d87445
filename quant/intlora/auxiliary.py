"""The auxiliary matrix R of IntLoRA (its "adaptation-quantization separation"), made again from a
seed and never stored.

    R = scale[:, None] * T[byte]        byte (n, j) = byte j mod 4 of hash(key, n * words + j // 4),
      words = ceil(K / 4)

Torch's own generators differ between CPU, CUDA and versions. Here every entry is a function of its
place: a counter, two rounds of a 32-bit integer hash (the "lowbias32" multiply-xorshift mixer), and
a 256-entry table of the Laplace distribution's quantiles. All of it is integer arithmetic on
numbers below 2^49, so each device and version gives the same bits.
"""

import hashlib
from dataclasses import dataclass, replace

import torch
from torch import Tensor

_MASK = 0xFFFFFFFF
# round(-22 ln(1 - (2 b + 1) / 256)) for b = 0..127: quantiles of the upper half of a Laplace
# distribution; the lower half mirrors it.
_UPPER = (
    0,
    0,
    0,
    1,
    1,
    1,
    1,
    1,
    2,
    2,
    2,
    2,
    2,
    2,
    3,
    3,
    3,
    3,
    3,
    4,
    4,
    4,
    4,
    4,
    5,
    5,
    5,
    5,
    6,
    6,
    6,
    6,
    6,
    7,
    7,
    7,
    7,
    8,
    8,
    8,
    8,
    9,
    9,
    9,
    9,
    10,
    10,
    10,
    10,
    11,
    11,
    11,
    12,
    12,
    12,
    13,
    13,
    13,
    13,
    14,
    14,
    14,
    15,
    15,
    15,
    16,
    16,
    16,
    17,
    17,
    18,
    18,
    18,
    19,
    19,
    20,
    20,
    20,
    21,
    21,
    22,
    22,
    23,
    23,
    24,
    24,
    25,
    25,
    26,
    26,
    27,
    28,
    28,
    29,
    29,
    30,
    31,
    32,
    32,
    33,
    34,
    35,
    35,
    36,
    37,
    38,
    39,
    40,
    41,
    43,
    44,
    45,
    46,
    48,
    49,
    51,
    53,
    55,
    57,
    60,
    62,
    66,
    69,
    74,
    79,
    87,
    98,
    122,
)
# int, 256 quantiles of a Laplace distribution of scale 22
TABLE = tuple(-value for value in reversed(_UPPER)) + _UPPER
TABLE_SIGMA = (sum(value * value for value in TABLE) / 256) ** 0.5
LAPLACE_SCALE = 0.5  # of the paper's R, whose standard deviation is 0.5 * sqrt(2)


def key_of(seed: int, name: str) -> tuple[int, int]:
    """Two 32-bit keys from a seed and a layer's name."""
    digest = hashlib.sha256(f"{seed}|{name}".encode()).digest()
    return int.from_bytes(digest[:4], "little"), int.from_bytes(digest[4:8], "little")


def _times(x: Tensor, factor: int) -> Tensor:
    """x * factor mod 2^32 for x int64 in 0..2^32 - 1; in halves, so that nothing overflows."""
    return ((x & 0xFFFF) * factor + ((((x >> 16) * factor) & 0xFFFF) << 16)) & _MASK


def _mix(x: Tensor) -> Tensor:
    x = _times(x ^ (x >> 16), 0x7FEB352D)
    x = _times(x ^ (x >> 15), 0x846CA68B)
    return x ^ (x >> 16)


def words(counter: Tensor, key: tuple[int, int]) -> Tensor:
    """int64 counters in 0..2^32 - 1 → 32 random bits each, as int64 in 0..2^32 - 1."""
    return _mix((_mix(counter ^ key[0]) + key[1]) & _MASK)


def laplace(
    rows: range, k: int, seed: int, name: str, device: torch.device | str = "cpu"
) -> Tensor:
    """Rows of a layer's table values T, int8 (len(rows), K) in -122..122, standard deviation
    TABLE_SIGMA. Rows may be asked for in parts.
    """
    per_row = -(-k // 4)
    counter = torch.arange(rows.start * per_row, rows.stop * per_row, device=device)
    drawn = words(counter, key_of(seed, name))[:, None] >> torch.tensor(
        [0, 8, 16, 24], device=device
    )
    picked = torch.tensor(TABLE, dtype=torch.int8, device=device)[drawn & 0xFF]
    return picked.reshape(len(rows), per_row * 4)[:, :k].contiguous()


def scales(weight: Tensor, rho: float = 0.25, alpha: float | None = None) -> Tensor:
    """Variance matching: the factor of T for each row of a weight (N, K), float32 (N,).

    rho    sigma(R) is this share of the row's sigma(W): does not depend on the weight's unit
    alpha  the paper's form instead: R = r^alpha R0 with r = sigma(W) / sigma(R0) and sigma(R0) =
      0.5 sqrt(2); it found 1.5 best (its code takes the rows' ranges in sigma's place)
    """
    sigma = weight.double().square().mean(1).sqrt()
    if alpha is None:
        return (rho * sigma / TABLE_SIGMA).float()
    original = LAPLACE_SCALE * 2**0.5
    return ((sigma / original) ** alpha * original / TABLE_SIGMA).float()


@dataclass(frozen=True)
class Noise:
    """A layer's auxiliary matrix R: seed and name choose the table values, scale float32 (N,)
    multiplies rows; start: of the first row.

    held: the table values, where they are kept in memory (training reads them at every step).
    """

    seed: int
    name: str
    scale: Tensor
    start: int = 0
    held: Tensor | None = None

    def matrix(self, k: int, dtype: torch.dtype) -> Tensor:
        """R, (N, K) in dtype, on the scale's device."""
        rows = range(self.start, self.start + len(self.scale))
        table = (
            laplace(rows, k, self.seed, self.name, self.scale.device)
            if self.held is None
            else self.held
        )
        return table.to(dtype) * self.scale.to(dtype)[:, None]

    def hold(self, k: int) -> "Noise":
        """The same, with its table values kept: one byte an entry."""
        return replace(
            self,
            held=laplace(
                range(self.start, self.start + len(self.scale)),
                k,
                self.seed,
                self.name,
                self.scale.device,
            ),
        )

    def rows(self, start: int, stop: int) -> "Noise":
        """The matrix of rows start..stop."""
        return replace(
            self,
            scale=self.scale[start:stop],
            start=self.start + start,
            held=None if self.held is None else self.held[start:stop],
        )

    def to(self, device: torch.device | str) -> "Noise":
        """The matrix on a device."""
        return replace(
            self,
            scale=self.scale.to(device),
            held=None if self.held is None else self.held.to(device),
        )
