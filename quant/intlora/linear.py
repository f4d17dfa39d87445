"""An IntLoRA layer that trains: the forward pass sees exactly the integers that will be merged, the
backward pass looks straight through them.

    y = x' W'^T + bias             a plain base: W' the whole weight                       x' =
      rot(x / smooth)
    y = inner(x) + x' (W' - W)^T   beside a layer with arithmetic of its own (`svdquant_w4a4`: 4-bit
      inputs, a low-rank branch)

Straight-through: rounding has the derivative 1, clamping 0 outside its range, log2 and 2^ their own
(IntLoRA, section 3). W' is made block of rows by block of rows, in the forward pass and once more
in the backward pass, so that no layer ever holds a whole dense weight: what training keeps beside
the base are x and the factors.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from ..merge.integer_grid import IntBase, rotate
from . import factors as integer_factors
from .adapter import LayerAdapter
from .auxiliary import Noise, scales
from .rounding import Rounding, blocks
from .variants import VARIANTS, Mul, Rule, Shift, ShiftAdd, merged_weight

# weights made at once; elsewhere 2 ** 22: 16 MB for each of the handful of matrices that are alive
# at a time
BLOCK = {"cpu": 2**20}


@dataclass(frozen=True)
class Grid:
    """How a 16-bit weight becomes a base; `of_paper` has the paper's values.

    bits, group  of the integers; group 0: one scale a row
    lora_bits    of MUL's U
    rho, alpha   the size of R: see `auxiliary.scales`
    odd          the integers are odd, so that none is zero
    """

    bits: int = 4
    group: int = 64
    lora_bits: int = 8
    rho: float = 0.25
    alpha: float | None = None
    odd: bool = False

    @classmethod
    def of_paper(cls, bits: int) -> "Grid":
        """IntLoRA's own: a scale for each row, R matched in variance with alpha = 1.5. U has 8
        bits, whatever the base has.
        """
        return cls(bits, group=0, alpha=1.5)


def separated(
    weight: Tensor, variant: str, seed: int, name: str, grid: Grid | None = None
) -> tuple[IntBase, Rule]:
    """Base and rule for a 16-bit weight (N, K), in the paper's way: Z of Q[W - R], and U's
    quantizer found at D = 0.

    variant  mul | shift; shift_add needs no R and rounds the weight itself
    """
    _check_variant(variant)
    grid = grid or Grid()
    pieces = []
    for start, stop in blocks(*weight.shape):
        rows, noise = weight[start:stop], None
        if variant != ShiftAdd.NAME:
            noise = Noise(seed, name, scales(rows, grid.rho, grid.alpha), start)
        pieces.append(_separated_rows(rows, variant, noise, grid))
    return _joined(pieces)


def _separated_rows(
    weight: Tensor, variant: str, noise: Noise | None, grid: Grid
) -> tuple[IntBase, Rule]:
    if noise is None:
        return IntBase.from_weight(weight, grid.bits, grid.group, grid.odd), ShiftAdd()
    moved = weight.double() - noise.matrix(weight.shape[1], torch.float64)
    base = IntBase.from_weight(moved, grid.bits, grid.group, grid.odd)
    if variant == Mul.NAME:
        return base, Mul.calibrated(base, noise, grid.lora_bits)
    return base, Shift.fitting(base, noise)


def _joined(pieces: list[tuple[IntBase, Rule]]) -> tuple[IntBase, Rule]:
    """Blocks of rows of one layer as one: everything in them belongs to rows."""
    base, rule = pieces[0]
    bases, rules = [piece[0] for piece in pieces], [piece[1] for piece in pieces]
    base = replace(
        base,
        codes=torch.cat([piece.codes for piece in bases]),
        scale=torch.cat([piece.scale for piece in bases], 1),
    )
    noises = [piece.noise for piece in rules if not isinstance(piece, ShiftAdd) and piece.noise]
    if isinstance(rule, ShiftAdd) or not noises:
        return base, rule
    noise = replace(noises[0], scale=torch.cat([piece.scale for piece in noises]))
    if isinstance(rule, Shift):
        return base, replace(rule, noise=noise)
    u_scale = torch.cat([piece.u_scale for piece in rules if isinstance(piece, Mul)])
    u_zero = torch.cat([piece.u_zero for piece in rules if isinstance(piece, Mul)])
    return base, replace(rule, u_scale=u_scale, u_zero=u_zero, noise=noise)


def _check_variant(variant: str) -> None:
    if variant not in VARIANTS:
        raise ValueError(f"variant={variant!r} is not one of {', '.join(VARIANTS)}")


def rule_for(base: IntBase, variant: str, k: int = 8, lora_bits: int = 8) -> Rule:
    """The rule for a base that exists already, without R: at D = 0 the base is left as it is, bit
    for bit.
    """
    _check_variant(variant)
    if variant == ShiftAdd.NAME:
        return ShiftAdd(k)
    return Mul.anchored(base, lora_bits) if variant == Mul.NAME else Shift.fitting(base)


class IntLoRALinear(nn.Module):
    """A linear with an integer adapter of rank r; `lora_up` float32 (N, r) starts at 0, `lora_down`
    float32 (r, K) at random.

    base, rule  the integers and how the adapter joins them
    bias        (N,) | None of a plain base
    inner       the layer beside which the change is computed; None: the layer is x' W'^T + bias
      alone
    width       of the stored factors: torch.int8 | torch.int16
    """

    def __init__(  # noqa: PLR0913 - the parts of a layer
        self,
        base: IntBase,
        rule: Rule,
        rank: int,
        bias: Tensor | None = None,
        inner: nn.Module | None = None,
        generator: torch.Generator | None = None,
        width: torch.dtype = torch.int8,
    ):
        super().__init__()
        self.out_features, self.in_features = base.shape
        device = base.scale.device
        if not 1 <= rank <= min(base.shape):
            raise ValueError(
                f"rank={rank} is not between 1 and {min(base.shape)}, the smaller side of a"
                f" {base.shape[0]} x {base.shape[1]} layer"
            )
        if bias is None:
            self.bias = None
        else:
            self.register_buffer("bias", bias, persistent=False)
        self.base = base
        self.rule = rule
        self.inner = inner
        self.width = width
        self.rounded = False  # whether the base was made of a 16-bit weight
        bound = 1 / math.sqrt(self.in_features)  # kaiming_uniform with a = sqrt(5), as LoRA
        drawn = torch.rand(rank, self.in_features, generator=generator) * 2 * bound - bound
        self.lora_down = nn.Parameter(drawn.to(device))
        self.lora_up = nn.Parameter(torch.zeros(self.out_features, rank, device=device))
        noise = getattr(rule, "noise", None)
        self._working = (
            rule
            if noise is None
            else type(rule)(**vars(rule) | {"noise": noise.hold(self.in_features)})
        )

    def __getattr__(self, name: str):
        """Whatever a model reads off its linears besides calling them (`weight.dtype`) is the inner
        layer's, or that of the 16-bit layer in whose place it is (`train.attach`).
        """
        inner = self.__dict__.get("_modules", {}).get("inner") or self.__dict__.get("replaced")
        if (
            inner is None
            or name in self.__dict__["_parameters"]
            or name in self.__dict__["_buffers"]
        ):
            return super().__getattr__(name)
        return inner if name == "inner" else getattr(inner, name)

    def _apply(self, fn, recurse=True):
        """Integers and rule follow the factors to another device."""
        super()._apply(fn, recurse)
        device = self.lora_up.device
        self.base = self.base.to(device)
        self.rule = self.rule.to(device)
        self._working = self._working.to(device)
        return self

    def forward(self, x: Tensor) -> Tensor:
        """x (..., K) → (..., N) in x's dtype."""
        up, down = integer_factors.fake_quantize(self.lora_up, self.lora_down, self.width)
        change = _Product.apply(x, up, down, self)
        if self.inner is not None:
            return self.inner(x) + change
        return change if self.bias is None else change + self.bias.to(x.dtype)

    def blocks(
        self, up: Tensor, down: Tensor, slope: bool = False
    ) -> Iterator[tuple[slice, Tensor, Tensor | None]]:
        """(rows, what x' is multiplied by there, its slope), float32, a block of rows after
        another.
        """
        step = max(1, BLOCK.get(up.device.type, 2**22) // self.in_features)
        for start in range(0, self.out_features, step):
            rows = slice(start, min(start + step, self.out_features))
            base = self.base.rows(rows.start, rows.stop)
            rule = self._working.rows(rows.start, rows.stop)
            delta = base.into(up[rows] @ down)
            # needs no code of the base, which may lie elsewhere
            if self.inner is not None and isinstance(rule, ShiftAdd):
                yield rows, rule.change(base, delta), None
                continue
            product = rule.product(base, delta, slope)
            matrix = merged_weight(base, product)
            yield rows, matrix if self.inner is None else matrix - base.weight(), product.slope

    def adapter(self, base: str | None = None) -> LayerAdapter:
        """What has been trained, as integers. base: the digest of the base, where it is known."""
        factors = integer_factors.quantize(
            self.lora_up.detach(), self.lora_down.detach(), self.width
        )
        return LayerAdapter(
            self.rule,
            base or self.base.digest(),
            factors,
            rounding=Rounding.of(self.base) if self.rounded else None,
        )

    def extra_repr(self) -> str:
        """What print(model) shows."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, {self.rule.NAME},"
            f" rank={self.lora_down.shape[0]}"
        )


class _Product(torch.autograd.Function):
    """x (..., K) and factors → (..., N). Saves x and the factors; the matrix is made again in the
    backward pass.
    """

    @staticmethod
    def forward(ctx, x: Tensor, up: Tensor, down: Tensor, layer: IntLoRALinear) -> Tensor:
        ctx.save_for_backward(x, up, down)
        ctx.layer = layer
        inputs, parts = _inputs(layer.base, x), []
        for _, matrix, _ in layer.blocks(up, down):
            parts.append(nn.functional.linear(inputs, matrix.to(x.dtype)))
        return torch.cat(parts, -1)

    @staticmethod
    def backward(ctx, grad: Tensor):
        (x, up, down), layer = ctx.saved_tensors, ctx.layer
        inputs, flat = _inputs(layer.base, x).flatten(0, -2), grad.flatten(0, -2)
        grad_inputs = torch.zeros_like(inputs)
        grad_up = torch.zeros_like(up)
        grad_down = torch.zeros_like(down)
        for rows, matrix, slope in layer.blocks(up, down, slope=True):
            grad_inputs.addmm_(flat[:, rows], matrix.to(x.dtype))
            if slope is not None:
                raw = _adjoint(layer.base, (flat[:, rows].T @ inputs).float() * slope)
                grad_up[rows] = raw @ down.T
                grad_down.addmm_(up[rows].T, raw)
        # slope 1 everywhere: the gradients of an ordinary LoRA, through thin products
        if isinstance(layer.rule, ShiftAdd):
            raw_x, wide = x.flatten(0, -2).float(), flat.float()
            grad_up, grad_down = wide.T @ (raw_x @ down.T), (wide @ up).T @ raw_x
        raw = grad_inputs
        if not _plain(layer.base):  # the adjoint of `inputs`
            raw = layer.base.out_of(grad_inputs.float()).to(x.dtype)
        return raw.reshape(x.shape), grad_up, grad_down, None


def _plain(base: IntBase) -> bool:
    return base.smooth is None and not base.rotation


def _inputs(base: IntBase, x: Tensor) -> Tensor:
    """rot(x / smooth) in x's dtype, computed in float32."""
    return x if _plain(base) else base.inputs(x.float()).to(x.dtype)


def _adjoint(base: IntBase, gradient: Tensor) -> Tensor:
    """The adjoint of `IntBase.into`: rot(G) * smooth."""
    turned = rotate(gradient) if base.rotation else gradient
    return turned if base.smooth is None else turned * base.smooth.float()
