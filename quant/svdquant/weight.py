"""What a 4-bit linear is on disk and in memory: its tensors, their names, and the matrix that they stand for.

    svdquant_w4a4   y = Q(x / smooth) . (codes * scale)^T + (x . proj_down) . proj_up^T + bias
    awq_w4a16       y = x . ((codes - 8) * scale + zeros)^T + bias

The first is SVDQuant (Li et al., 2024, arXiv:2411.05007, eq. 7), optionally with unsigned activations (a shift is folded into the
bias), all of them or those from one column on, or a 64-point Hadamard rotation after smoothing. Layouts are natural: row major,
low nibble = even column.
"""

import json
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from ...kernels import ops, reference
from ..packing import dequantize_groups, unpack_int4


def json_tensor(facts: dict) -> Tensor:
    """A dictionary as the uint8 tensor in which ComfyUI keeps a layer's JSON (`X.comfy_quant`)."""
    return torch.tensor(list(json.dumps(facts).encode()), dtype=torch.uint8)


def tensor_json(tensor: Tensor) -> dict:
    """The inverse of `json_tensor`. Raises ValueError when the bytes are no JSON object."""
    facts = json.loads(bytes(tensor.cpu().tolist()).decode())
    if not isinstance(facts, dict):
        raise ValueError(f"comfy_quant holds {facts!r}; a JSON object was expected")
    return facts


class _Stored:
    """What both formats share: names on disk, size, device."""

    FORMAT = ""
    SUFFIXES: dict[str, str] = {}

    def facts(self) -> dict:
        """The layer's JSON."""
        return {"format": self.FORMAT}

    def tensors(self, prefix: str) -> dict[str, Tensor]:
        """The tensors under their names on disk, e.g. 'double_blocks.0.img_mlp.0' + '.weight_scale', and the layer's JSON."""
        stored = {f"{prefix}.{suffix}": getattr(self, name) for name, suffix in self.SUFFIXES.items()}
        stored = {name: tensor for name, tensor in stored.items() if tensor is not None}
        return stored | {f"{prefix}.comfy_quant": json_tensor(self.facts())}

    @classmethod
    def _read(cls, tensors: dict[str, Tensor], prefix: str) -> tuple[dict[str, Tensor | None], dict]:
        facts = tensor_json(tensors[f"{prefix}.comfy_quant"])
        if facts.get("format") != cls.FORMAT:
            raise ValueError(f"{prefix} has the format {facts.get('format')!r}; {cls.FORMAT!r} was expected")
        missing = [s for s in cls.SUFFIXES.values() if s not in ("bias", "weight_zeros") and f"{prefix}.{s}" not in tensors]
        if missing:
            raise ValueError(f"{prefix} lacks {', '.join(missing)}; the file is damaged or was written by another program")
        return {name: tensors.get(f"{prefix}.{suffix}") for name, suffix in cls.SUFFIXES.items()}, facts

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors, without the JSON."""
        return sum(t.nbytes for t in self._tensors().values())

    def _tensors(self) -> dict[str, Tensor]:
        return {f.name: getattr(self, f.name) for f in fields(self) if isinstance(getattr(self, f.name), Tensor)}

    def to(self, *args, **kwargs):
        """A copy with every tensor moved as by Tensor.to (a dtype is refused: each tensor keeps its own)."""
        if any(isinstance(a, torch.dtype) for a in (*args, *kwargs.values())):
            raise ValueError("a quantized weight's dtypes are fixed by its format; move it with a device only")
        return replace(self, **{name: tensor.to(*args, **kwargs) for name, tensor in self._tensors().items()})


@dataclass
class SVDQuantWeight(_Stored):
    """A linear at 4-bit weights and activations with a 16-bit low-rank branch. N outputs, K inputs, R rank, group 64.

    Shapes:
        qweight        int8 (N, K/2)     two codes -8..7 a byte, low nibble = even column
        scale          bf16 (K/64, N)    may be negative: the code -8 then serves a group's largest positive weight
        proj_down      bf16 (K, R)       acts on raw x: already divided by smooth_factor
        proj_up        bf16 (N, R)
        smooth_factor  bf16 (K,)         nonzero; with a rotation it may be negative: its signs randomize the Hadamard
        bias           bf16 (N,) | None  with act_unsigned, SHIFT times the row sums of the 4-bit part is already subtracted
    unsigned_from: a column; the inputs before it are signed, those from it on unsigned, as where a linear reads attention and a GELU
    side by side (FLUX's linear2). 0: act_unsigned says it for all.
    """

    qweight: Tensor
    scale: Tensor
    proj_down: Tensor
    proj_up: Tensor
    smooth_factor: Tensor
    bias: Tensor | None = None
    act_unsigned: bool = False
    rotation: int = 0
    unsigned_from: int = 0

    FORMAT = "svdquant_w4a4"
    SUFFIXES = {"qweight": "weight", "scale": "weight_scale", "proj_down": "weight_proj_down", "proj_up": "weight_proj_up",
                "smooth_factor": "weight_smooth_factor", "bias": "bias"}

    def __post_init__(self):
        n, k = self.shape
        r = self.proj_down.shape[-1]
        expected = {"scale": (k // 64, n), "proj_down": (k, r), "proj_up": (n, r), "smooth_factor": (k,), "bias": (n,)}
        for name, shape in expected.items():
            tensor = getattr(self, name)
            if tensor is not None and tuple(tensor.shape) != shape:
                raise ValueError(f"{name} has the shape {tuple(tensor.shape)}; a {n} x {k} linear of rank {r} needs {shape}")
        if k % 64:
            raise ValueError(f"K={k} is not a multiple of the group size 64")
        if self.rotation not in (0, 64) or (self.rotation and self.act_unsigned):
            raise ValueError(f"rotation={self.rotation}, act_unsigned={self.act_unsigned}: rotation is 0 or 64, and excludes act_unsigned")
        if self.unsigned_from and (self.rotation or self.act_unsigned or self.unsigned_from % 64 or not 0 < self.unsigned_from < k):
            raise ValueError(f"unsigned_from={self.unsigned_from} must be a multiple of 64 within K={k}, beside neither rotation nor act_unsigned")

    @property
    def shape(self) -> tuple[int, int]:
        """(N, K) of the linear."""
        return self.qweight.shape[0], self.qweight.shape[1] * 2

    @property
    def rank(self) -> int:
        """R of the low-rank branch."""
        return self.proj_down.shape[1]

    def facts(self) -> dict:
        """The layer's JSON: format, rank, and the options that differ from plain SVDQuant."""
        options = {"act_unsigned": self.act_unsigned, "rotation": self.rotation, "unsigned_from": self.unsigned_from}
        return {"format": self.FORMAT, "rank": self.rank} | {name: value for name, value in options.items() if value}

    @classmethod
    def from_tensors(cls, tensors: dict[str, Tensor], prefix: str) -> "SVDQuantWeight":
        """The inverse of `tensors`. Raises ValueError for a missing tensor, another format, or an option that it does not know."""
        parts, facts = cls._read(tensors, prefix)
        unknown = facts.keys() - {"format", "rank", "act_unsigned", "rotation", "unsigned_from"}
        if unknown:
            raise ValueError(f"{prefix} uses {', '.join(sorted(unknown))}, which this version does not know; please update")
        weight = cls(**parts, act_unsigned=bool(facts.get("act_unsigned", False)), rotation=int(facts.get("rotation", 0)),
                     unsigned_from=int(facts.get("unsigned_from", 0)))
        if facts.get("rank", weight.rank) != weight.rank:
            raise ValueError(f"{prefix} says rank {facts['rank']}, its factors have {weight.rank}")
        return weight

    def residual(self) -> Tensor:
        """The 4-bit part as a matrix on raw x: un-rotated, un-smoothed. float32 (N, K)."""
        rotated = dequantize_groups(unpack_int4(self.qweight), self.scale.float())
        plain = reference.hadamard64(rotated) if self.rotation else rotated
        return plain / self.smooth_factor.float()

    def dequantize(self) -> Tensor:
        """The whole matrix on raw x, W4 + proj_up . proj_down^T, float32 (N, K)."""
        return self.residual() + self.proj_up.float() @ self.proj_down.float().T

    def effective_bias(self) -> Tensor | None:
        """The bias that goes with `dequantize`: without the fold of unsigned activations. float32 (N,) | None."""
        if not self.act_unsigned and not self.unsigned_from:
            return None if self.bias is None else self.bias.float()
        fold = self.residual()[:, self.unsigned_from:].sum(1) * reference.SHIFT
        return fold if self.bias is None else self.bias.float() + fold

    def forward(self, x: Tensor) -> Tensor:
        """x (..., K) → (..., N) in x's dtype, with 4-bit activations."""
        if self.unsigned_from:
            halves = split_columns(self.qweight, self.unsigned_from)
            return linear_in_two(x, *halves, self.scale, self.smooth_factor, self.proj_down, self.proj_up, self.bias)
        return ops.linear_w4a4(x, self.qweight, self.scale, self.smooth_factor, self.proj_down, self.proj_up, self.bias,
                               self.act_unsigned, self.rotation)

    def rows(self, start: int, stop: int) -> "SVDQuantWeight":
        """The linear that computes outputs start..stop; shares proj_down and smooth_factor with the whole."""
        return replace(self, qweight=self.qweight[start:stop], scale=self.scale[:, start:stop], proj_up=self.proj_up[start:stop],
                       bias=None if self.bias is None else self.bias[start:stop])

    @staticmethod
    def cat(pieces: list["SVDQuantWeight"]) -> "SVDQuantWeight":
        """The inverse of `rows`. Raises ValueError unless all pieces share proj_down, smooth_factor and options."""
        first = pieces[0]
        for piece in pieces[1:]:
            same = torch.equal(piece.proj_down, first.proj_down) and torch.equal(piece.smooth_factor, first.smooth_factor)
            if not same or piece.facts() != first.facts() or (piece.bias is None) != (first.bias is None):
                raise ValueError("only pieces with one proj_down, smooth_factor and set of options can be joined along N")
        bias = None if first.bias is None else torch.cat([p.bias for p in pieces])
        return replace(first, qweight=torch.cat([p.qweight for p in pieces]), scale=torch.cat([p.scale for p in pieces], 1),
                       proj_up=torch.cat([p.proj_up for p in pieces]), bias=bias)


@dataclass
class W4A16Weight(_Stored):
    """A linear at 4-bit weights and 16-bit activations, for few tokens (modulation): comfy-kitchen's awq_w4a16.

    Shapes:
        qweight  int8 (N, K/2)     two codes 0..15 a byte, low nibble = even column; W = (code - 8) * scale + zeros
        scale    bf16 (K/64, N)
        zeros    bf16 (K/64, N) | None: symmetric, as Nibble's own files are
        bias     bf16 (N,) | None
    """

    qweight: Tensor
    scale: Tensor
    zeros: Tensor | None = None
    bias: Tensor | None = None

    FORMAT = "awq_w4a16"
    SUFFIXES = {"qweight": "weight", "scale": "weight_scale", "zeros": "weight_zeros", "bias": "bias"}

    def __post_init__(self):
        n, k = self.shape
        for name, shape in {"scale": (k // 64, n), "zeros": (k // 64, n), "bias": (n,)}.items():
            tensor = getattr(self, name)
            if tensor is not None and tuple(tensor.shape) != shape:
                raise ValueError(f"{name} has the shape {tuple(tensor.shape)}; a {n} x {k} linear needs {shape}")
        if k % 64:
            raise ValueError(f"K={k} is not a multiple of the group size 64")

    @property
    def shape(self) -> tuple[int, int]:
        """(N, K) of the linear."""
        return self.qweight.shape[0], self.qweight.shape[1] * 2

    @classmethod
    def from_tensors(cls, tensors: dict[str, Tensor], prefix: str) -> "W4A16Weight":
        """The inverse of `tensors`. Raises ValueError for a missing tensor, another format, or an option that it does not know."""
        parts, facts = cls._read(tensors, prefix)
        if facts.keys() != {"format"}:
            unknown = ", ".join(sorted(facts.keys() - {"format"}))
            raise ValueError(f"{prefix} uses {unknown}, which this version does not know; please update")
        return cls(**parts)

    def dequantize(self) -> Tensor:
        """The matrix on x, float32 (N, K)."""
        codes = unpack_int4(self.qweight, signed=False)
        n, k = self.shape
        grouped = (codes.reshape(n, k // 64, 64).float() - 8) * self.scale.float().T[..., None]
        return (grouped if self.zeros is None else grouped + self.zeros.float().T[..., None]).reshape(n, k)

    def effective_bias(self) -> Tensor | None:
        """The bias in float32 (N,), or None."""
        return None if self.bias is None else self.bias.float()

    def forward(self, x: Tensor) -> Tensor:
        """x (..., K) → (..., N) in x's dtype."""
        return ops.linear_w4a16(x, self.qweight, self.scale, self.zeros, self.bias)

    def rows(self, start: int, stop: int) -> "W4A16Weight":
        """The linear that computes outputs start..stop."""
        return W4A16Weight(self.qweight[start:stop], self.scale[:, start:stop], None if self.zeros is None else self.zeros[:, start:stop],
                           None if self.bias is None else self.bias[start:stop])

    @staticmethod
    def cat(pieces: list["W4A16Weight"]) -> "W4A16Weight":
        """The inverse of `rows`. Raises ValueError when only some pieces have a bias."""
        if len({(p.bias is None, p.zeros is None) for p in pieces}) > 1:
            raise ValueError("only pieces that all have, or all lack, a bias and zero points can be joined along N")
        zeros = None if pieces[0].zeros is None else torch.cat([p.zeros for p in pieces], 1)
        bias = None if pieces[0].bias is None else torch.cat([p.bias for p in pieces])
        return W4A16Weight(torch.cat([p.qweight for p in pieces]), torch.cat([p.scale for p in pieces], 1),
                           zeros, bias)


def split_columns(qweight: Tensor, column: int) -> tuple[Tensor, Tensor]:
    """Packed codes (N, K/2) before a column and from it on, each contiguous: (N, column/2), (N, (K - column)/2)."""
    return qweight[:, :column // 2].contiguous(), qweight[:, column // 2:].contiguous()


def linear_in_two(x: Tensor, signed: Tensor, unsigned: Tensor, scale: Tensor, smooth_factor: Tensor, proj_down: Tensor, proj_up: Tensor,
                  bias: Tensor | None) -> Tensor:
    """A linear whose first columns read signed inputs and whose others unsigned ones: the sum of two products, in x's dtype.

    signed, unsigned: packed codes of the two, as `split_columns` gives them; the rest as in `SVDQuantWeight`, for all K columns.
    """
    k = signed.shape[1] * 2
    g = k // 64
    y = ops.linear_w4a4(x[..., k:].contiguous(), unsigned, scale[g:], smooth_factor[k:], proj_down[k:], proj_up, bias, True, 0)
    return y + ops.linear_w4a4(x[..., :k].contiguous(), signed, scale[:g], smooth_factor[:k], proj_down[:k], proj_up, None, False, 0)


FORMATS = {cls.FORMAT: cls for cls in (SVDQuantWeight, W4A16Weight)}
