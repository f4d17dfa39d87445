"""Low-rank factors as integers, so that their product is exact and the same on every device.

    delta[n, k] = b_scale[n] * a_scale[k] * sum_r B[n, r] * A[r, k]        A, B: int8 or int16;
      scales: bfloat16

Each product and partial sum is an integer below 2^53, so a float64 matrix product is exact in
whatever order it is summed; the scales add 16 significant bits. For int8 factors and ranks up to
2^22 (int16: up to 128) delta itself is exact in float64: nothing was rounded at all.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

LARGEST = {torch.int8: 127, torch.int16: 32767}


@dataclass(frozen=True)
class Factors:
    """Integer factors of a change (N, K) of rank r: a (r, K), b (N, r), both int8 or int16; a_scale
    bf16 (K,), b_scale bf16 (N,).
    """

    a: Tensor
    b: Tensor
    a_scale: Tensor
    b_scale: Tensor

    def __post_init__(self):
        matrices = self.a.dim() == self.b.dim() == 2
        if (
            not matrices
            or self.b.shape[1] != self.a.shape[0]
            or self.a_scale.shape != self.a.shape[1:]
            or self.b_scale.shape != self.b.shape[:1]
            or self.a.dtype not in LARGEST
        ):
            raise ValueError(
                f"factors A {tuple(self.a.shape)} {self.a.dtype} and B {tuple(self.b.shape)} do not"
                " fit one another or their scales"
            )

    @property
    def shape(self) -> tuple[int, int]:
        """(N, K)."""
        return self.b.shape[0], self.a.shape[1]

    @property
    def rank(self) -> int:
        """r."""
        return self.a.shape[0]

    def delta(self) -> Tensor:
        """The change, float64 (N, K), exact."""
        return (
            (self.b.double() @ self.a.double())
            * self.b_scale.double()[:, None]
            * self.a_scale.double()
        )

    def floats(self) -> tuple[Tensor, Tensor]:
        """(down (K, r), up (N, r)) float32 with up . down^T = delta: for a low-rank branch."""
        return (
            self.a.float() * self.a_scale.float()
        ).T.contiguous(), self.b.float() * self.b_scale.float()[:, None]

    def rows(self, start: int, stop: int) -> "Factors":
        """The factors of outputs start..stop."""
        return replace(self, b=self.b[start:stop], b_scale=self.b_scale[start:stop])

    def to(self, device: torch.device | str) -> "Factors":
        """The factors on a device."""
        return Factors(
            self.a.to(device), self.b.to(device), self.a_scale.to(device), self.b_scale.to(device)
        )


def _codes(values: Tensor, dim: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """values → integers as floats, and their bf16 scale with `dim` reduced: absmax / largest, 0 for
    a slice of zeros.
    """
    # rounded up: nothing is clipped
    scale = (
        (values.abs().amax(dim, keepdim=True) * (1 + 2**-8) / LARGEST[dtype])
        .bfloat16()
        .to(values.dtype)
    )
    codes = (
        (values / torch.where(scale == 0, 1, scale)).round().clamp(-LARGEST[dtype], LARGEST[dtype])
    )
    return codes * (scale != 0), scale


def quantize(up: Tensor, down: Tensor, dtype: torch.dtype = torch.int8) -> Factors:
    """up float (N, r), down float (r, K) → integer factors; half a step of error each at most."""
    (a, a_scale), (b, b_scale) = _codes(down.float(), 0, dtype), _codes(up.float(), 1, dtype)
    return Factors(a.to(dtype), b.to(dtype), a_scale[0].bfloat16(), b_scale[:, 0].bfloat16())


def fake_quantize(
    up: Tensor, down: Tensor, dtype: torch.dtype = torch.int8
) -> tuple[Tensor, Tensor]:
    """The floats that `quantize` would give, straight through: the gradient passes as if nothing
    had been rounded.
    """

    def straight(values: Tensor, dim: int) -> Tensor:
        codes, scale = _codes(values.detach(), dim, dtype)
        return codes * scale + (values - values.detach())

    return straight(up, 1), straight(down, 0)
