"""One check a function: an op by one route against the float64 reference -> a row with "ok".

    codes        share of activation codes that equal the reference's, and the largest difference (a
                 value on the border of two codes may round either way once it is computed in
                 another order)
    error        ||ours - exact|| / ||exact|| on the same quantized operands, with `exact` in
                 float64; `plain` is the same of ordinary torch in that dtype; it may be twice that
    sqnr_db      of whole linears, against the float64 reference from x on
At FLUX.1's sizes the reference computes some of the tokens only: a token's output depends on no
other. Results are written into NaN, so that an element that nobody wrote is seen.
"""

from __future__ import annotations

import functools
from dataclasses import replace

import torch
from torch import Tensor

from bench.gpu.layer import Layer, Steps, in_order
from cases import Case, make_input, make_vq, make_w4a4, make_w4a16, options, plain_w4a4
from compare import relative_error, sqnr_db
from nibble.kernels import ops, reference
from nibble.kernels.backends import native, native_w4a4
from nibble.kernels.params import GeluArguments
from nibble.kernels.reference import vq as reference_vq
from nibble.quant.weights.packing import dequantize_groups, unpack_int4

LINEAR_SQNR, W4A16_SQNR, FUSED_SQNR = 35.0, 45.0, 25.0
PRODUCT = ("weight", "weight_scale", "proj_up", "bias")


def double(parameters: dict[str, Tensor | None]) -> dict[str, Tensor | None]:
    return {
        name: t.double() if t is not None and t.is_floating_point() else t
        for name, t in parameters.items()
    }


def decibels(found: Tensor, exact: Tensor) -> float:
    """At most 300: JSON has no infinity. NaN counts as nothing right."""
    return min(300.0, sqnr_db(found, exact)) if bool(found.isfinite().all()) else -300.0


def _allowed(plain: float, dtype: torch.dtype) -> float:
    # one rounding of the result is any op's right
    return 2 * max(plain, torch.finfo(dtype).eps / 4)


def sampled(layer: Layer, most: int = 192) -> Tensor:
    """Rows to compare: the first, the last, and some between."""
    m = layer.case.M
    if m <= most:
        return torch.arange(m, device=layer.x.device)
    middle = torch.randint(64, m - 64, (most - 128,), generator=torch.Generator().manual_seed(0))
    return torch.cat([torch.arange(64), torch.arange(m - 64, m), middle]).to(layer.x.device)


class Exact:
    """A layer with what its sampled rows have to be, computed once for all routes."""

    def __init__(self, layer: Layer):
        self.layer, self.rows = layer, sampled(layer)

    @functools.cached_property
    def quantized(self) -> tuple[Tensor, Tensor, Tensor]:
        """(codes as integers, ascales, h) of the sampled rows, in float64."""
        case, p = self.layer.case, double(self.layer.parameters)
        x, factors = self.layer.x[self.rows].double(), (p["smooth_factor"], p["proj_down"])
        q, ascales, h = reference.quantize_down(x, *factors, **options(case))
        return unpack_int4(q, not case.act_unsigned), ascales, h

    @functools.cached_property
    def operands(self) -> tuple[Tensor, Tensor, Tensor]:
        """(q, ascales, h) of all tokens that products are given, from plain torch."""
        p, case = self.layer.parameters, self.layer.case
        return reference.quantize_down(
            self.layer.x, p["smooth_factor"], p["proj_down"], **options(case)
        )

    @functools.cached_property
    def linear(self) -> Tensor:
        """The sampled rows of the whole linear, in float64 from x on."""
        x, p = self.layer.x[self.rows].double(), double(self.layer.parameters)
        return reference.linear_w4a4(x, **p, **options(self.layer.case))

    @functools.cached_property
    def linear8(self) -> Tensor:
        """The same with activations of 8 bits."""
        x, p = self.layer.x[self.rows].double(), double(self.layer.parameters)
        return reference.linear_w4a4(x, **p, **options(self.layer.case), act_bits=8)

    @functools.cached_property
    def product(self) -> tuple[Tensor, float]:
        """(the sampled rows of the product of `operands` in float64, plain torch's error)."""
        case, p, dtype = self.layer.case, self.layer.parameters, self.layer.x.dtype
        q, ascales, h = self.operands
        some = q[self.rows], ascales[:, self.rows].contiguous(), h[self.rows]
        rest = double({name: p[name] for name in PRODUCT})
        exact = reference.gemm_w4a4_up(
            some[0], some[1].double(), some[2].double(), **rest, act_unsigned=case.act_unsigned
        )
        plain = plain_w4a4(*some, p, case.act_unsigned, dtype)
        return exact, relative_error(plain, exact)


# ---- by route ------------------------------------------------------------------------------------


def _integers(steps: Steps, rows: Tensor) -> Tensor:
    """Activation codes of some tokens, whatever their form; 8-bit floats hold integers."""
    q = steps.q[rows]
    if steps.codes == native.PACKED:
        return unpack_int4(q, not steps.layer.case.act_unsigned).int()
    return q.float().nan_to_num(99).int()


def quantizer(exact: Exact, route: int = 0) -> dict:
    """quantize_down into the form of codes that a route reads."""
    steps = Steps(exact.layer, route)
    steps.q.view(torch.int8).fill_(127)
    for tensor in (steps.ascales, steps.h):
        tensor.fill_(torch.nan)
    steps.quantize()
    codes, scales, h = exact.quantized
    difference = (_integers(steps, exact.rows) - codes.int()).abs()
    facts = {
        "equal_codes": (difference == 0).double().mean().item(),
        "largest_code_difference": int(difference.max()) if difference.numel() else 0,
        "scale_error": relative_error(steps.ascales[:, exact.rows], scales),
        "h_error": relative_error(steps.h[exact.rows], h),
    }
    # The branch multiplies 16-bit operands and adds in float32; a scale is one division of one
    # value.
    ok = facts["equal_codes"] > 0.999 and facts["largest_code_difference"] <= 1
    return facts | {"ok": ok and facts["scale_error"] < 1e-5 and facts["h_error"] < 1e-4}


def product(exact: Exact, route: int = 0) -> dict:
    """gemm_w4a4_up by a route, on given operands."""
    steps, (q, ascales, h), case = Steps(exact.layer, route), exact.operands, exact.layer.case
    if steps.codes != native.PACKED:
        q = unpack_int4(q, not case.act_unsigned).float().to(native.WIDE)
    for ours, given in zip((steps.q, steps.ascales, steps.h), (q, ascales, h), strict=True):
        ours.copy_(given)
    steps.out.fill_(torch.nan)
    expected, plain = exact.product
    error = relative_error(steps.product()[exact.rows], expected)
    return {"error": error, "plain": plain, "ok": error <= _allowed(plain, exact.layer.x.dtype)}


def fused(exact: Exact, route: int = 0) -> dict:
    """gemm_w4a4_up_gelu_quantize_down by a route; N of the layer in whole groups."""
    case, p, dtype = exact.layer.case, exact.layer.parameters, exact.layer.x.dtype
    after = Case("after", case.M, case.N, 64, R=32, act_unsigned=True)
    second = make_w4a4(after, dtype, seed=3, device=str(exact.layer.x.device))
    factors = second["smooth_factor"], second["proj_down"]
    parameters = [p[name] for name in PRODUCT]
    arguments = GeluArguments(
        *exact.operands, *parameters, *factors, case.act_unsigned, True, 0, dtype
    )
    q2, scales2, h2 = native_w4a4.gemm_w4a4_up_gelu_quantize_down(dtype, arguments, route)
    moved = {"dtype": torch.float64}
    q, ascales, h = exact.operands
    some = q[exact.rows], ascales[:, exact.rows].double(), h[exact.rows].double()
    doubles = [None if t is None or t.dtype == torch.int8 else t.double() for t in parameters]
    expected = reference.gemm_w4a4_up_gelu_quantize_down(
        *some, parameters[0], *doubles[1:], *(t.double() for t in factors),
        case.act_unsigned, True, 0, dtype,
    )  # fmt: skip
    codes, wanted = unpack_int4(q2[exact.rows], False), unpack_int4(expected[0], False)
    scales = scales2[:, exact.rows].double()
    found = dequantize_groups(codes, scales, **moved)
    # Rounding between the layers to 16 bits puts values on the other side of a border.
    sqnr = decibels(found, dequantize_groups(wanted, expected[1].double(), **moved))
    h_error = relative_error(h2[exact.rows], expected[2])
    return {"sqnr_db": sqnr, "h_error": h_error, "ok": sqnr >= FUSED_SQNR and h_error < 0.02}


def steps_agree(exact: Exact, route: int = 0) -> dict:
    """Quantizer and product of a route, one after the other, against float64 from x on."""
    found = Steps(exact.layer, route).both()[exact.rows]
    return _linear_facts(found, exact)


# ---- whole linears, by the default route ---------------------------------------------------------


def _linear_facts(found: Tensor, exact: Exact, act_bits: int = 4) -> dict:
    sqnr = decibels(found, exact.linear if act_bits == 4 else exact.linear8)
    return {"sqnr_db": sqnr, "ok": sqnr >= LINEAR_SQNR}


def linear(exact: Exact) -> dict:
    return _linear_facts(exact.layer.linear()[exact.rows], exact)


def linear8(exact: Exact) -> dict:
    """The whole linear with activations of 8 bits."""
    return _linear_facts(exact.layer.linear8()[exact.rows], exact, 8)


def grouped(exact: Exact) -> dict:
    """The layer twice, as one group."""
    p, names = exact.layer.parameters, ("weight", "weight_scale", "proj_down", "proj_up", "bias")
    lists = [[p[name], p[name]] for name in names]
    both = ops.linear_w4a4_grouped(
        exact.layer.x, p["smooth_factor"], *lists, **options(exact.layer.case)
    )
    facts = _linear_facts(both[1][exact.rows], exact)
    return facts | {"ok": facts["ok"] and torch.equal(both[0], both[1])}


def mlp(exact: Exact) -> dict:
    """mlp_w4a4 with a second layer of its own, against two linears with a GELU between in
    float64.
    """
    layer, case, dtype = exact.layer, exact.layer.case, exact.layer.x.dtype
    second = replace(case, name="second", K=case.N, N=64, act_unsigned=True, rotation=0)
    p, p2 = layer.parameters, make_w4a4(second, dtype, seed=3, device=str(layer.x.device))
    found = ops.mlp_w4a4(layer.x, in_order(p), in_order(p2), **options(case), act_unsigned2=True)
    x = layer.x[exact.rows].double()
    hidden = reference.linear_w4a4(x, **double(p), **options(case))
    expected = reference.linear_w4a4(
        torch.nn.functional.gelu(hidden, approximate="tanh"), **double(p2), act_unsigned=True
    )
    sqnr = decibels(found[exact.rows], expected)
    # Rounding y to 16 bits, and codes on the border after the first layer's own rounding, both add
    # noise here.
    return {"sqnr_db": sqnr, "ok": sqnr >= FUSED_SQNR}


def w4a16(case: Case, dtype: torch.dtype, device: str) -> dict:
    x, p = make_input(case, dtype, device=device), make_w4a16(case, dtype, device=device)
    expected = reference.gemv_w4a16(x.double(), **double(p))
    sqnr = decibels(ops.linear_w4a16(x, **p), expected)
    return {"sqnr_db": sqnr, "ok": sqnr >= W4A16_SQNR}


def codebook(case: Case, layout: tuple[int, int], dtype: torch.dtype, device: str) -> dict:
    """At most 64 tokens, so that FLUX's layers take float64 a moment; in the middle of more of them
    where there are more.
    """
    x, p = make_input(case, dtype, device=device), make_vq(case, *layout, dtype, device=device)
    some = slice(max(0, case.M // 2 - 32), case.M // 2 + 32)
    found = ops.linear_vq(x, **p, rotation=case.rotation)[some]
    expected = reference_vq.linear_vq(x[some].double(), **double(p), rotation=case.rotation)
    sqnr = decibels(found, expected)
    return {"bits": layout[0], "vector": layout[1], "sqnr_db": sqnr, "ok": sqnr >= W4A16_SQNR}
