"""Every op once: its schema, its fake, and the function to call.

Each function here goes through torch's dispatcher (`torch.ops.nibble.*`), so torch.compile sees one
opaque node, and `torch.inference_mode` and FakeTensor work; `dispatch` then refuses what is wrong
and chooses what runs it. The linears have gradients (`gradients`); a fused op has none, and its
function falls back to the linears where one is needed.

torch keeps one registry a process. A second copy of this package (ComfyUI's folder beside an
installed one) finds the ops registered and uses them; if its schemas differ it refuses to load,
because the two copies would call each other's code.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from . import dispatch, gradients, reference, refusals
from .dispatch import TYPICAL, which
from .reference import GROUP

__all__ = [
    "SCHEMAS",
    "TYPICAL",
    "gemm_vq",
    "gemm_w4a16",
    "gemm_w4a4_up",
    "gemm_w4a4_up_gelu_quantize_down",
    "gemv_w4a16",
    "linear_vq",
    "linear_w4a16",
    "linear_w4a4",
    "linear_w4a4_grouped",
    "mlp_w4a4",
    "quantize_down",
    "which",
]

_LINEAR_W4A4 = (
    "Tensor weight, Tensor weight_scale, Tensor smooth_factor, Tensor proj_down, Tensor proj_up,"
    " Tensor? bias"
)
_SECOND_W4A4 = (
    "Tensor weight2, Tensor weight_scale2, Tensor smooth_factor2, Tensor proj_down2, Tensor"
    " proj_up2, Tensor? bias2"
)
_LINEAR_W4A16 = (
    "Tensor x, Tensor weight, Tensor weight_scale, Tensor? weight_zeros=None, Tensor? bias=None"
)
_PRODUCT = (
    "Tensor q, Tensor ascales, Tensor h, Tensor weight, Tensor weight_scale, Tensor proj_up,"
    " Tensor? bias"
)
_FLAGS = "bool act_unsigned=False, int rotation=0"
SCHEMAS = {
    "quantize_down": (
        f"(Tensor x, Tensor smooth_factor, Tensor proj_down, {_FLAGS}) -> (Tensor, Tensor, Tensor)"
    ),
    "gemm_w4a4_up": (
        f"({_PRODUCT}=None, bool act_unsigned=False, ScalarType? out_dtype=None) -> Tensor"
    ),
    "gemm_w4a4_up_gelu_quantize_down": (
        f"({_PRODUCT}, Tensor smooth_factor2, Tensor proj_down2, bool act_unsigned=False, bool"
        " act_unsigned2=False, int rotation2=0, ScalarType? mid_dtype=None) -> (Tensor, Tensor,"
        " Tensor)"
    ),
    "gemv_w4a16": f"({_LINEAR_W4A16}) -> Tensor",
    "gemm_w4a16": f"({_LINEAR_W4A16}) -> Tensor",
    "linear_w4a4": f"(Tensor x, {_LINEAR_W4A4}=None, {_FLAGS}) -> Tensor",
    "linear_w4a4_grouped": (
        "(Tensor x, Tensor smooth_factor, Tensor[] weight, Tensor[] weight_scale, Tensor[]"
        f" proj_down, Tensor[] proj_up, Tensor?[] bias, {_FLAGS}) -> Tensor[]"
    ),
    "mlp_w4a4": (
        f"(Tensor x, {_LINEAR_W4A4}, {_SECOND_W4A4}, {_FLAGS}, bool act_unsigned2=False, int"
        " rotation2=0) -> Tensor"
    ),
    "linear_w4a16": f"({_LINEAR_W4A16}) -> Tensor",
    "gemm_vq": (
        "(Tensor x, Tensor indices, Tensor codebook, Tensor? scale=None, Tensor? bias=None) ->"
        " Tensor"
    ),
    "linear_vq": (
        "(Tensor x, Tensor indices, Tensor codebook, Tensor? scale=None, Tensor? proj_down=None,"
        " Tensor? proj_up=None, Tensor? bias=None, int rotation=0) -> Tensor"
    ),
}


# ---- fakes: the shapes and dtypes of results, after the same refusals ----------------------------


def _new_activations(
    like: Tensor, m: int, k: int, rank: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        like.new_empty((m, k // 2), dtype=torch.int8),
        like.new_empty((k // GROUP, m), dtype=dtype),
        like.new_empty((m, rank), dtype=dtype),
    )


def _fake_quantize_down(x, smooth_factor, proj_down, act_unsigned=False, rotation=0):
    refusals.quantize_down(x, smooth_factor, proj_down, act_unsigned, rotation)
    return _new_activations(x, *x.shape, proj_down.shape[1], reference.compute_dtype(x))


def _fake_gemm_w4a4_up(
    q, ascales, h, weight, weight_scale, proj_up, bias=None, act_unsigned=False, out_dtype=None
):
    refusals.gemm_w4a4_up(q, ascales, h, weight, weight_scale, proj_up, bias)
    return ascales.new_empty((q.shape[0], weight.shape[0]), dtype=out_dtype or ascales.dtype)


def _fake_gelu(
    q,
    ascales,
    h,
    weight,
    weight_scale,
    proj_up,
    bias,
    smooth_factor2,
    proj_down2,
    act_unsigned=False,
    act_unsigned2=False,
    rotation2=0,
    mid_dtype=None,
):
    refusals.gemm_w4a4_up_gelu_quantize_down(
        q,
        ascales,
        h,
        weight,
        weight_scale,
        proj_up,
        bias,
        smooth_factor2,
        proj_down2,
        act_unsigned2,
        rotation2,
    )
    return _new_activations(
        q, q.shape[0], weight.shape[0], proj_down2.shape[1], reference.compute_dtype(ascales)
    )


def _fake_gemv_w4a16(x, weight, weight_scale, weight_zeros=None, bias=None):
    refusals.tokens_w4a16("gemv_w4a16", x, weight, weight_scale, weight_zeros, bias)
    return x.new_empty((x.shape[0], weight.shape[0]))


def _fake_gemm_w4a16(x, weight, weight_scale, weight_zeros=None, bias=None):
    refusals.tokens_w4a16("gemm_w4a16", x, weight, weight_scale, weight_zeros, bias)
    return x.new_empty((x.shape[0], weight.shape[0]))


def _fake_linear_w4a16(x, weight, weight_scale, weight_zeros=None, bias=None):
    refusals.w4a16(x, weight, weight_scale, weight_zeros, bias)
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


def _fake_linear_w4a4(
    x,
    weight,
    weight_scale,
    smooth_factor,
    proj_down,
    proj_up,
    bias=None,
    act_unsigned: bool = False,
    rotation: int = 0,
):
    refusals.linear_w4a4(
        x, weight, weight_scale, smooth_factor, proj_down, proj_up, bias, act_unsigned, rotation
    )
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


def _fake_grouped(
    x, smooth_factor, weight, weight_scale, proj_down, proj_up, bias, act_unsigned=False, rotation=0
):
    refusals.linear_w4a4_grouped(
        x, smooth_factor, weight, weight_scale, proj_down, proj_up, bias, act_unsigned, rotation
    )
    return [x.new_empty((*x.shape[:-1], w.shape[0])) for w in weight]


def _fake_mlp(x, *arguments):
    first, second, flags = (
        arguments[:6],
        arguments[6:12],
        (*arguments[12:], *(False, 0, False, 0)[len(arguments) - 12 :]),
    )
    refusals.mlp_w4a4(x, first, second, flags[:2], flags[2:])
    return x.new_empty((*x.shape[:-1], second[0].shape[0]))


def _fake_gemm_vq(x, indices, codebook, scale=None, bias=None):
    refusals.gemm_vq(x, indices, codebook, scale, bias)
    return x.new_empty((x.shape[0], indices.shape[0]))


def _fake_linear_vq(
    x, indices, codebook, scale=None, proj_down=None, proj_up=None, bias=None, rotation=0
):
    refusals.linear_vq(x, indices, codebook, scale, proj_down, proj_up, bias, rotation)
    return x.new_empty((*x.shape[:-1], indices.shape[0]))


# ---- registration --------------------------------------------------------------------------------


def _register(
    op: str,
    run: Callable,
    fake: Callable,
    backward: Callable | None = None,
    save: Callable | None = None,
):
    """Define one op, or find it defined by another copy of this package with the same schema.
    Returns its overload.
    """
    name, schema = f"nibble::{op}", torch._C.parse_schema(f"nibble::{op}{SCHEMAS[op]}")
    found = getattr(torch.ops.nibble, op, None)
    if found is None:
        torch.library.define(name, SCHEMAS[op], tags=(torch.Tag.pt2_compliant_tag,))
        torch.library.impl(name, "default", run)
        torch.library.register_fake(name, fake)
        if backward is not None:
            torch.library.register_autograd(name, backward, setup_context=save)
    elif found.default._schema != schema:
        raise ImportError(
            f"another version of Nibble in this process defines {found.default._schema} where this"
            f" one has {schema}: keep only one of the two installations"
        )
    return getattr(torch.ops.nibble, op).default


_W4A4, _W4A16 = (
    (gradients.backward_w4a4, gradients.save_w4a4),
    (gradients.backward_w4a16, gradients.save_w4a16),
)
quantize_down_op = _register("quantize_down", dispatch.quantize_down, _fake_quantize_down)
gemm_w4a4_up_op = _register("gemm_w4a4_up", dispatch.gemm_w4a4_up, _fake_gemm_w4a4_up)
gelu_op = _register(
    "gemm_w4a4_up_gelu_quantize_down", dispatch.gemm_w4a4_up_gelu_quantize_down, _fake_gelu
)
gemv_w4a16_op = _register("gemv_w4a16", dispatch.gemv_w4a16, _fake_gemv_w4a16, *_W4A16)
gemm_w4a16_op = _register("gemm_w4a16", dispatch.gemm_w4a16, _fake_gemm_w4a16, *_W4A16)
linear_w4a4_op = _register("linear_w4a4", dispatch.linear_w4a4, _fake_linear_w4a4, *_W4A4)
linear_w4a4_grouped_op = _register(
    "linear_w4a4_grouped", dispatch.linear_w4a4_grouped, _fake_grouped
)
mlp_w4a4_op = _register("mlp_w4a4", dispatch.mlp_w4a4, _fake_mlp)
linear_w4a16_op = _register("linear_w4a16", dispatch.linear_w4a16, _fake_linear_w4a16, *_W4A16)
gemm_vq_op = _register(
    "gemm_vq", dispatch.gemm_vq, _fake_gemm_vq, gradients.backward_gemm_vq, gradients.save_gemm_vq
)
linear_vq_op = _register(
    "linear_vq",
    dispatch.linear_vq,
    _fake_linear_vq,
    gradients.backward_linear_vq,
    gradients.save_linear_vq,
)


# ---- the functions to call -----------------------------------------------------------------------


def _need_gradients(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(
        tensor is not None and tensor.requires_grad for tensor in tensors
    )


def quantize_down(
    x: Tensor,
    smooth_factor: Tensor,
    proj_down: Tensor,
    act_unsigned: bool = False,
    rotation: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    """int4 codes, their scales and x . proj_down: see `reference.quantize_down`. Has no gradient;
    `linear_w4a4` does.
    """
    return quantize_down_op(x, smooth_factor, proj_down, act_unsigned, rotation)


def gemm_w4a4_up(
    q: Tensor,
    ascales: Tensor,
    h: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    proj_up: Tensor,
    bias: Tensor | None = None,
    act_unsigned: bool = False,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """int4 product + low-rank up + bias: see `reference.gemm_w4a4_up`. (M, N) in `out_dtype`, by
    default that of ascales.
    """
    return gemm_w4a4_up_op(
        q, ascales, h, weight, weight_scale, proj_up, bias, act_unsigned, out_dtype
    )


def gemm_w4a4_up_gelu_quantize_down(
    q: Tensor,
    ascales: Tensor,
    h: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    proj_up: Tensor,
    bias: Tensor | None,
    smooth_factor2: Tensor,
    proj_down2: Tensor,
    act_unsigned: bool = False,
    act_unsigned2: bool = False,
    rotation2: int = 0,
    mid_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """One MLP layer straight into the next one's quantized input: see the reference of this name.
    Has no gradient; `mlp_w4a4` does.

    Shapes: as `gemm_w4a4_up`, N a multiple of 64 -> q2 int8 (M, N/2) · ascales2 (N/64, M) · h2 (M,
        R2), floats as ascales
    """
    return gelu_op(
        q,
        ascales,
        h,
        weight,
        weight_scale,
        proj_up,
        bias,
        smooth_factor2,
        proj_down2,
        act_unsigned,
        act_unsigned2,
        rotation2,
        mid_dtype,
    )


def gemv_w4a16(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    weight_zeros: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """4-bit weights, with zero points or symmetric, and few tokens x (M, K): see
    `reference.gemv_w4a16`.
    """
    return gemv_w4a16_op(x, weight, weight_scale, weight_zeros, bias)


def gemm_w4a16(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    weight_zeros: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """The same for many tokens; `linear_w4a16` chooses between the two."""
    return gemm_w4a16_op(x, weight, weight_scale, weight_zeros, bias)


def linear_w4a4(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    smooth_factor: Tensor,
    proj_down: Tensor,
    proj_up: Tensor,
    bias: Tensor | None = None,
    act_unsigned: bool = False,
    rotation: int = 0,
) -> Tensor:
    """A whole SVDQuant linear.

    Shapes:
        x (..., K), any float dtype · weight int8 (N, K/2) · weight_scale (K/64, N) · smooth_factor
        (K,) proj_down (K, R) · proj_up (N, R) · bias (N,) or None, each in any float dtype -> (...,
        N) in x.dtype
    act_unsigned: x follows a GELU, codes are 0..15 and `bias` already holds -SHIFT * sum_k W[n, k]
        / smooth[k].
    rotation: 0, or 64 for a file whose weights were rotated per group.
    Raises ValueError naming the shapes and the rule that they break.
    """
    return linear_w4a4_op(
        x, weight, weight_scale, smooth_factor, proj_down, proj_up, bias, act_unsigned, rotation
    )


def linear_w4a4_grouped(
    x: Tensor,
    smooth_factor: Tensor,
    weight: Sequence[Tensor],
    weight_scale: Sequence[Tensor],
    proj_down: Sequence[Tensor],
    proj_up: Sequence[Tensor],
    bias: Sequence[Tensor | None],
    act_unsigned: bool = False,
    rotation: int = 0,
) -> list[Tensor]:
    """Several linears of one x that share its smoothing (q, k, v), with x quantized once: a list of
    (..., N) in x.dtype.

    The lists hold for each linear what `linear_w4a4` takes. Where a gradient is needed, the linears
    run one by one.
    """
    if _need_gradients(x, *proj_down, *proj_up, *bias):
        layers = zip(weight, weight_scale, proj_down, proj_up, bias, strict=True)
        return [
            linear_w4a4(x, w, scale, smooth_factor, down, up, b, act_unsigned, rotation)
            for w, scale, down, up, b in layers
        ]
    return linear_w4a4_grouped_op(
        x, smooth_factor, weight, weight_scale, proj_down, proj_up, bias, act_unsigned, rotation
    )


def mlp_w4a4(
    x: Tensor,
    first: Sequence[Tensor | None],
    second: Sequence[Tensor | None],
    act_unsigned: bool = False,
    rotation: int = 0,
    act_unsigned2: bool = False,
    rotation2: int = 0,
) -> Tensor:
    """linear_w4a4 -> GELU (tanh approximation) -> linear_w4a4: x (..., K) -> (..., N of the second)
    in x.dtype.

    `first`, `second`: weight, weight_scale, smooth_factor, proj_down, proj_up, bias of each layer.
        The hidden activations of the
    compiled op are never stored. Where a gradient is needed, the two linears run one by one.
    """
    if _need_gradients(x, *first, *second):
        hidden = torch.nn.functional.gelu(
            linear_w4a4(x, *first, act_unsigned, rotation), approximate="tanh"
        )
        return linear_w4a4(hidden, *second, act_unsigned2, rotation2)
    return mlp_w4a4_op(x, *first, *second, act_unsigned, rotation, act_unsigned2, rotation2)


def linear_w4a16(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    weight_zeros: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """A whole 4-bit-weight linear: x (..., K) -> (..., N) in x.dtype; parameters as in
    `reference.gemv_w4a16`.
    """
    return linear_w4a16_op(x, weight, weight_scale, weight_zeros, bias)


def gemm_vq(
    x: Tensor,
    indices: Tensor,
    codebook: Tensor,
    scale: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """Codebook weights and tokens x (M, K), of any float dtype: see `reference_vq.gemm_vq`. Has a
    gradient to x and bias.
    """
    return gemm_vq_op(x, indices, codebook, scale, bias)


def linear_vq(
    x: Tensor,
    indices: Tensor,
    codebook: Tensor,
    scale: Tensor | None = None,
    proj_down: Tensor | None = None,
    proj_up: Tensor | None = None,
    bias: Tensor | None = None,
    rotation: int = 0,
) -> Tensor:
    """A whole codebook linear.

    Shapes:
        x (..., K), any float dtype · indices uint8 (N, K/D * log2(C) / 8) · codebook (C, D) · scale
        (N,) or None proj_down (K, R) and proj_up (N, R), both or neither · bias (N,) or None, each
        in any float dtype -> (..., N) in x.dtype
    rotation: 0, or 64 for a file whose weights were rotated per group; the low-rank branch sees the
        raw x.
    Raises ValueError naming the shapes and the rule that they break.
    """
    return linear_vq_op(x, indices, codebook, scale, proj_down, proj_up, bias, rotation)
