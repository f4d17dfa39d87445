"""An adapter: for each layer a rule, integer factors (or a dense integer change), and the digest of
the base that it belongs to.
"""

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from ..merge.integer_grid import IntBase
from .factors import Factors
from .rounding import Rounding
from .variants import Rule, ShiftAdd


@dataclass(frozen=True)
class LayerAdapter:
    """One layer's, or one part's of a fused layer.

    rule     ShiftAdd | Mul | Shift
    base     digest of the integers that it was made for (`IntBase.digest`, of these rows)
    factors  the change of the weight on raw inputs, low rank
    dense    int8 | int16 | int32 (N, K): instead of factors, the addend of SHIFT-ADD itself, for
      changes without low rank
    rows     (start, stop) of a fused layer (q of qkv); None: all of it
    rounding how the integers come of a 16-bit weight; None: a 4-bit model has them
    """

    rule: Rule
    base: str
    factors: Factors | None = None
    dense: Tensor | None = None
    rows: tuple[int, int] | None = None
    rounding: Rounding | None = None

    def __post_init__(self):
        if (self.factors is None) == (self.dense is None):
            raise ValueError("an adapter's layer has either factors or a dense integer change")
        if self.dense is not None and not isinstance(self.rule, ShiftAdd):
            raise ValueError(
                f"a dense integer change belongs to SHIFT-ADD, not to {self.rule.NAME}"
            )
        if self.rows is not None and self.rows[1] - self.rows[0] != self.shape[0]:
            raise ValueError(
                f"rows {self.rows} are {self.rows[1] - self.rows[0]}, the adapter has"
                f" {self.shape[0]}"
            )

    @property
    def shape(self) -> tuple[int, int]:
        """(N, K)."""
        if self.dense is not None:
            return self.dense.shape[0], self.dense.shape[1]
        assert self.factors is not None  # it has one of the two
        return self.factors.shape

    @property
    def rank(self) -> int:
        """r of the factors; 0 for a dense change."""
        return self.factors.rank if self.factors else 0

    @property
    def additive(self) -> bool:
        """Whether several of them add up (SHIFT-ADD)."""
        return isinstance(self.rule, ShiftAdd)

    @property
    def thin(self) -> bool:
        """Whether it is a low-rank change beside the base: of MUL and SHIFT, and of dense changes,
        only whole matrices can be added.
        """
        return self.additive and self.factors is not None

    @property
    def separated(self) -> bool:
        """Whether its base lacks the auxiliary matrix R, which it adds: such a base is of no use
        without an adapter.
        """
        return getattr(self.rule, "noise", None) is not None

    @property
    def nbytes(self) -> int:
        """Bytes of its tensors in a file."""
        return sum(tensor.nbytes for tensor in self.tensors().values())

    def tensors(self) -> dict[str, Tensor]:
        """Its tensors under their names in a file, behind the layer's name and a dot."""
        noise = getattr(self.rule, "noise", None)
        found = {
            "u_scale": getattr(self.rule, "u_scale", None),
            "u_zero": getattr(self.rule, "u_zero", None),
            "r_scale": None if noise is None else noise.scale,
            "base_scale": None if self.rounding is None else self.rounding.scale,
            "delta": self.dense,
        }
        if self.factors is not None:
            found |= {
                "lora_A": self.factors.a,
                "lora_A_scale": self.factors.a_scale,
                "lora_B": self.factors.b,
                "lora_B_scale": self.factors.b_scale,
            }
        return {name: tensor for name, tensor in found.items() if tensor is not None}

    def change(self, base: IntBase, strength: float = 1.0) -> Tensor:
        """The change in the base's space, float64 (N, K): exact until the strength and the
        rotation, in one order everywhere.
        """
        if self.dense is not None:
            assert isinstance(self.rule, ShiftAdd)  # no other takes a dense change
            step = base.scale.T.double()[..., None] * 2.0**-self.rule.k
            return (self.dense.double().unflatten(1, (-1, base.group)) * step).flatten(1) * strength
        assert self.factors is not None  # it has one of the two
        return base.into(self.factors.delta() * strength)

    def part(self, start: int, stop: int) -> "LayerAdapter":
        """Outputs start..stop of this adapter (counted within it). Its digest is that of
        the whole.
        """
        return replace(
            self,
            rule=self.rule.rows(start, stop),
            factors=self.factors and self.factors.rows(start, stop),
            dense=None if self.dense is None else self.dense[start:stop],
            rows=None,
            rounding=self.rounding and self.rounding.rows(start, stop),
        )

    def to(self, device: torch.device | str) -> "LayerAdapter":
        """The adapter on a device."""
        return replace(
            self,
            rule=self.rule.to(device),
            factors=self.factors and self.factors.to(device),
            dense=None if self.dense is None else self.dense.to(device),
            rounding=self.rounding and self.rounding.to(device),
        )

    def rounded(self, weight: Tensor) -> IntBase:
        """The base that it acts on, of the 16-bit weight (N, K), on its device. Raises ValueError
        for an adapter of a 4-bit model's integers.
        """
        if self.rounding is None:
            raise ValueError("it acts on the integers of a 4-bit model, not on a 16-bit weight")
        own = self.to(weight.device)
        assert own.rounding is not None  # a copy of it
        return own.rounding.base(weight, getattr(own.rule, "noise", None))


@dataclass(frozen=True)
class Adapter:
    """A model's adapter. layers: by module name; parts of a fused layer under 'name@start-stop'.
    facts: anything JSON (trained steps, source).
    """

    layers: dict[str, LayerAdapter]
    facts: dict = field(default_factory=dict)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(layer.nbytes for layer in self.layers.values())

    @property
    def rounded_bits(self) -> int | None:
        """Bits that it rounds a 16-bit model's layers to; None for an adapter of a 4-bit model."""
        found = {layer.rounding.bits for layer in self.layers.values() if layer.rounding}
        return max(found, default=None)

    def by_module(self) -> dict[str, list[LayerAdapter]]:
        """Module name → its adapters: one, or the parts of a fused layer."""
        found: dict[str, list[LayerAdapter]] = {}
        for key, layer in self.layers.items():
            found.setdefault(module_of(key), []).append(layer)
        return found


def key_of(module: str, rows: tuple[int, int] | None = None) -> str:
    """The key of a layer or of rows of it: 'a.qkv', 'a.qkv@0-3072'."""
    return module if rows is None else f"{module}@{rows[0]}-{rows[1]}"


def module_of(key: str) -> str:
    """The module of a key: 'a.qkv@0-3072' → 'a.qkv'."""
    return key.partition("@")[0]
