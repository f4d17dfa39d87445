"""The product of 4-bit floats and its quantizer in Triton: two kernels.

    quantize_nvfp4  x -> e2m1 codes, an e4m3 scale per 16 columns, h = x . proj_down
    gemm_nvfp4      out = (codes . W^T, scaled per 16 columns) * weight_scale_2
                          + h . proj_up^T + bias
                                    formula: `reference.nvfp4`; SVDQuant, arXiv 2411.05007, eq. 9

Codes lie two to a byte, the even column low; scales travel as bytes. SCALED multiplies by
`tl.dot_scaled`, which Triton makes a block-scaled product of on Blackwell (tcgen05 on 10.x, mma on
12.x). Without it numbers are decoded by their definition and multiplied in float32: for Triton's
interpreter, which has no such product, so that a test can run everything around it.

Imported by `triton.nvfp4` alone, where Triton is installed.
"""

import triton
import triton.language as tl

from .triton_kernels import ROUND, _exact_dot, _low_rank

NAN_BITS = tl.constexpr(0x7F800000)
"""Bits of a float beyond which it is NaN."""


# ---- quantize_nvfp4 ------------------------------------------------------------------------------


@triton.jit
def _e4m3(s):
    """Numbers 0..448 or NaN as e4m3 bytes (int32), to nearest, ties to even."""
    bits = s.to(tl.int32, bitcast=True)
    normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) >> 20) - (120 << 3)
    subnormal = (s * 512.0 + ROUND).to(tl.int32, bitcast=True) & 15
    byte = tl.where(s < 0.015625, subnormal, normal)
    return tl.where(bits > NAN_BITS, 0x7F, byte)


@triton.jit
def _of_e4m3(byte):
    """e4m3 bytes without a sign as float32: the exponents of both formats differ by 120."""
    number = (byte.to(tl.int32) << 20).to(tl.float32, bitcast=True) * 1.329227995784916e36
    return tl.where(byte == 0x7F, float("nan"), number)


@triton.jit
def _e2m1(v):
    """Nearest codes 0..15 (int32), ties to the even one; what is beyond 6 becomes 6."""
    size = tl.abs(v)
    code = (size > 0.25).to(tl.int32) + (size >= 0.75).to(tl.int32) + (size > 1.25).to(tl.int32)
    code += (size >= 1.75).to(tl.int32) + (size > 2.5).to(tl.int32)
    code += (size >= 3.5).to(tl.int32) + (size > 5.0).to(tl.int32)
    return code | ((v.to(tl.int32, bitcast=True) >> 28) & 8)


@triton.jit
def _quantize_group(  # noqa: PLR0913 - what a kernel has at hand
    xv, smooth, q, ascales, g, rows, M, groups, ROUNDED: tl.constexpr, ROWS: tl.constexpr
):
    """The codes and scales of group g, stored; xv: its columns of x."""
    k = g * 64 + tl.arange(0, 64)
    by = tl.load(smooth + k).to(tl.float32)[None, :].broadcast_to(ROWS, 64)
    v = tl.reshape(tl.div_rn(xv.to(tl.float32), by), (ROWS, 4, 16))
    # Largest magnitudes by their bits, which order as the numbers do and put NaN above all.
    top = tl.max(v.to(tl.int32, bitcast=True) & 0x7FFFFFFF, 2).to(tl.float32, bitcast=True)
    exact = tl.div_rn(top, tl.full(top.shape, 6.0, tl.float32))
    exact = tl.where(top > 2688.0, 448.0, exact)
    byte = _e4m3(exact)
    if ROUNDED:
        exact = _of_e4m3(byte)
    divisor = tl.where(exact == 0, float("inf"), exact)
    code = _e2m1(tl.div_rn(v, divisor[:, :, None].broadcast_to(ROWS, 4, 16)))
    even, odd = tl.split(tl.reshape(code, (ROWS, 32, 2)))
    wide, mask = rows.to(tl.int64)[:, None], (rows < M)[:, None]
    at = q + wide * (groups * 32) + (g * 32 + tl.arange(0, 32))[None, :]
    tl.store(at, (even | (odd << 4)).to(tl.uint8), mask=mask)
    at = ascales + wide * (groups * 4) + (g * 4 + tl.arange(0, 4))[None, :]
    tl.store(at, byte.to(tl.uint8), mask=mask)


@triton.jit(do_not_specialize=["M", "groups"])
def quantize_nvfp4(  # noqa: PLR0913 - a kernel's arguments
    x,
    smooth,
    down,
    q,
    ascales,
    h,
    M,
    groups,
    stride,
    R,
    ROUNDED: tl.constexpr,
    FLOATS: tl.constexpr,
    PARTS: tl.constexpr,
    RANK: tl.constexpr,
    ROWS: tl.constexpr,
):
    """x (M, 64 * groups), rows `stride` apart · smooth (64 * groups,) · down (64 * groups, R)
    -> q uint8 (M, 32 * groups) · ascales uint8 (M, 4 * groups) · h float32 (M, R)

    A program does ROWS tokens and RANK columns of h; the first column of programs quantizes.
    ROUNDED: codes by the scale that is stored. FLOATS, PARTS, RANK as in
    `triton_kernels.quantize_down`.
    """
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    block = tl.program_id(1)
    mask = (rows < M)[:, None]
    wide = rows.to(tl.int64)[:, None]
    if RANK:
        r = block * RANK + tl.arange(0, RANK)
        total = tl.zeros((ROWS, RANK), tl.float32)
    for g in range(0, groups):
        k = g * 64 + tl.arange(0, 64)
        xv = tl.load(x + wide * stride + k[None, :], mask=mask, other=0.0)
        if RANK:
            d = tl.load(down + k[:, None] * R + r[None, :], mask=(r < R)[None, :], other=0.0)
            if PARTS == 0:
                total = tl.dot(xv, d, total, input_precision="ieee")
            else:
                total = _exact_dot(xv.to(tl.float32), d.to(tl.float32), total, PARTS, FLOATS)
        if block == 0:
            _quantize_group(xv, smooth, q, ascales, g, rows, M, groups, ROUNDED, ROWS)
    if RANK:
        tl.store(h + wide * R + r[None, :], total, mask=mask & (r < R)[None, :])


# ---- gemm_nvfp4 ----------------------------------------------------------------------------------


@triton.jit
def _number(code):
    """What codes 0..15 stand for: 0 and 0.5, then 1 or 1.5 times a power of two, and a sign."""
    size = code & 7
    power = ((((size >> 1) - 1) + 127) << 23).to(tl.float32, bitcast=True)
    number = tl.where(size < 2, size * 0.5, (1.0 + (size & 1) * 0.5) * power)
    return tl.where(code > 7, -number, number)


@triton.jit
def _decoded(byte, scale):
    """Bytes (rows, K/2) under scales (rows, K/16): the even columns, and the odd ones."""
    byte = byte.to(tl.int32)
    rows: tl.constexpr = byte.shape[0]
    half: tl.constexpr = byte.shape[1]
    by = _of_e4m3(scale)[:, :, None].broadcast_to(rows, half // 8, 8)
    by = tl.reshape(by, (rows, half))
    return _number(byte & 15) * by, _number(byte >> 4) * by


@triton.jit
def _product(a, sa, b, sb, total, SCALED: tl.constexpr):
    """total + a (rows, K/2) . b (columns, K/2)^T under their scales (rows or columns, K/16)."""
    if SCALED:
        sa = sa.to(tl.float8e4nv, bitcast=True)
        sb = sb.to(tl.float8e4nv, bitcast=True)
        total = tl.dot_scaled(a, sa, "e2m1", tl.trans(b), sb, "e2m1", total)
    else:
        a_even, a_odd = _decoded(a, sa)
        b_even, b_odd = _decoded(b, sb)
        total = tl.dot(a_even, tl.trans(b_even), total, input_precision="ieee")
        total = tl.dot(a_odd, tl.trans(b_odd), total, input_precision="ieee")
    return total


@triton.jit(do_not_specialize=["M", "groups"])
def gemm_nvfp4(  # noqa: PLR0913 - a kernel's arguments
    q,
    ascales,
    h,
    weight,
    weight_scale,
    weight_scale_2,
    up,
    bias,
    out,
    M,
    N,
    groups,
    R,
    BIAS: tl.constexpr,
    RANK: tl.constexpr,
    SCALED: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    STRIPE: tl.constexpr,
):
    """q uint8 (M, 32 * groups) · ascales uint8 (M, 4 * groups) · h float32 (M, R) · weight uint8
    (N, 32 * groups) · weight_scale uint8 (N, 4 * groups) · weight_scale_2 (N,) · up (N, R) · bias
    (N,) -> out (M, N)

    A program does a tile of ROWS x COLUMNS, DEPTH columns of K at a time. STRIPE, RANK as in
    `triton_kernels.gemm_up`.
    """
    number = tl.program_id(0)
    width = STRIPE * tl.cdiv(N, COLUMNS)
    first = number // width * STRIPE
    height = tl.minimum(tl.cdiv(M, ROWS) - first, STRIPE)
    m = (first + number % width % height) * ROWS + tl.arange(0, ROWS)
    n = number % width // height * COLUMNS + tl.arange(0, COLUMNS)
    wide_m, wide_n = m.to(tl.int64)[:, None], n.to(tl.int64)[:, None]
    byte, block = tl.arange(0, DEPTH // 2)[None, :], tl.arange(0, DEPTH // 16)[None, :]
    bytes, blocks = groups * 32, groups * 4
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(0, tl.cdiv(groups * 64, DEPTH)):
        at, of = start * (DEPTH // 2) + byte, start * (DEPTH // 16) + block
        a = tl.load(q + wide_m * bytes + at, mask=(m < M)[:, None] & (at < bytes), other=0)
        b = tl.load(weight + wide_n * bytes + at, mask=(n < N)[:, None] & (at < bytes), other=0)
        sa = tl.load(ascales + wide_m * blocks + of, mask=(m < M)[:, None] & (of < blocks), other=0)
        sb = tl.load(
            weight_scale + wide_n * blocks + of, mask=(n < N)[:, None] & (of < blocks), other=0
        )
        total = _product(a, sa, b, sb, total, SCALED)
    total *= tl.load(weight_scale_2 + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
    if RANK:
        total += _low_rank(h, up, m, n, M, N, R, R, RANK)
    if BIAS:
        total += tl.load(bias + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
    at = out + wide_m * N + n[None, :]
    tl.store(at, total.to(out.dtype.element_ty), mask=(m < M)[:, None] & (n < N)[None, :])
