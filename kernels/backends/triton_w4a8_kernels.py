"""Linears of 4-bit weights that are read as int8 in Triton: two kernels.

    quantize_tokens  x -> int8 codes with a scale a token, h = x . proj_down
    gemm_w4a8        out = (codes . W8^T) * ascales * channel_scale + h . proj_up^T + bias,
                     W8 = (table[code] * weight_scale + 64) >> 7
Formula: `reference.w4a8`; SVDQuant's branch: arXiv 2411.05007, eq. 3 and 9.

The weight's even columns are low nibbles and its odd ones high, so each 64 columns are two products
of 32; activations are stored for them, of each 64 columns the even ones first. Sums are integers
over all of K.

PTX says how a level is looked up: eight at once by byte permutations (`prmt`) in inline assembly,
or by shifts of the table's four words, for Triton's interpreter and GPUs of other makes. FLOATS
multiplies weights and codes, exact in bfloat16, as floats: for GPUs without 8-bit integer products
worth the name, where sums beyond 2^24 are rounded as the reference's are.

Imported by `triton_w4a8` alone, where Triton is installed.
"""

import triton
import triton.language as tl

from .triton_kernels import _codes, _exact_dot, _hadamard, _low_rank

LEVELS = tl.constexpr(
    "{ .reg .b32 i, c, a, b, f, s;"
    " and.b32 i, $2, 0x77777777;"
    " shr.u32 c, $2, 1;"
    " and.b32 c, c, 0x44444444;"
    " or.b32 c, c, 0x32103210;"
    " prmt.b32 a, $3, $7, i;"
    " prmt.b32 b, $11, $15, i;"
    " prmt.b32 f, a, b, c;"
    " shr.u32 i, i, 16;"
    " shr.u32 c, c, 16;"
    " prmt.b32 a, $3, $7, i;"
    " prmt.b32 b, $11, $15, i;"
    " prmt.b32 s, a, b, c;"
    " prmt.b32 $0, f, s, 0x6420;"
    " prmt.b32 $1, f, s, 0x7531; }"
)
"""PTX: four bytes of codes -> the levels of their low nibbles, and of their high ones. A nibble's
lower three bits choose in either half of the table, and its highest one chooses the half.
"""


# ---- quantize_tokens -----------------------------------------------------------------------------


@triton.jit
def _smoothed(xv, smooth, k, ROTATE: tl.constexpr, FLOATS: tl.constexpr, ROWS: tl.constexpr):
    """What is quantized of columns k of x: float32 (ROWS, 64)."""
    by = tl.load(smooth + k).to(tl.float32)[None, :].broadcast_to(ROWS, 64)
    v = tl.div_rn(xv.to(tl.float32), by)
    if ROTATE:
        v = _hadamard(v, FLOATS)
    return v


@triton.jit(do_not_specialize=["M", "groups"])
def quantize_tokens(  # noqa: PLR0913 - a kernel's arguments
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
    ROTATE: tl.constexpr,
    FLOATS: tl.constexpr,
    PARTS: tl.constexpr,
    RANK: tl.constexpr,
    ROWS: tl.constexpr,
):
    """x (M, 64 * groups), rows `stride` apart · smooth (64 * groups,) · down (64 * groups, R)
    -> q int8 (M, 64 * groups), of each 64 columns the even ones first · ascales float32 (M,) · h
    float32 (M, R)

    A program does ROWS tokens and RANK columns of h; the first column of programs quantizes, and
    reads x a second time for it. FLOATS, PARTS, RANK as in `triton_kernels.quantize_down`.
    """
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    block = tl.program_id(1)
    mask = (rows < M)[:, None]
    wide = rows.to(tl.int64)[:, None]
    # Largest magnitudes by their bits, which order as the numbers do and put NaN above all.
    top = tl.zeros((ROWS,), tl.int32)
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
            v = _smoothed(xv, smooth, k, ROTATE, FLOATS, ROWS)
            top = tl.maximum(top, tl.max(v.to(tl.int32, bitcast=True) & 0x7FFFFFFF, 1))
    if RANK:
        tl.store(h + wide * R + r[None, :], total, mask=mask & (r < R)[None, :])
    if block == 0:
        scale = tl.div_rn(top.to(tl.float32, bitcast=True), tl.full((ROWS,), 127.0, tl.float32))
        tl.store(ascales + rows, scale, mask=rows < M)
        half = tl.arange(0, 32)[None, :]
        for g in range(0, groups):
            k = g * 64 + tl.arange(0, 64)
            xv = tl.load(x + wide * stride + k[None, :], mask=mask, other=0.0)
            v = _smoothed(xv, smooth, k, ROTATE, FLOATS, ROWS)
            code = _codes(v, scale, False, ROWS).to(tl.int8)
            even, odd = tl.split(tl.reshape(code, (ROWS, 32, 2)))
            at = q + wide * (groups * 64) + g * 64 + half
            tl.store(at, even, mask=mask)
            tl.store(at + 32, odd, mask=mask)


# ---- gemm_w4a8 -----------------------------------------------------------------------------------


@triton.jit
def _word(table, i: tl.constexpr):
    """Four levels of the table, from 4 i on, in a register. Bytes, since nothing aligns it."""
    word = tl.load(table + 4 * i).to(tl.int32) & 255
    for j in tl.static_range(1, 4):
        word |= (tl.load(table + 4 * i + j).to(tl.int32) & 255) << (8 * j)
    return word


@triton.jit
def _level(code, t0, t1, t2, t3):
    """Levels of codes 0..15, int32, by a shift of the word of the table that holds them."""
    low, high = tl.where(code < 4, t0, t1), tl.where(code < 12, t2, t3)
    word = tl.where(code < 8, low, high)
    return (word << (24 - 8 * (code & 3))) >> 24


@triton.jit
def _levels(b, t0, t1, t2, t3, PTX: tl.constexpr):
    """The levels of bytes' low nibbles, and of their high ones."""
    if PTX:
        low, high = tl.inline_asm_elementwise(
            LEVELS,
            "=r,=r,r,r,r,r,r,r,r,r,r,r,r,r,r,r,r,r,r",
            [b, t0, t1, t2, t3],
            dtype=(tl.int8, tl.int8),
            is_pure=True,
            pack=4,
        )
        low, high = low.to(tl.int32), high.to(tl.int32)
    else:
        byte = b.to(tl.int32)
        low = _level(byte & 15, t0, t1, t2, t3)
        high = _level((byte >> 4) & 15, t0, t1, t2, t3)
    return low, high


@triton.jit
def _scales(weight_scale, g, n, N, PER: tl.constexpr):
    """Of the 32 bytes of group g of 64 columns, PER scales: int32 (32 or 1, columns)."""
    at = weight_scale + g * PER * N + n
    scale = tl.load(at, mask=n < N, other=0).to(tl.int32)[None, :]
    byte = tl.arange(0, 32)[:, None]
    for j in tl.static_range(1, PER):
        other = tl.load(at + j * N, mask=n < N, other=0).to(tl.int32)[None, :]
        scale = tl.where(byte < j * (32 // PER), scale, other)
    return scale


@triton.jit(do_not_specialize=["M", "groups"])
def gemm_w4a8(  # noqa: PLR0913 - a kernel's arguments
    q,
    ascales,
    h,
    weight,
    weight_scale,
    channel_scale,
    table,
    up,
    bias,
    out,
    M,
    N,
    groups,
    R,
    PER: tl.constexpr,
    BIAS: tl.constexpr,
    RANK: tl.constexpr,
    FLOATS: tl.constexpr,
    PTX: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    STRIPE: tl.constexpr,
):
    """q, ascales and h as `quantize_tokens` leaves them · weight int8 (N, 32 * groups) ·
    weight_scale int8 (PER * groups, N) · channel_scale (N,) · table int8 (16,) · up (N, R) · bias
    (N,) -> out (M, N)

    A program does a tile of ROWS x COLUMNS. STRIPE, RANK as in `triton_kernels.gemm_up`.
    """
    number = tl.program_id(0)
    width = STRIPE * tl.cdiv(N, COLUMNS)
    first = number // width * STRIPE
    height = tl.minimum(tl.cdiv(M, ROWS) - first, STRIPE)
    m = (first + number % width % height) * ROWS + tl.arange(0, ROWS)
    n = number % width // height * COLUMNS + tl.arange(0, COLUMNS)
    byte = tl.arange(0, 32)
    a_at = q + m.to(tl.int64)[:, None] * (groups * 64) + byte[None, :]
    b_at = weight + n.to(tl.int64)[None, :] * (groups * 32) + byte[:, None]
    t0, t1, t2, t3 = _word(table, 0), _word(table, 1), _word(table, 2), _word(table, 3)
    sums: tl.constexpr = tl.int32 if FLOATS == tl.int8 else tl.float32
    total = tl.zeros((ROWS, COLUMNS), sums)
    for g in range(0, groups):
        a_low = tl.load(a_at + g * 64, mask=(m < M)[:, None], other=0)
        a_high = tl.load(a_at + g * 64 + 32, mask=(m < M)[:, None], other=0)
        b = tl.load(b_at + g * 32, mask=(n < N)[None, :], other=0)
        scale = _scales(weight_scale, g, n, N, PER)
        low, high = _levels(b, t0, t1, t2, t3, PTX)
        low = ((low * scale + 64) >> 7).to(FLOATS)
        high = ((high * scale + 64) >> 7).to(FLOATS)
        if FLOATS == tl.int8:
            total = tl.dot(a_low, low, total, out_dtype=tl.int32)
            total = tl.dot(a_high, high, total, out_dtype=tl.int32)
        else:
            total = tl.dot(a_low.to(FLOATS), low, total, input_precision="ieee")
            total = tl.dot(a_high.to(FLOATS), high, total, input_precision="ieee")
    y = total.to(tl.float32) * tl.load(ascales + m, mask=m < M, other=0.0)[:, None]
    y *= tl.load(channel_scale + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
    if RANK:
        y += _low_rank(h, up, m, n, M, N, R, R, RANK)
    if BIAS:
        y += tl.load(bias + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
    at = out + m.to(tl.int64)[:, None] * N + n[None, :]
    tl.store(at, y.to(out.dtype.element_ty), mask=(m < M)[:, None] & (n < N)[None, :])
