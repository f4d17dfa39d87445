"""A merged linear on its own: wide integers, and what the layer had beside them. On disk under the
same names as the 4-bit formats.

    intlora_merged   y = (rot(x / smooth)) . (Z * scale + zeros)^T + (x . proj_down) . proj_up^T +
      bias        activations stay in 16 bit

`X.weight` int8 | int16 | int32 (N, K) · `X.weight_scale` f32 (G, N) · `X.bias` · `X.comfy_quant`,
and where the base had them `X.weight_zeros` (G, N), `X.weight_smooth_factor` (K),
`X.weight_proj_down` (K, R), `X.weight_proj_up` (N, R).
"""

import json
from dataclasses import dataclass

import torch
from torch import Tensor

from ..merge.integer_grid import IntBase
from .merge import Uses, merge

FORMAT = "intlora_merged"
_WIDTHS = {torch.int8: 8, torch.int16: 16, torch.int32: 32}


@dataclass(frozen=True)
class MergedWeight:
    """A linear with adapters merged into its integers. Of an `svdquant_w4a4` layer the activations
    are no longer rounded to 4 bits: its weights do not fit an int4 kernel any more, and the fold of
    unsigned activations leaves its bias.
    """

    base: IntBase
    bias: Tensor | None = None
    proj_down: Tensor | None = None
    proj_up: Tensor | None = None

    @classmethod
    def of(cls, weight, uses: Uses, bits: int = 16) -> tuple["MergedWeight", tuple[str, ...]]:
        """A stored weight (`SVDQuantWeight` | `W4A16Weight`) with adapters and their strengths; and
        notes, as of `merge`.
        """
        merged = merge(IntBase.of(weight), uses, bits)
        bias = weight.effective_bias() if getattr(weight, "act_unsigned", False) else weight.bias
        return (
            cls(
                merged.base,
                bias,
                getattr(weight, "proj_down", None),
                getattr(weight, "proj_up", None),
            ),
            merged.notes,
        )

    @property
    def shape(self) -> tuple[int, int]:
        """(N, K)."""
        return self.base.shape

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors, without the JSON."""
        return sum(
            tensor.nbytes
            for name, tensor in self.tensors("x").items()
            if not name.endswith("comfy_quant")
        )

    def facts(self) -> dict:
        """The layer's JSON."""
        options = {
            "rotation": self.base.rotation,
            "rank": 0 if self.proj_down is None else self.proj_down.shape[1],
        }
        return {"format": FORMAT, "bits": self.base.bits} | {
            name: value for name, value in options.items() if value
        }

    def tensors(self, prefix: str) -> dict[str, Tensor]:
        """The tensors under their names on disk, and the layer's JSON."""
        stored = {
            "weight": self.base.codes,
            "weight_scale": self.base.scale,
            "weight_zeros": self.base.zeros,
            "weight_smooth_factor": self.base.smooth,
            "weight_proj_down": self.proj_down,
            "weight_proj_up": self.proj_up,
            "bias": self.bias,
            "comfy_quant": torch.tensor(list(json.dumps(self.facts()).encode()), dtype=torch.uint8),
        }
        return {f"{prefix}.{name}": tensor for name, tensor in stored.items() if tensor is not None}

    @classmethod
    def from_tensors(cls, tensors: dict[str, Tensor], prefix: str) -> "MergedWeight":
        """The inverse of `tensors`. Raises ValueError for another format, missing tensors or shapes
        that do not fit.
        """
        facts = json.loads(bytes(tensors[f"{prefix}.comfy_quant"].cpu().tolist()).decode())
        if facts.get("format") != FORMAT or facts.keys() - {"format", "bits", "rotation", "rank"}:
            raise ValueError(
                f"{prefix} is stored as {facts}; {FORMAT!r} with bits, rotation and rank was"
                " expected"
            )
        found = {
            name: tensors.get(f"{prefix}.{name}")
            for name in (
                "weight",
                "weight_scale",
                "weight_zeros",
                "weight_smooth_factor",
                "weight_proj_down",
                "weight_proj_up",
                "bias",
            )
        }
        codes = found["weight"]
        if (
            codes is None
            or found["weight_scale"] is None
            or _WIDTHS.get(codes.dtype) != facts.get("bits")
        ):
            raise ValueError(
                f"{prefix} lacks its weight or scale, or has"
                f" {None if codes is None else codes.dtype} for {facts.get('bits')} bits"
            )
        base = IntBase(
            codes,
            found["weight_scale"],
            facts["bits"],
            found["weight_zeros"],
            found["weight_smooth_factor"],
            facts.get("rotation", 0),
        )
        return cls(base, found["bias"], found["weight_proj_down"], found["weight_proj_up"])

    def dequantize(self) -> Tensor:
        """The whole matrix on raw x, float32 (N, K)."""
        dense = self.base.out_of(self.base.weight())
        return (
            dense
            if self.proj_up is None
            else dense + self.proj_up.float() @ self.proj_down.float().T
        )

    def forward(self, x: Tensor) -> Tensor:
        """x (..., K) → (..., N) in x's dtype."""
        inputs = (
            x
            if self.base.smooth is None and not self.base.rotation
            else self.base.inputs(x.float()).to(x.dtype)
        )
        y = torch.nn.functional.linear(
            inputs,
            self.base.weight().to(x.dtype),
            None if self.bias is None else self.bias.to(x.dtype),
        )
        return (
            y
            if self.proj_up is None
            else y + (x @ self.proj_down.to(x.dtype)) @ self.proj_up.to(x.dtype).T
        )
