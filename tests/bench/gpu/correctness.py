"""Every op on this GPU against the float64 reference, at shapes with edges and at FLUX.1's. A
failed check is a row, not an end.

    codes        share of activation codes that equal the reference's, and the largest difference (a
      value on the border of two codes may
                 round either way once it is computed in another order)
    error        ||ours - exact|| / ||exact|| on the same quantized operands, with `exact` in
      float64; `plain` is the same of ordinary torch
                 in that dtype, `ok` is error <= 2 * plain
    sqnr_db      of whole linears, against the float64 reference from x on
At FLUX.1's sizes the reference computes some of the tokens only: a token's output depends on no
other.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
from torch import Tensor

from bench.gpu.layer import Layer, Steps, compiled_for, in_order
from bench.gpu.report import Report
from cases import (
    FLUX,
    FLUX_MODULATION,
    SMALL,
    VQ_LAYOUTS,
    Case,
    make_input,
    make_vq,
    make_w4a4,
    make_w4a16,
    options,
    plain_w4a4,
)
from compare import relative_error, sqnr_db
from nibble.kernels import ops, reference
from nibble.kernels.reference import vq as reference_vq
from nibble.quant.weights.packing import unpack_int4

SMALL_SQNR, LARGE_SQNR, W4A16_SQNR = 35.0, 35.0, 45.0
PRODUCT = ("weight", "weight_scale", "proj_up", "bias")


def double(parameters: dict[str, Tensor | None]) -> dict[str, Tensor | None]:
    return {
        name: t.double() if t is not None and t.is_floating_point() else t
        for name, t in parameters.items()
    }


def layer_of(case: Case, dtype: torch.dtype, device: str) -> Layer:
    """The very tensors of the CPU's tests."""
    return Layer(
        case, make_input(case, dtype, device=device), make_w4a4(case, dtype, device=device)
    )


def decibels(found: Tensor, exact: Tensor) -> float:
    """At most 300: JSON has no infinity."""
    return min(300.0, sqnr_db(found, exact))


def _allowed(plain: float, dtype: torch.dtype) -> float:
    # one rounding of the result is any op's right
    return 2 * max(plain, torch.finfo(dtype).eps / 4)


def sampled(layer: Layer, most: int = 192) -> Tensor:
    """Rows to compare: the first, the last, and some between."""
    m = layer.case.M
    if m <= most:
        return torch.arange(m, device=layer.x.device)
    rows = torch.cat(
        [
            torch.arange(64),
            torch.arange(m - 64, m),
            torch.randint(64, m - 64, (most - 128,), generator=torch.Generator().manual_seed(0)),
        ]
    )
    return rows.to(layer.x.device)


# ---- one check a function: (row of facts with "ok") ----------------------------------------------


def check_quantize_down(layer: Layer) -> dict:
    case, p, rows = layer.case, layer.parameters, sampled(layer)
    q, ascales, h = ops.quantize_down(layer.x, p["smooth_factor"], p["proj_down"], **options(case))
    want_q, want_scales, want_h = reference.quantize_down(
        layer.x[rows].double(),
        p["smooth_factor"].double(),
        p["proj_down"].double(),
        **options(case),
    )
    difference = (
        unpack_int4(q[rows], not case.act_unsigned).int()
        - unpack_int4(want_q, not case.act_unsigned).int()
    ).abs()
    facts = {
        "equal_codes": (difference == 0).double().mean().item(),
        "largest_code_difference": int(difference.max()) if difference.numel() else 0,
        "scale_error": relative_error(ascales[:, rows], want_scales),
        "h_error": relative_error(h[rows], want_h),
    }
    # The branch multiplies 16-bit operands and adds in float32; a scale is one division of one
    # value.
    ok = (
        facts["equal_codes"] > 0.999
        and facts["largest_code_difference"] <= 1
        and facts["scale_error"] < 1e-5
        and facts["h_error"] < 1e-4
    )
    return facts | {"ok": ok}


def check_product(layer: Layer) -> dict:
    case, p, rows = layer.case, layer.parameters, sampled(layer)
    q, ascales, h = reference.quantize_down(
        layer.x, p["smooth_factor"], p["proj_down"], **options(case)
    )
    rest, dtype = {name: p[name] for name in PRODUCT}, layer.x.dtype
    found = ops.gemm_w4a4_up(
        q, ascales, h, **rest, act_unsigned=case.act_unsigned, out_dtype=dtype
    )[rows]
    operands = q[rows], ascales[:, rows].contiguous(), h[rows]
    exact = reference.gemm_w4a4_up(
        operands[0],
        operands[1].double(),
        operands[2].double(),
        **double(rest),
        act_unsigned=case.act_unsigned,
    )
    plain = relative_error(plain_w4a4(*operands, p, case.act_unsigned, dtype), exact)
    error = relative_error(found, exact)
    return {"error": error, "plain": plain, "ok": error <= _allowed(plain, dtype)}


def check_linear(layer: Layer) -> dict:
    rows = sampled(layer)
    exact = reference.linear_w4a4(
        layer.x[rows].double(), **double(layer.parameters), **options(layer.case)
    )
    sqnr = decibels(layer.linear()[rows], exact)
    return {"sqnr_db": sqnr, "ok": sqnr >= SMALL_SQNR}


def check_wide_codes(layer: Layer) -> dict:
    """The form of codes that this GPU prefers gives what the public form gives: codes are exact in
    both, so only the order of sums may differ.
    """
    steps, case, p = Steps(layer), layer.case, layer.parameters
    q, ascales, h = ops.quantize_down(layer.x, p["smooth_factor"], p["proj_down"], **options(case))
    public = ops.gemm_w4a4_up(
        q,
        ascales,
        h,
        **{name: p[name] for name in PRODUCT},
        act_unsigned=case.act_unsigned,
        out_dtype=layer.x.dtype,
    )
    difference = relative_error(steps.both(), public)
    return {"difference": difference, "ok": difference <= torch.finfo(layer.x.dtype).eps}


def check_fused_mlp(layer: Layer) -> dict:
    """mlp_w4a4 with a second layer of its own, against two linears with a GELU between in
    float64.
    """
    case, dtype, device = layer.case, layer.x.dtype, str(layer.x.device)
    second = replace(case, name="second", K=case.N, N=64, act_unsigned=True, rotation=0)
    p, p2 = layer.parameters, make_w4a4(second, dtype, seed=3, device=device)
    found = ops.mlp_w4a4(layer.x, in_order(p), in_order(p2), **options(case), act_unsigned2=True)
    hidden = reference.linear_w4a4(layer.x.double(), **double(p), **options(case))
    exact = reference.linear_w4a4(
        torch.nn.functional.gelu(hidden, approximate="tanh"), **double(p2), act_unsigned=True
    )
    sqnr = decibels(found, exact)
    # Rounding y to 16 bits, and codes on the border after the first layer's own rounding, both add
    # noise here.
    return {"sqnr_db": sqnr, "ok": sqnr >= (25.0 if dtype == torch.bfloat16 else 30.0)}


def check_w4a16(case: Case, dtype: torch.dtype, device: str) -> dict:
    x, p = make_input(case, dtype, device=device), make_w4a16(case, dtype, device=device)
    exact = reference.gemv_w4a16(x.double(), **double(p))
    sqnr = decibels(ops.linear_w4a16(x, **p), exact)
    return {"sqnr_db": sqnr, "ok": sqnr >= W4A16_SQNR}


def check_vq(case: Case, layout: tuple[int, int], dtype: torch.dtype, device: str) -> dict:
    """At most 64 tokens, so that FLUX's layers take float64 a moment; in the middle of more of them
    where there are more.
    """
    x, p = make_input(case, dtype, device=device), make_vq(case, *layout, dtype, device=device)
    some = slice(max(0, case.M // 2 - 32), case.M // 2 + 32)
    found = ops.linear_vq(x, **p, rotation=case.rotation)[some]
    exact = reference_vq.linear_vq(x[some].double(), **double(p), rotation=case.rotation)
    sqnr = decibels(found, exact)
    return {"bits": layout[0], "vector": layout[1], "sqnr_db": sqnr, "ok": sqnr >= W4A16_SQNR}


LAYER_CHECKS: dict[str, Callable[[Layer], dict]] = {
    "quantize_down": check_quantize_down,
    "gemm_w4a4_up": check_product,
    "linear_w4a4": check_linear,
}


def work(device: str, dry: bool) -> Iterator[tuple[str, Case, torch.dtype, Callable[[], dict]]]:
    """(op, case, dtype, check), the small shapes first."""
    checks = LAYER_CHECKS | (
        {"linear_w4a4, own form of codes": check_wide_codes} if compiled_for(device) else {}
    )
    for case in SMALL[:4] if dry else SMALL:
        for dtype in [torch.bfloat16] if dry else [torch.bfloat16, torch.float16]:
            layer = layer_of(case, dtype, device)
            for op, check in checks.items():
                yield op, case, dtype, lambda check=check, layer=layer: check(layer)
            yield (
                "linear_w4a16",
                case,
                dtype,
                lambda case=case, dtype=dtype: check_w4a16(case, dtype, device),
            )
            for layout in VQ_LAYOUTS.values():
                yield (
                    "linear_vq",
                    case,
                    dtype,
                    lambda case=case, dtype=dtype, layout=layout: check_vq(
                        case, layout, dtype, device
                    ),
                )
            if case.N % 64 == 0:
                yield "mlp_w4a4", case, dtype, lambda layer=layer: check_fused_mlp(layer)
    extra = [
        Case("tokens_257", 257, 3072, 3072, R=32),
        Case("rank_512", 300, 3072, 3072, R=512),
        Case("ragged_n", 200, 3072, 3000, R=32),
        Case("tokens_16k", 16384, 3072, 3072, R=32),
        Case("rank_zero_large", 4608, 3072, 3072, R=0),
    ]
    for case in [] if dry else [*FLUX, *extra]:
        layer = Layer.random(case, torch.bfloat16, device)
        for op, check in checks.items():
            yield op, case, torch.bfloat16, lambda check=check, layer=layer: check(layer)
    for case in (
        []
        if dry
        else [
            *FLUX_MODULATION,
            replace(FLUX_MODULATION[0], name="text", M=77),
            replace(FLUX_MODULATION[0], name="text_512", M=512),
        ]
    ):
        yield (
            "linear_w4a16",
            case,
            torch.bfloat16,
            lambda case=case: check_w4a16(case, torch.bfloat16, device),
        )
    for case in (
        []
        if dry
        else [
            FLUX[0],
            FLUX[3],
            *extra[:3],
            FLUX_MODULATION[0],
            replace(FLUX[1], name="turned", rotation=64),
        ]
    ):
        for layout in VQ_LAYOUTS.values():
            yield (
                "linear_vq",
                case,
                torch.bfloat16,
                lambda case=case, layout=layout: check_vq(case, layout, torch.bfloat16, device),
            )


def run(report: Report, device: str, dry: bool) -> None:
    wrong = 0
    for op, case, dtype, check in work(device, dry):
        if report.late():
            break
        row = {
            "op": op,
            "case": case.name,
            "M": case.M,
            "K": case.K,
            "N": case.N,
            "R": case.R,
            "dtype": str(dtype).removeprefix("torch."),
        }
        try:
            row |= check()
        except Exception as error:
            row |= {
                "ok": False,
                "error_message": f"{type(error).__name__}: {error}".splitlines()[0],
            }
        wrong += not row["ok"]
        report.add(row)
    report.set(checks=len(report.facts["rows"]), failed=wrong)
