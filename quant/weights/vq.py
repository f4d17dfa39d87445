"""What a vector-quantized linear is on disk and in memory: its tensors, their names, and the matrix
that they stand for.

    W[n, j*D + e] = scale[n] * codebook[index[n, j], e]        y = x . W^T + (x . proj_down) .
      proj_up^T + bias

VQ4DiT (Deng et al., 2024, arXiv:2408.17131, eq. 2) with, optionally, a scale for each row, a
64-point Hadamard rotation of x, and a 16-bit low-rank branch on the raw x. Indices of log2(C) bits
lie in a row's bytes without gaps, the lowest bits first.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ...kernels import ops, reference
from ...kernels.reference import vq as reference_vq
from ..files.layer_formats import CODEWORDS
from .base import StoredLinear, StoredWeight, same_tensor
from .packing import unpack_indices


@dataclass
class VQWeight(StoredWeight):
    """A linear whose weights are codewords. N outputs, K inputs, C codewords of D weights, b =
    log2(C), R rank.

    Shapes:
        indices    uint8 (N, K/D * b/8)
        codebook   float16 (C, D)
        scale      float (N,) | None
        proj_down  float (K, R) | None   with proj_up float (N, R) | None
        bias       float (N,) | None
    rotation: 0 | 64. Raises ValueError for shapes that do not fit.
    """

    indices: Tensor
    codebook: Tensor
    scale: Tensor | None = None
    proj_down: Tensor | None = None
    proj_up: Tensor | None = None
    bias: Tensor | None = None
    rotation: int = 0

    FORMAT = "vq"
    SUFFIXES = {
        "indices": "weight",
        "codebook": "weight_codebook",
        "scale": "weight_scale",
        "proj_down": "weight_proj_down",
        "proj_up": "weight_proj_up",
        "bias": "bias",
    }
    OPTIONAL = ("weight_scale", "weight_proj_down", "weight_proj_up", "bias")
    TOLD = ("format", "codewords", "vector", "rank")
    OUTPUT_DIM = {"indices": 0, "scale": 0, "proj_up": 0, "bias": 0}

    def __post_init__(self):
        c = self.codebook.shape[0]
        if self.codebook.dim() != 2 or c not in CODEWORDS:
            raise ValueError(
                f"a codebook of the shape {tuple(self.codebook.shape)} has no power of two of"
                " codewords between 2 and 65536"
            )
        if (
            self.indices.dim() != 2
            or self.indices.dtype != torch.uint8
            or self.indices.shape[1] * 8 % self.bits
        ):
            raise ValueError(
                f"indices of {self.indices.dtype} {tuple(self.indices.shape)} are no rows of"
                f" {self.bits}-bit numbers in uint8"
            )
        (n, k), r = self.shape, 0 if self.proj_down is None else self.proj_down.shape[-1]
        self._check_shapes(
            f"a {n} x {k} linear of rank {r}",
            {"scale": (n,), "proj_down": (k, r), "proj_up": (n, r), "bias": (n,)},
        )
        if (self.proj_down is None) != (self.proj_up is None):
            raise ValueError("a low-rank branch needs both proj_down and proj_up")
        if self.rotation not in (0, 64) or (self.rotation and k % 64):
            raise ValueError(
                f"rotation={self.rotation} is not 0, or 64 with K={k} a multiple of 64"
            )

    @property
    def bits(self) -> int:
        """b, of an index."""
        return reference_vq.index_bits(self.codebook)

    @property
    def shape(self) -> tuple[int, int]:
        """(N, K) of the linear."""
        return (
            self.indices.shape[0],
            self.indices.shape[1] * 8 // self.bits * self.codebook.shape[1],
        )

    @property
    def rank(self) -> int:
        """R of the low-rank branch, 0 without one."""
        return 0 if self.proj_down is None else self.proj_down.shape[1]

    @property
    def branch_dtype(self) -> torch.dtype:
        """Of a low-rank branch that it gets: that of its scales, or of its codebook."""
        return self.codebook.dtype if self.scale is None else self.scale.dtype

    @property
    def bits_per_weight(self) -> float:
        """All bytes but the bias's, in bits a weight."""
        return (
            8
            * (self.nbytes - (0 if self.bias is None else self.bias.nbytes))
            / (self.shape[0] * self.shape[1])
        )

    def facts(self) -> dict:
        """The layer's JSON: format, codewords, vector, and the options that it uses."""
        options = {"rotation": self.rotation, "rank": self.rank}
        facts = {
            "format": self.FORMAT,
            "codewords": self.codebook.shape[0],
            "vector": self.codebook.shape[1],
        }
        return facts | {name: value for name, value in options.items() if value}

    @classmethod
    def from_tensors(cls, tensors: dict[str, Tensor], prefix: str) -> "VQWeight":
        """The inverse of `tensors`. Raises ValueError for a missing tensor, another format, or an
        option that it does not know.
        """
        parts, facts = cls._read(tensors, prefix)
        cls._refuse_unknown(prefix, facts, {"format", "codewords", "vector", "rotation", "rank"})
        weight = cls(**parts, rotation=int(facts.get("rotation", 0)))
        if weight.facts() != {
            key: value for key, value in facts.items() if value or key == "format"
        }:
            raise ValueError(f"{prefix} says {facts}, its tensors are those of {weight.facts()}")
        return weight

    def codes(self) -> Tensor:
        """The indices as int32 (N, K/D)."""
        return unpack_indices(self.indices, self.bits, self.shape[1] // self.codebook.shape[1])

    def dequantize(self) -> Tensor:
        """The whole matrix on raw x: un-rotated, with the low-rank branch. float32 (N, K)."""
        matrix = reference_vq.dequantize_vq(self.indices, self.codebook, self.scale)
        matrix = reference.hadamard64(matrix) if self.rotation else matrix
        if self.factors is None:
            return matrix
        down, up = self.factors
        return matrix + up.float() @ down.float().T

    def effective_bias(self) -> Tensor | None:
        """The bias in float32 (N,), or None."""
        return None if self.bias is None else self.bias.float()

    def forward(self, x: Tensor) -> Tensor:
        """x (..., K) → (..., N) in x's dtype."""
        return ops.linear_vq(
            x,
            self.indices,
            self.codebook,
            self.scale,
            self.proj_down,
            self.proj_up,
            self.bias,
            self.rotation,
        )

    def rows(self, start: int, stop: int) -> "VQWeight":
        """The linear that computes outputs start..stop; shares codebook and proj_down with the
        whole.
        """
        return replace(self, **self._output_slices(start, stop))

    @staticmethod
    def cat(pieces: list["VQWeight"]) -> "VQWeight":
        """The inverse of `rows`. Raises ValueError unless all pieces share codebook, proj_down and
        options.
        """
        first = pieces[0]
        for piece in pieces[1:]:
            same = torch.equal(piece.codebook, first.codebook) and (
                piece.rank == 0 or same_tensor(piece.proj_down, first.proj_down)
            )
            if (
                piece.facts() != first.facts()
                or not same
                or (piece.scale is None, piece.bias is None)
                != (first.scale is None, first.bias is None)
            ):
                raise ValueError(
                    "only pieces with one codebook, proj_down and set of options can be joined"
                    " along N"
                )
        return replace(first, **VQWeight._joined_outputs(pieces))


class VQLinear(StoredLinear):
    """vq as a module for scripts. train: codebook, scale, low-rank factors and the bias become
    parameters; indices never do.
    """

    weight_class = VQWeight

    def __init__(self, weight: VQWeight, train: bool = False):
        super().__init__(
            weight, ("codebook", "scale", "proj_down", "proj_up", "bias") if train else ()
        )
