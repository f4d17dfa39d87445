"""The two halves of a W4A4 linear as ops of their own, and their fusion across a GELU.

    quantize_down   x -> int4 codes, a scale per token and group, and h = x . proj_down
    gemm_w4a4_up    int4 x int4 product, rescaled per group, + h . proj_up^T + bias
    gemm_w4a4_up_gelu_quantize_down
                    both, with a GELU (tanh) between: what lies between is never stored

SVDQuant, arXiv 2411.05007, eq. 3 and 9. None has a gradient; the whole linears in `w4a4` do.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import reference
from ..backends import native, native_w4a4, triton
from ..backends.choose import choose
from ..params import (
    Activations,
    GeluArguments,
    GemmArguments,
    ProductParams,
    QuantizeParams,
    float_dtypes,
)
from ..reference import GROUP
from . import checks
from .register import register

FLAGS = "bool act_unsigned=False, int rotation=0"
UNSIGNED_FROM = "int unsigned_from=0"
_PRODUCT = (
    "Tensor q, Tensor ascales, Tensor h, Tensor weight, Tensor weight_scale, Tensor proj_up,"
    " Tensor? bias"
)
SCHEMAS = {
    "quantize_down": (
        f"(Tensor x, Tensor smooth_factor, Tensor proj_down, {FLAGS}, {UNSIGNED_FROM}) -> (Tensor,"
        " Tensor, Tensor)"
    ),
    "gemm_w4a4_up": (
        f"({_PRODUCT}=None, bool act_unsigned=False, ScalarType? out_dtype=None, {UNSIGNED_FROM})"
        " -> Tensor"
    ),
    "gemm_w4a4_up_gelu_quantize_down": (
        f"({_PRODUCT}, Tensor smooth_factor2, Tensor proj_down2, bool act_unsigned=False, bool"
        " act_unsigned2=False, int rotation2=0, ScalarType? mid_dtype=None) -> (Tensor, Tensor,"
        " Tensor)"
    ),
}


# ---- checks --------------------------------------------------------------------------------------


def check_quantizer(k: int, p: QuantizeParams, layer: str = "") -> int:
    """R. `layer` is "2" where these are the second layer's parameters."""
    checks.shape(f"smooth_factor{layer}", p.smooth_factor, "(K,)", k)
    rank = checks.rank(f"proj_down{layer}", p.proj_down)
    checks.shape(f"proj_down{layer}", p.proj_down, "(K, R)", k, rank)
    _check_unsigned_from(k, p.unsigned_from)
    return rank


def _check_unsigned_from(k: int, column: int) -> None:
    if column and column >= k:
        raise ValueError(f"unsigned_from={column} is none of the columns of K={k}")


def check_product(k: int, n: int, rank: int, p: ProductParams, layer: str = "") -> None:
    checks.shape(f"weight_scale{layer}", p.weight_scale, "(K/64, N)", k // GROUP, n)
    checks.shape(f"proj_up{layer}", p.proj_up, "(N, R)", n, rank)
    checks.shape(f"bias{layer}", p.bias, "(N,)", n)


def _check_quantize_down(x: Tensor, p: QuantizeParams) -> None:
    reference.check_flags(p.act_unsigned, p.rotation, p.unsigned_from)
    checks.no_leading_shape("quantize_down", x)
    check_quantizer(checks.features(x), p)
    checks.same_device(x.device, smooth_factor=p.smooth_factor, proj_down=p.proj_down)


def _check_gemm(act: Activations, p: ProductParams) -> int:
    """N."""
    q = act.q
    if q.dtype != torch.int8 or q.dim() != 2:
        raise ValueError(f"q must be packed int8 (M, K/2), not {q.dtype} {tuple(q.shape)}")
    m, k = q.shape[0], q.shape[1] * 2
    checks.whole_groups("K", k)
    reference.check_flags(act.act_unsigned, 0, act.unsigned_from)
    _check_unsigned_from(k, act.unsigned_from)
    n, rank = checks.outputs(p.weight, k), checks.rank("proj_up", p.proj_up)
    checks.shape("ascales", act.ascales, "(K/64, M)", k // GROUP, m)
    checks.shape("h", act.h, "(M, R)", m, rank)
    check_product(k, n, rank, p)
    checks.same_device(q.device, ascales=act.ascales, h=act.h, **p._asdict())
    return n


def _check_gelu(a: GeluArguments) -> None:
    reference.check_flags(a.act_unsigned2, a.rotation2)
    n = _check_gemm(a.activations, a.product)
    if n % GROUP:
        raise ValueError(
            f"N={n} is not a multiple of the group size {GROUP}, and the second layer quantizes it"
        )
    check_quantizer(n, a.second, "2")
    checks.same_device(a.q.device, smooth_factor2=a.smooth_factor2, proj_down2=a.proj_down2)


# ---- fakes ---------------------------------------------------------------------------------------


def _new_activations(like: Tensor, m: int, k: int, rank: int, dtype: torch.dtype) -> tuple:
    return (
        like.new_empty((m, k // 2), dtype=torch.int8),
        like.new_empty((k // GROUP, m), dtype=dtype),
        like.new_empty((m, rank), dtype=dtype),
    )


def _fake_quantize_down(x: Tensor, *parameters) -> tuple:
    p = QuantizeParams(*parameters)
    _check_quantize_down(x, p)
    m, k = x.shape
    return _new_activations(x, m, k, p.proj_down.shape[1], reference.compute_dtype(x))


def _fake_gemm_w4a4_up(*arguments) -> Tensor:
    a = GemmArguments(*arguments)
    _check_gemm(a.activations, a.product)
    dtype = a.out_dtype or a.ascales.dtype
    return a.ascales.new_empty((a.q.shape[0], a.weight.shape[0]), dtype=dtype)


def _fake_gelu(*arguments) -> tuple:
    a = GeluArguments(*arguments)
    _check_gelu(a)
    dtype = reference.compute_dtype(a.ascales)
    return _new_activations(a.q, a.q.shape[0], a.weight.shape[0], a.proj_down2.shape[1], dtype)


# ---- what runs -----------------------------------------------------------------------------------


def _run_quantize_down(x: Tensor, *parameters) -> tuple[Tensor, Tensor, Tensor]:
    p = QuantizeParams(*parameters)
    _check_quantize_down(x, p)
    dtypes = float_dtypes(p.smooth_factor, p.proj_down)
    choice = choose("quantize_down", x.device, x.dtype, dtypes)
    if choice.parameters is not None:
        return native_w4a4.quantize_down(choice.parameters, x, p)
    if choice.backend == "triton":
        return triton.w4a4().quantize_down(x, p)
    return reference.quantize_down(x, *p)


def _run_gemm_w4a4_up(*arguments) -> Tensor:
    a = GemmArguments(*arguments)
    act, p = a.activations, a.product
    _check_gemm(act, p)
    out_dtype = a.out_dtype or act.ascales.dtype
    dtype = out_dtype
    if act.ascales.dtype == torch.float64 or out_dtype not in native.DTYPES:
        dtype = act.ascales.dtype
    dtypes = float_dtypes(p.weight_scale, p.proj_up, p.bias)
    choice = choose("gemm_w4a4_up", act.q.device, dtype, dtypes)
    if choice.parameters is not None:
        return native_w4a4.gemm_w4a4_up(choice.parameters, act, p, out_dtype)
    if choice.backend == "triton":
        return triton.w4a4().gemm_w4a4_up(act, p, out_dtype)
    signs = (act.act_unsigned, act.unsigned_from)
    return reference.gemm_w4a4_up(act.q, act.ascales, act.h, *p, *signs).to(out_dtype)


def _run_gelu(*arguments) -> tuple[Tensor, Tensor, Tensor]:
    a = GeluArguments(*arguments)
    _check_gelu(a)
    mid_dtype = a.mid_dtype or a.ascales.dtype
    dtype = a.ascales.dtype if a.ascales.dtype == torch.float64 else mid_dtype
    dtypes = float_dtypes(*a[4:9])
    choice = choose("gemm_w4a4_up_gelu_quantize_down", a.q.device, dtype, dtypes)
    if choice.parameters is not None:
        return native_w4a4.gemm_w4a4_up_gelu_quantize_down(
            choice.parameters, a._replace(mid_dtype=mid_dtype)
        )
    if choice.backend == "triton":
        return triton.w4a4().gemm_w4a4_up_gelu_quantize_down(a._replace(mid_dtype=mid_dtype))
    return reference.gemm_w4a4_up_gelu_quantize_down(*a[:12], mid_dtype)


quantize_down_op = register(
    "quantize_down", SCHEMAS["quantize_down"], _run_quantize_down, _fake_quantize_down
)
gemm_w4a4_up_op = register(
    "gemm_w4a4_up", SCHEMAS["gemm_w4a4_up"], _run_gemm_w4a4_up, _fake_gemm_w4a4_up
)
gelu_op = register(
    "gemm_w4a4_up_gelu_quantize_down",
    SCHEMAS["gemm_w4a4_up_gelu_quantize_down"],
    _run_gelu,
    _fake_gelu,
)


# ---- the functions to call -----------------------------------------------------------------------


def quantize_down(
    x: Tensor,
    smooth_factor: Tensor,
    proj_down: Tensor,
    act_unsigned: bool = False,
    rotation: int = 0,
    unsigned_from: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    """int4 codes, their scales and x . proj_down: see `reference.quantize_down`. Has no gradient;
    `linear_w4a4` does.
    """
    return quantize_down_op(x, smooth_factor, proj_down, act_unsigned, rotation, unsigned_from)


def gemm_w4a4_up(  # noqa: PLR0913 - the schema's arguments
    q: Tensor,
    ascales: Tensor,
    h: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    proj_up: Tensor,
    bias: Tensor | None = None,
    act_unsigned: bool = False,
    out_dtype: torch.dtype | None = None,
    unsigned_from: int = 0,
) -> Tensor:
    """int4 product + low-rank up + bias: see `reference.gemm_w4a4_up`. (M, N) in `out_dtype`, by
    default that of ascales.
    """
    flags = (act_unsigned, out_dtype, unsigned_from)
    return gemm_w4a4_up_op(q, ascales, h, weight, weight_scale, proj_up, bias, *flags)


def gemm_w4a4_up_gelu_quantize_down(*arguments, **named) -> tuple[Tensor, Tensor, Tensor]:
    """One MLP layer straight into the next one's quantized input: see the reference of this name.
    Takes what `GeluArguments` names, in its order or by name. Has no gradient; `mlp_w4a4` does.

    Shapes: as `gemm_w4a4_up`, N a multiple of 64 -> q2 int8 (M, N/2) · ascales2 (N/64, M) · h2 (M,
        R2), floats as ascales
    """
    return gelu_op(*GeluArguments(*arguments, **named))
