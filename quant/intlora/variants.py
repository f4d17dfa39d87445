"""IntLoRA's three ways to join a change D of the weight with its integers Z, each an integer matrix
P and a scale (no requantization):

    SHIFT-ADD  P = (Z << k) + round(D 2^k / s)                         W' = (s 2^-k) P
    MUL        U = clamp(round(u / t), -z, 2^b - 1 - z)  P = U * Z     W' = (s t) P
    SHIFT      P = sign(u) * (Z << (w - d)),  d = clip(E - e, 0, w)    W' = (s 2^(E - w)) P

with s the base's scale (row and group), u = 1 + (R + D) / (s Z~) what the integer is multiplied by
in units of s, Z~ = Z with 1 for 0, R the auxiliary matrix (or 0), t and z a quantizer per row, e =
round(log2 |u|), E = max e over the row, w the window of shifts. IntLoRA (Guo et al., 2024,
arXiv:2410.21759) gives MUL and SHIFT per row with U = s u; in units of s one quantizer a row serves
a base with groups as well. Its right shift `(Z >> d)` drops bits; shifting left under a common
exponent per row keeps all of them. SHIFT-ADD is the additive form for bases that exist already: two
grids whose scales differ by 2^k share integers exactly.

Everything is elementwise in float64 (or float32 while training): one order of operations, the same
bits on every device. log2 is read off the float's exponent and never computed. Where Z = 0, MUL and
SHIFT cannot change a weight (14 to 21 % of a 4-bit base; none of an `odd` one).
"""

import math
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from ..merge.integer_grid import IntBase
from .auxiliary import Noise

MAX_K = 12
ROOT_HALF = 0.5**0.5
STEPS = tuple(1 - 0.04 * i for i in range(20))  # ranges of U that are tried, as shares of the whole
_FAR = 2.0**30  # what a change is limited to before it becomes int32


@dataclass(frozen=True)
class Product:
    """P int32 (N, K), its scale float32 (G, N), and whether (and how steeply) each entry follows D:
    slope float (N, K) | None for 1.
    """

    p: Tensor
    scale: Tensor
    slope: Tensor | None = None


def _grouped(base: IntBase, values: Tensor) -> Tensor:
    return values.unflatten(1, (-1, base.group))


def _scale(base: IntBase, dtype: torch.dtype) -> Tensor:
    return base.scale.T.to(dtype)[..., None]


def power_of_two(exponent: Tensor) -> Tensor:
    """2^e for int32 e in -126..127 (others are limited to that), float32: written into the
    exponent's bits, so exact on every device.
    """
    return ((exponent.int().clamp(-126, 127) + 127) << 23).view(torch.float32)


def multiplier(base: IntBase, change: Tensor, z: Tensor) -> Tensor:
    """u = 1 + change / (s Z~), (N, K) in change's dtype; 1 where s = 0."""
    divisor = _grouped(base, torch.where(z == 0, 1, z)) * _scale(base, change.dtype)
    quotient = torch.where(
        divisor == 0, 0.0, _grouped(base, change) / torch.where(divisor == 0, 1.0, divisor)
    )
    return (1 + quotient).flatten(1)


@dataclass(frozen=True)
class ShiftAdd:
    """k extra bits below the base's grid. Linear in D, so several adapters add up; at D = 0 the
    base comes back bit for bit.
    """

    k: int = 8
    NAME: ClassVar[str] = "shift_add"

    def __post_init__(self):
        if not 0 <= self.k <= MAX_K:
            raise ValueError(f"k={self.k} is not between 0 and {MAX_K}")

    def addend(self, base: IntBase, delta: Tensor) -> Tensor:
        """round(D 2^k / s), int32 (N, K); 0 where s = 0. delta float (N, K) in the base's space."""
        scale = _scale(base, delta.dtype)
        steps = _grouped(base, delta) * 2.0**self.k / torch.where(scale == 0, torch.inf, scale)
        return steps.round().clamp(-_FAR, _FAR).int().flatten(1)

    def change(self, base: IntBase, delta: Tensor) -> Tensor:
        """W' - W without the base's codes: (s 2^-k) float(addend), (N, K) in delta's dtype."""
        return (
            _grouped(base, self.addend(base, delta).to(delta.dtype))
            * self.scale(base).T.to(delta.dtype)[..., None]
        ).flatten(1)

    def scale(self, base: IntBase) -> Tensor:
        """s 2^-k, float32 (G, N)."""
        return base.scale.float() * 2.0**-self.k

    def product(self, base: IntBase, delta: Tensor, slope: bool = False) -> Product:
        """P for a change (N, K) of the base's space."""
        return Product((base.integers() << self.k) + self.addend(base, delta), self.scale(base))

    def unmerged(self, base: IntBase, delta: Tensor) -> Tensor:
        """W' without P, from base and adapter kept apart: (s 2^-k) (float(Z) 2^k + float(addend)),
        float32 (N, K).
        """
        total = base.integers().float() * 2.0**self.k + self.addend(base, delta).float()
        return _weight_from(base, total, self.scale(base))

    def rows(self, start: int, stop: int) -> "ShiftAdd":
        """The same rule: it has no values of rows."""
        return self

    def to(self, device) -> "ShiftAdd":
        """The same rule."""
        return self


@dataclass(frozen=True)
class Mul:
    """Integer multiplication. u_scale t float32 (N,), u_zero z int16 (N,), bits b of U,
    noise: R.
    """

    u_scale: Tensor
    u_zero: Tensor
    bits: int = 8
    noise: Noise | None = None
    NAME: ClassVar[str] = "mul"

    @classmethod
    def anchored(cls, base: IntBase, bits: int = 8, reach: float = 4.0) -> "Mul":
        """For a base that exists already, without R: u = 1 is a level, so that the base comes back
        bit for bit at D = 0; u spans 1 ± reach.
        """
        t = min(1.0, 2.0 ** math.ceil(math.log2(reach / 2 ** (bits - 1))))
        n, device = base.shape[0], base.codes.device
        zero = 2 ** (bits - 1) - round(1 / t)
        return cls(
            torch.full((n,), t, device=device),
            torch.full((n,), zero, dtype=torch.int16, device=device),
            bits,
        )

    @classmethod
    def calibrated(cls, base: IntBase, noise: Noise, bits: int = 8, room: float = 1.0) -> "Mul":
        """t and z by search at D = 0 (the paper's: fixed from then on), weighted by (s Z)^2, as an
        error of U meets the weight. room widens the range found, for adapters that grow.
        """
        z = base.integers()
        u = multiplier(base, noise.matrix(base.shape[1], torch.float64), z)
        weight = (_grouped(base, z.double()) * _scale(base, torch.float64)).flatten(1).square()
        live = weight > 0
        low = torch.where(live, u, 1.0).amin(1, keepdim=True)
        high = torch.where(live, u, 1.0).amax(1, keepdim=True)
        best = torch.full_like(low, torch.inf)
        kept_low, kept_high = torch.ones_like(low), torch.zeros_like(low)
        for share in STEPS:
            t, zero = _affine(low * share, high * share, bits)
            error = ((_levels(u, t, zero, bits) * t - u).square() * weight).sum(1, keepdim=True)
            better = error < best
            kept_low = torch.where(better, low * share, kept_low)
            kept_high = torch.where(better, high * share, kept_high)
            best = torch.minimum(error, best)
        middle, half = (kept_low + kept_high) / 2, (kept_high - kept_low) / 2 * room
        t, zero = _affine(middle - half, middle + half, bits)
        return cls(t[:, 0].float(), zero[:, 0].to(torch.int16), bits, noise)

    def levels(self, base: IntBase, delta: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
        """U as floats (N, K) and u itself."""
        change = (
            delta if self.noise is None else delta + self.noise.matrix(base.shape[1], delta.dtype)
        )
        u = multiplier(base, change, z)
        return _levels(u, self.u_scale.to(u)[:, None], self.u_zero.to(u)[:, None], self.bits), u

    def scale(self, base: IntBase) -> Tensor:
        """s t, float32 (G, N)."""
        return base.scale.float() * self.u_scale.float()

    def product(self, base: IntBase, delta: Tensor, slope: bool = False) -> Product:
        """P for a change (N, K) of the base's space; with `slope` its derivative too: 1, and 0
        where Z = 0 or U is clamped.
        """
        z = base.integers()
        levels, u = self.levels(base, delta, z)
        steep = None
        if slope:
            inside = (u / self.u_scale.to(u)[:, None] - levels).abs() <= 0.5
            steep = (inside & (z != 0)).to(u)
        return Product(levels.int() * z, self.scale(base), steep)

    def unmerged(self, base: IntBase, delta: Tensor) -> Tensor:
        """W' without P: (s t) (float(U) float(Z)), float32 (N, K)."""
        z = base.integers()
        return _weight_from(
            base, self.levels(base, delta, z)[0].float() * z.float(), self.scale(base)
        )

    def rows(self, start: int, stop: int) -> "Mul":
        """The rule of outputs start..stop."""
        return replace(
            self,
            u_scale=self.u_scale[start:stop],
            u_zero=self.u_zero[start:stop],
            noise=self.noise and self.noise.rows(start, stop),
        )

    def to(self, device) -> "Mul":
        """The rule on a device."""
        return replace(
            self,
            u_scale=self.u_scale.to(device),
            u_zero=self.u_zero.to(device),
            noise=self.noise and self.noise.to(device),
        )


@dataclass(frozen=True)
class Shift:
    """Powers of two. window w: the largest shift; noise: R."""

    window: int = 11
    noise: Noise | None = None
    NAME: ClassVar[str] = "shift"

    def __post_init__(self):
        if not 1 <= self.window <= 15:
            raise ValueError(f"window={self.window} is not between 1 and 15")

    @classmethod
    def fitting(cls, base: IntBase, noise: Noise | None = None) -> "Shift":
        """The widest window, at most 15 (4 bits a shift), under which P fits int16 whatever the
        signs.
        """
        bits = base.bits + 1 if base.odd else base.bits
        return cls(max(1, min(15, 15 - bits)), noise)

    def shifts(
        self, base: IntBase, delta: Tensor, z: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """sign(u), w - d (int32, both (N, K)), E int32 (N, 1), and u itself."""
        change = (
            delta if self.noise is None else delta + self.noise.matrix(base.shape[1], delta.dtype)
        )
        u = multiplier(base, change, z)
        mantissa, exponent = torch.frexp(u.abs())
        e = torch.where(mantissa >= ROOT_HALF, exponent, exponent - 1)
        top = torch.where((z != 0) & (u != 0), e, -(2**20)).amax(1, keepdim=True)
        top = torch.where(top == -(2**20), 0, top)
        return u.sign().int(), self.window - (top - e).clamp(0, self.window), top, u

    def _scale(self, base: IntBase, top: Tensor) -> Tensor:
        return base.scale.float() * power_of_two(top[:, 0] - self.window)

    def product(self, base: IntBase, delta: Tensor, slope: bool = False) -> Product:
        """P for a change (N, K) of the base's space; with `slope` its derivative too: 2^e / |u|
        straight through the rounding of log2.
        """
        z = base.integers()
        sign, left, top, u = self.shifts(base, delta, z)
        steep = None
        if slope:
            power = power_of_two(left - self.window + top).to(u)
            steep = torch.where(
                (z != 0) & (left > 0) & (u != 0), power / u.abs().clamp_min(1e-30), 0.0
            )
        return Product(sign * (z << left), self._scale(base, top), steep)

    def unmerged(self, base: IntBase, delta: Tensor) -> Tensor:
        """W' without P: (s 2^(E - w)) (sign(u) 2^(w - d) float(Z)), float32 (N, K)."""
        z = base.integers()
        sign, left, top, _ = self.shifts(base, delta, z)
        return _weight_from(
            base, sign.float() * power_of_two(left) * z.float(), self._scale(base, top)
        )

    def rows(self, start: int, stop: int) -> "Shift":
        """The rule of outputs start..stop."""
        return replace(self, noise=self.noise and self.noise.rows(start, stop))

    def to(self, device) -> "Shift":
        """The rule on a device."""
        return replace(self, noise=self.noise and self.noise.to(device))


Rule = ShiftAdd | Mul | Shift
VARIANTS = {cls.NAME: cls for cls in (ShiftAdd, Mul, Shift)}


def _affine(low: Tensor, high: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Scale (what float32 holds, in float64) and zero point of 2^bits levels over low..high."""
    t = ((high - low) / (2**bits - 1)).clamp_min(2.0**-20).float().double()
    return t, (-low / t).round().clamp(-32768, 32767)


def _levels(u: Tensor, t: Tensor, zero: Tensor, bits: int) -> Tensor:
    return torch.minimum(torch.maximum((u / t).round(), -zero), 2**bits - 1 - zero)


def _weight_from(base: IntBase, total: Tensor, scale: Tensor) -> Tensor:
    grouped = _grouped(base, total) * scale.T[..., None]
    return (grouped if base.zeros is None else grouped + base.zeros.T.float()[..., None]).flatten(1)


def merged_weight(base: IntBase, product: Product) -> Tensor:
    """W' of a product: scale float(P) + zeros, float32 (N, K): one rounding of P to float32 and one
    of the multiplication.
    """
    return _weight_from(base, product.p.float(), product.scale)


def bits_needed(p: Tensor) -> int:
    """8, 16 or 32: the narrowest integers that hold every entry of P."""
    low, high = (int(v) for v in p.aminmax())
    return next(
        bits for bits in (8, 16, 32) if -(2 ** (bits - 1)) <= low and high < 2 ** (bits - 1)
    )
