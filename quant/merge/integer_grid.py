"""The integers under an adapter: one view of every kind of base whose levels are evenly spaced.

    W = Z * scale + zeros   in the base's own space,   W_raw = rot(W) / smooth   on raw inputs   (Z:
      int, one scale per row and group)

Plain bases (`awq_w4a16`, a generic int4 / int8 grid, a merged weight) have no smoothing and no
rotation: both spaces are one. For `svdquant_w4a4` a change D of the weight on raw inputs becomes
rot(D * smooth) in the space of the integers; the low-rank branch and the bias are no part of this
view. Codebooks that are not evenly spaced (NF4, fp4, fp8) are refused: there, adding an integer to
a code means nothing.

Sums of the rotation are taken in one fixed order, and everything else is elementwise, so float64
results agree to the bit on every device.
"""

import hashlib
from dataclasses import dataclass, replace
from typing import NoReturn

import torch
from torch import Tensor

from ...kernels.reference import hadamard64
from ..files.errors import FileRefused
from ..files.safetensors import tensor_bytes
from ..weights.packing import pack_int4, unpack_int4

# shares of a group's largest magnitude that are tried as its range
SEARCH = tuple(1 - 0.025 * i for i in range(20))
_UNEVEN = {
    "w4a8": "4-bit codes of a table (svdquant_w4a8)",
    "nf4": "NF4",
    "nvfp4": "NVFP4",
    "mxfp4": "MXFP4",
    "mxfp8": "MXFP8",
    "fp4": "FP4",
    "float8": "fp8",
    "fp8": "fp8",
    "bnb": "bitsandbytes' NF4 or FP4",
    "vq": "codewords of a codebook (vq)",
}  # the first that a format's name contains


def rotate(x: Tensor) -> Tensor:
    """Orthonormal 64-point Hadamard of each group of the last axis, (..., K) → same; its own
    inverse.

    float64 as six rounds of sums and differences: elementwise, so that every device rounds alike.
    Others as the product that it is, which is faster.
    """
    if x.dtype != torch.float64:
        return hadamard64(x)
    shape = x.shape
    for half in (1, 2, 4, 8, 16, 32):
        pairs = x.reshape(-1, 2, half)
        x = torch.stack([pairs[:, 0] + pairs[:, 1], pairs[:, 0] - pairs[:, 1]], 1)
    return x.reshape(shape) * 0.125


def refuse_format(kind: str, layer: str, model: str) -> NoReturn:
    """Raises FileRefused, with the reason, for a weight format that no integer adapter can be put
    on.
    """
    known = next((name for key, name in _UNEVEN.items() if key in kind.lower()), None)
    why = (
        f"stores {layer} as {known}, whose levels are not evenly spaced, so an integer cannot be"
        " added to its codes"
        if known
        else f"stores {layer} in the format {kind!r}, whose integers Nibble does not know"
    )
    raise FileRefused(
        f"{model} {why}; use the model in Nibble's 4 bits (SVDQuant Quantize Checkpoint) or in"
        " int8, or apply the LoRA with Load LoRA."
    )


@dataclass(frozen=True)
class IntBase:
    """A linear's integers. N outputs, K inputs, G groups along K.

    codes     int8 (N, K/2), two codes a byte, if bits == 4; else int8 | int16 | int32 (N, K)
    scale     float (G, N); may be negative or zero
    bits      4 | 8 | 16 | 32: of a stored code
    zeros     float (G, N) | None, added to every weight of the group
    smooth    float (K,) | None; rotation 0 | 64: the space of the integers, as in `svdquant_w4a4`
    unsigned  4-bit codes are 0..15 and mean -8..7
    odd       codes c mean the odd integers 2 c + 1, so that none is zero
    """

    codes: Tensor
    scale: Tensor
    bits: int = 4
    zeros: Tensor | None = None
    smooth: Tensor | None = None
    rotation: int = 0
    unsigned: bool = False
    odd: bool = False

    def __post_init__(self):
        n, k = self.shape
        groups = self.scale.shape[0]
        if (
            self.scale.shape != (groups, n)
            or not groups
            or k % groups
            or (self.zeros is not None and self.zeros.shape != self.scale.shape)
        ):
            raise ValueError(
                f"scale {tuple(self.scale.shape)} does not divide a {n} x {k} weight into groups"
            )
        if (
            (self.smooth is not None and self.smooth.shape != (k,))
            or self.rotation not in (0, 64)
            or (self.rotation and k % 64)
        ):
            raise ValueError(f"smoothing or rotation={self.rotation} does not fit K={k}")

    @classmethod
    def of(cls, weight, layer: str = "the layer", model: str = "The model") -> "IntBase":
        """The view of a stored weight (`SVDQuantWeight`, `W4A16Weight`: whatever has their
        `facts()` and tensors); shares its memory.

        Raises FileRefused, naming layer and model, for formats that have no even grid of integers.
        """
        facts = weight.facts() if hasattr(weight, "facts") else {"format": type(weight).__name__}
        if facts["format"] == "awq_w4a16":
            return cls(weight.qweight, weight.scale, zeros=weight.zeros, unsigned=True)
        if facts.get("smooth_rows"):
            raise FileRefused(
                f"{model} joins parts that smooth their inputs unlike one another in {layer}, so"
                " that its integers have no one grid; use a file that Nibble made (SVDQuant"
                " Quantize Checkpoint), or apply the LoRA with Load LoRA."
            )
        if facts["format"] == "svdquant_w4a4":
            return cls(
                weight.qweight, weight.scale, smooth=weight.smooth_factor, rotation=weight.rotation
            )
        refuse_format(facts["format"], layer, model)

    @classmethod
    def from_weight(
        cls, weight: Tensor, bits: int = 4, group: int = 64, odd: bool = False
    ) -> "IntBase":
        """Rounds a float weight (N, K) to a symmetric grid; group 0: one scale a row. The scale of
        least squared error is searched; float64.
        """
        n, k = weight.shape
        group = group or k
        if bits not in (4, 8) or k % group or (bits == 4 and k % 2):
            raise ValueError(
                f"{bits} bits in groups of {group} do not fit K={k}: bits are 4 or 8, and the"
                " groups must divide K"
            )
        parts = weight.double().reshape(n, k // group, group)
        codes, scale = _search(parts, bits, odd)
        codes = codes.to(torch.int8).reshape(n, k)
        return cls(
            pack_int4(codes) if bits == 4 else codes, scale[..., 0].T.contiguous(), bits, odd=odd
        )

    @property
    def shape(self) -> tuple[int, int]:
        """(N, K)."""
        return self.codes.shape[0], self.codes.shape[1] * (2 if self.bits == 4 else 1)

    @property
    def group(self) -> int:
        """Columns that share a scale."""
        return self.shape[1] // self.scale.shape[0]

    @property
    def nbytes(self) -> int:
        """Bytes of codes, scales and zeros."""
        return sum(t.nbytes for t in (self.codes, self.scale, self.zeros) if t is not None)

    def integers(self) -> Tensor:
        """Z, int32 (N, K)."""
        codes = (
            unpack_int4(self.codes, signed=not self.unsigned).int()
            if self.bits == 4
            else self.codes.int()
        )
        codes = codes - 8 if self.unsigned else codes
        return 2 * codes + 1 if self.odd else codes

    def spread(self, values: Tensor, dtype: torch.dtype) -> Tensor:
        """One value a row and group, (G, N) → (N, K) without copying the groups' values before they
        are used.
        """
        return values.T.to(dtype)[..., None].expand(-1, -1, self.group).reshape(self.shape)

    def weight(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Z * scale + zeros in the base's space, (N, K)."""
        grouped = (
            self.integers().to(dtype).unflatten(1, (-1, self.group))
            * self.scale.T.to(dtype)[..., None]
        )
        return (
            grouped if self.zeros is None else grouped + self.zeros.T.to(dtype)[..., None]
        ).flatten(1)

    def into(self, delta: Tensor) -> Tensor:
        """A change of the weight on raw inputs, (N, K) or (R, K) rows → the same in the base's
        space: rot(D * smooth).
        """
        delta = delta if self.smooth is None else delta * self.smooth.to(delta)
        return rotate(delta) if self.rotation else delta

    def out_of(self, weight: Tensor) -> Tensor:
        """The inverse of `into`: rot(W) / smooth."""
        weight = rotate(weight) if self.rotation else weight
        return weight if self.smooth is None else weight / self.smooth.to(weight)

    def inputs(self, x: Tensor) -> Tensor:
        """Raw inputs (..., K) → those that meet the integers: rot(x / smooth)."""
        x = x if self.smooth is None else x / self.smooth.to(x)
        return rotate(x) if self.rotation else x

    def rows(self, start: int, stop: int) -> "IntBase":
        """The base of outputs start..stop."""
        zeros = None if self.zeros is None else self.zeros[:, start:stop]
        return replace(
            self, codes=self.codes[start:stop], scale=self.scale[:, start:stop], zeros=zeros
        )

    def to(self, device: torch.device | str) -> "IntBase":
        """The base on a device."""
        return replace(
            self,
            **{
                name: getattr(self, name).to(device)
                for name in ("codes", "scale", "zeros", "smooth")
                if getattr(self, name) is not None
            },
        )

    def digest(self) -> str:
        """16 hex digits that tell two bases apart: of codes, scales, zeros, smoothing and options,
        as stored.
        """
        sha = hashlib.sha256(
            f"{self.shape} {self.bits} {self.rotation} {self.unsigned} {self.odd}".encode()
        )
        for tensor in (
            self.codes,
            self.scale.T.float(),
            None if self.zeros is None else self.zeros.T.float(),
            None if self.smooth is None else self.smooth.float(),
        ):
            sha.update(b"-" if tensor is None else tensor_bytes(tensor))
        return sha.hexdigest()[:16]


def _search(parts: Tensor, bits: int, odd: bool) -> tuple[Tensor, Tensor]:
    """float64 (N, G, group) → codes and scale (N, G, 1) of least squared error among the ranges of
    SEARCH.
    """
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    largest = parts.abs().amax(-1, keepdim=True)
    best = torch.full_like(largest, torch.inf)
    kept = torch.ones_like(largest)
    codes = torch.zeros_like(parts)
    for share in SEARCH:
        # float32 is what a file holds; a group of zeros gets the scale 1e-8. Odd levels are 2
        # scales apart and reach 2^bits - 1.
        scale = (largest * share / (2 * high + 1 if odd else high)).clamp_min(1e-8).float().double()
        tried = ((parts / (2 * scale)).floor() if odd else (parts / scale).round()).clamp_(
            low, high
        )
        error = ((2 * tried + 1 if odd else tried) * scale - parts).square().sum(-1, keepdim=True)
        better = error < best
        best = torch.where(better, error, best)
        kept = torch.where(better, scale, kept)
        codes = torch.where(better, tried, codes)
    return codes, kept.float()
