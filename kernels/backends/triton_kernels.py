"""The W4A4 product and its quantizer in Triton: two kernels.

    quantize_down   x -> int4 codes, a scale per token and group, h = x . proj_down
    gemm_up         out = sum_g (codes . W4^T)_g * ascales_g * weight_scale_g + h . proj_up^T + bias
                                                     SVDQuant, arXiv 2411.05007, eq. 3 and 9

Codes lie two to a byte, the even column low; those of 8 bits (WIDE) a byte each. Triton has no int4
product, but 8-bit ones: the even and the odd columns of a group of 64 are two products of 32, in
which nothing has to be interleaved, since a sum over k may be taken in any order. A signed code of
4 bits travels as 16 * code (its nibble in a byte's upper half, one or two instructions for four
codes), and the scale takes the 16 back.

PTX says how bytes come apart: by inline assembly, four codes in a register, or by Triton's own
shifts, for Triton's interpreter and GPUs of other makes. FLOATS multiplies the codes,
exact in bfloat16, as floats: for GPUs without 8-bit integer products worth the name.

Imported by `triton.w4a4` alone, where Triton is installed.
"""

import triton
import triton.language as tl

ROUND = tl.constexpr(12582912.0)
"""1.5 * 2^23: a float between -2^22 and 2^22, added to it, is rounded half to even, and an integer
added to its bits is an integer added to it."""
ROUND_BITS = tl.constexpr(0x4B400000)
TINY = tl.constexpr(1.1754943508222875e-38)
"""The smallest normal number, which divides a group of zeros."""
SHIFT = tl.constexpr(0.171875)
EXPONENT = tl.constexpr(0x7F800000)
"""The bits of a float's exponent, and infinity."""
LOW_SIGNED = tl.constexpr("{ .reg .b32 t; shl.b32 t, $1, 4; and.b32 $0, t, 0xF0F0F0F0; }")
LOW_UNSIGNED = tl.constexpr("and.b32 $0, $1, 0x0F0F0F0F;")
HIGH_SIGNED = tl.constexpr("and.b32 $0, $1, 0xF0F0F0F0;")
HIGH_UNSIGNED = tl.constexpr("{ .reg .b32 t; shr.u32 t, $1, 4; and.b32 $0, t, 0x0F0F0F0F; }")
"""PTX: the nibbles of four bytes as four bytes, 16 * code where codes are signed, else the code."""


# ---- quantize_down -------------------------------------------------------------------------------


@triton.jit
def _upper(v):
    """A float32 cut to the 8 bits of a bfloat16."""
    return (v.to(tl.int32, bitcast=True) & -65536).to(tl.float32, bitcast=True)


@triton.jit
def _exact_dot(v, w, total, PARTS: tl.constexpr, FLOATS: tl.constexpr):
    """total + v . w of float32 v and w, by products in FLOATS: a float32 is the sum of three
    bfloat16, and w that of PARTS.
    """
    for _ in tl.static_range(3):
        part = _upper(v)
        v -= part
        rest = w
        for _ in tl.static_range(PARTS):
            other = _upper(rest)
            rest -= other
            total = tl.dot(part.to(FLOATS), other.to(FLOATS), total, input_precision="ieee")
    return total


@triton.jit
def _hadamard(v, FLOATS: tl.constexpr):
    """v (rows, 64) times the 64-point Hadamard matrix, H[i, j] = (-1)^popcount(i & j) / 8."""
    i = tl.arange(0, 64)
    bits = i[:, None] & i[None, :]
    bits ^= bits >> 4
    bits ^= bits >> 2
    bits ^= bits >> 1
    matrix = 0.125 - 0.25 * (bits & 1).to(tl.float32)
    return _exact_dot(v, matrix, tl.zeros(v.shape, tl.float32), 1, FLOATS)


@triton.jit
def _scale(v, UNSIGNED: tl.constexpr, STEPS: tl.constexpr):
    """Of each group v (rows, 64): the largest number, or the largest magnitude, / STEPS, by its
    bits, which order as the numbers do and put NaN above all.
    """
    bits = v.to(tl.int32, bitcast=True)
    magnitude = bits & 0x7FFFFFFF
    if UNSIGNED:
        magnitude = tl.where((bits < 0) & (magnitude <= EXPONENT), 0, magnitude)
    top = tl.max(magnitude, 1).to(tl.float32, bitcast=True)
    return tl.div_rn(top, tl.full(top.shape, STEPS, tl.float32))


@triton.jit
def _codes(v, scale, UNSIGNED: tl.constexpr, ROWS: tl.constexpr):
    """Integers (ROWS, 64), of which the lowest bits are the codes."""
    safe = tl.where(scale < TINY, TINY, scale)
    c = tl.div_rn(v, safe[:, None].broadcast_to(ROWS, 64))
    c = tl.where(c == c, c, 0.0)
    if UNSIGNED:
        c = tl.maximum(c, 0.0)
    return (c + ROUND).to(tl.int32, bitcast=True)


@triton.jit
def _quantize_group(  # noqa: PLR0913 - what a kernel has at hand
    xv,
    smooth,
    q,
    ascales,
    g,
    rows,
    M,
    groups,
    SHIFTED: tl.constexpr,
    ROTATE: tl.constexpr,
    FLOATS: tl.constexpr,
    ROWS: tl.constexpr,
    WIDE: tl.constexpr,
):
    """The codes and scales of group g, stored; xv: its columns of x. SHIFTED: unsigned codes, or
    of 8 bits, which hold both signs, the shift alone.
    """
    unsigned: tl.constexpr = SHIFTED and not WIDE
    steps: tl.constexpr = 127.0 if WIDE else (15.0 if SHIFTED else 7.0)
    v = xv.to(tl.float32)
    if SHIFTED:
        v += SHIFT
    k = g * 64 + tl.arange(0, 64)
    v = tl.div_rn(v, tl.load(smooth + k).to(tl.float32)[None, :].broadcast_to(ROWS, 64))
    if ROTATE:
        v = _hadamard(v, FLOATS)
    scale = _scale(v, unsigned, steps)
    c = _codes(v, scale, unsigned, ROWS)
    if WIDE:
        at = q + rows.to(tl.int64)[:, None] * (groups * 64) + k[None, :]
        tl.store(at, c.to(tl.int8), mask=(rows < M)[:, None])
    else:
        even, odd = tl.split(tl.reshape(c & 15, (ROWS, 32, 2)))
        at = q + rows.to(tl.int64)[:, None] * (groups * 32) + (g * 32 + tl.arange(0, 32))[None, :]
        tl.store(at, (even | (odd << 4)).to(tl.int8), mask=(rows < M)[:, None])
    tl.store(ascales + g * M + rows, scale, mask=rows < M)


@triton.jit(do_not_specialize=["M", "groups", "turn"])
def quantize_down(  # noqa: PLR0913 - a kernel's arguments
    x,
    smooth,
    down,
    q,
    ascales,
    h,
    M,
    groups,
    turn,
    stride,
    R,
    SIGNED: tl.constexpr,
    UNSIGNED: tl.constexpr,
    ROTATE: tl.constexpr,
    FLOATS: tl.constexpr,
    PARTS: tl.constexpr,
    RANK: tl.constexpr,
    ROWS: tl.constexpr,
    WIDE: tl.constexpr,
):
    """x (M, 64 * groups), rows `stride` apart · smooth (64 * groups,) · down (64 * groups, R)
    -> q int8 (M, 32 * groups), WIDE (M, 64 * groups) · ascales float32 (groups, M) · h float32
    (M, R)

    Groups before `turn` have signed codes and those from it on unsigned ones; SIGNED, UNSIGNED:
    whether there are such groups.

    A program does ROWS tokens and RANK columns of h; the first column of programs quantizes. RANK
    is a power of two, or 0 for no h. PARTS: of how many bfloat16 each number of `down` is the sum;
    0 where it has x's dtype, in which the two are multiplied as they are.
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
            if SIGNED:
                if g < turn:
                    _quantize_group(
                        xv, smooth, q, ascales, g, rows, M, groups,
                        False, ROTATE, FLOATS, ROWS, WIDE
                    )  # fmt: skip
            if UNSIGNED:
                if g >= turn:
                    _quantize_group(
                        xv, smooth, q, ascales, g, rows, M, groups, True, ROTATE, FLOATS, ROWS, WIDE
                    )
    if RANK:
        tl.store(h + wide * R + r[None, :], total, mask=mask & (r < R)[None, :])


# ---- gemm_up -------------------------------------------------------------------------------------


@triton.jit
def _four(b, CODE: tl.constexpr):
    """Bytes through instructions that take four at once."""
    return tl.inline_asm_elementwise(CODE, "=r,r", [b], dtype=tl.int8, is_pure=True, pack=4)


@triton.jit
def _low(b, SIGNED: tl.constexpr, PTX: tl.constexpr):
    """The lower nibbles of bytes, as int8: 16 * code where codes are signed, else the code."""
    if PTX:
        if SIGNED:
            code = _four(b, LOW_SIGNED)
        else:
            code = _four(b, LOW_UNSIGNED)
    else:
        if SIGNED:
            code = (b << 4).to(tl.int8)
        else:
            code = (b & 15).to(tl.int8)
    return code


@triton.jit
def _high(b, SIGNED: tl.constexpr, PTX: tl.constexpr):
    """The upper nibbles, in the same form."""
    if PTX:
        if SIGNED:
            code = _four(b, HIGH_SIGNED)
        else:
            code = _four(b, HIGH_UNSIGNED)
    else:
        if SIGNED:
            code = (b & -16).to(tl.int8)
        else:
            code = ((b >> 4) & 15).to(tl.int8)
    return code


@triton.jit
def _low_rank(h, up, m, n, M, N, R, stride, RANK: tl.constexpr):
    """h (M, R) . up (N, R)^T for a tile, as a float32 product: a row of h, divided by the power of
    two below its largest number, is two 16-bit numbers, the second what the first leaves over.
    """
    r = tl.arange(0, RANK)
    rows, columns = h + m.to(tl.int64)[:, None] * stride, up + n.to(tl.int64)[:, None] * R
    largest = tl.zeros((m.shape[0],), tl.int32)
    for start in range(0, R, RANK):
        inside = (m < M)[:, None] & (start + r < R)[None, :]
        part = tl.load(rows + (start + r)[None, :], mask=inside, other=0.0)
        largest = tl.maximum(largest, tl.max(part.to(tl.int32, bitcast=True) & 0x7FFFFFFF, 1))
    power = largest & EXPONENT
    power = tl.where((power == 0) | (power >= 0x7E800000), 0x3F800000, power)
    inverse = (0x7F000000 - power).to(tl.float32, bitcast=True)
    total = tl.zeros((m.shape[0], n.shape[0]), tl.float32)
    for start in range(0, R, RANK):
        inside = (start + r < R)[None, :]
        part = tl.load(rows + (start + r)[None, :], mask=(m < M)[:, None] & inside, other=0.0)
        part *= inverse[:, None]
        u = tl.load(columns + (start + r)[None, :], mask=(n < N)[:, None] & inside, other=0.0)
        first = part.to(u.dtype)
        total = tl.dot(first, tl.trans(u), total, input_precision="ieee")
        if u.dtype != tl.float32:
            rest = (part - first.to(tl.float32)).to(u.dtype)
            total = tl.dot(rest, tl.trans(u), total, input_precision="ieee")
    return total * power.to(tl.float32, bitcast=True)[:, None]


@triton.jit
def _group(a_low, a_high, b, PTX: tl.constexpr, MAGIC: tl.constexpr, FLOATS: tl.constexpr):
    """The product of a group's codes as float32, times 16 for b and whatever a_low and a_high are
    multiplied by. MAGIC: the integer sum starts at ROUND's bits, so that a subtraction makes it a
    float.
    """
    b_low, b_high = _low(b, True, PTX), _high(b, True, PTX)
    if FLOATS != tl.int8:
        product = tl.dot(a_low.to(FLOATS), b_low.to(FLOATS), input_precision="ieee")
        product = tl.dot(a_high.to(FLOATS), b_high.to(FLOATS), product, input_precision="ieee")
    elif MAGIC:
        integer = tl.full((a_low.shape[0], b.shape[1]), ROUND_BITS, tl.int32)
        integer = tl.dot(a_low, b_low, integer, out_dtype=tl.int32)
        integer = tl.dot(a_high, b_high, integer, out_dtype=tl.int32)
        product = integer.to(tl.float32, bitcast=True) - ROUND
    else:
        integer = tl.dot(a_low, b_low, out_dtype=tl.int32)
        product = tl.dot(a_high, b_high, integer, out_dtype=tl.int32).to(tl.float32)
    return product


@triton.jit
def _add_group(  # noqa: PLR0913 - what a kernel has at hand
    total,
    a_at,
    b_at,
    ascales,
    weight_scale,
    g,
    m,
    n,
    M,
    N,
    UNSIGNED: tl.constexpr,
    PTX: tl.constexpr,
    MAGIC: tl.constexpr,
    FLOATS: tl.constexpr,
    WIDE: tl.constexpr,
):
    """total + the product of group g, with its scales."""
    sixteens: tl.constexpr = 1.0 / 16 if UNSIGNED or WIDE else 1.0 / 256
    if WIDE:
        a = tl.load(a_at + g * 64, mask=(m < M)[:, None], other=0)
        a_low, a_high = tl.split(tl.reshape(a, (m.shape[0], 32, 2)))
    else:
        a = tl.load(a_at + g * 32, mask=(m < M)[:, None], other=0)
        a_low, a_high = _low(a, not UNSIGNED, PTX), _high(a, not UNSIGNED, PTX)
    b = tl.load(b_at + g * 32, mask=(n < N)[None, :], other=0)
    product = _group(a_low, a_high, b, PTX, MAGIC, FLOATS)
    sa = tl.load(ascales + g * M + m, mask=m < M, other=0.0)
    sb = tl.load(weight_scale + g * N + n, mask=n < N, other=0.0).to(tl.float32) * sixteens
    return total + product * sa[:, None] * sb[None, :]


@triton.jit(do_not_specialize=["M", "groups", "turn"])
def gemm_up(  # noqa: PLR0913 - a kernel's arguments
    q,
    ascales,
    h,
    weight,
    weight_scale,
    up,
    bias,
    out,
    M,
    N,
    groups,
    turn,
    R,
    stride,
    SIGNED: tl.constexpr,
    UNSIGNED: tl.constexpr,
    BIAS: tl.constexpr,
    RANK: tl.constexpr,
    FLOATS: tl.constexpr,
    PTX: tl.constexpr,
    MAGIC: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    STRIPE: tl.constexpr,
    WIDE: tl.constexpr,
):
    """q int8 (M, 32 * groups), WIDE (M, 64 * groups) · ascales float32 (groups, M) · h float32
    (M, R), rows `stride` apart · weight int8 (N, 32 * groups) · weight_scale (groups, N) ·
    up (N, R) · bias (N,)
    -> out (M, N)

    Codes before group `turn` are signed, the others unsigned, as in `quantize_down`. A program does
    a tile of ROWS x COLUMNS. Neighbouring programs share STRIPE tiles of rows, so that what they
    read twice is still in the L2 cache. RANK: columns of h at once, a power of two, or 0 for no
    low-rank branch. FLOATS: tl.int8, or the dtype that codes are multiplied in.
    """
    number = tl.program_id(0)
    width = STRIPE * tl.cdiv(N, COLUMNS)
    first = number // width * STRIPE
    height = tl.minimum(tl.cdiv(M, ROWS) - first, STRIPE)
    m = (first + number % width % height) * ROWS + tl.arange(0, ROWS)
    n = number % width // height * COLUMNS + tl.arange(0, COLUMNS)
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    if RANK:
        total = _low_rank(h, up, m, n, M, N, R, stride, RANK)
    if BIAS:
        total += tl.load(bias + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
    byte = tl.arange(0, 32)
    if WIDE:
        a_at = q + m.to(tl.int64)[:, None] * (groups * 64) + tl.arange(0, 64)[None, :]
    else:
        a_at = q + m.to(tl.int64)[:, None] * (groups * 32) + byte[None, :]
    b_at = weight + n.to(tl.int64)[None, :] * (groups * 32) + byte[:, None]
    if SIGNED:
        for g in range(0, turn):
            total = _add_group(
                total, a_at, b_at, ascales, weight_scale, g, m, n, M,
                N, False, PTX, MAGIC, FLOATS, WIDE
            )  # fmt: skip
    if UNSIGNED:
        for g in range(turn, groups):
            total = _add_group(
                total, a_at, b_at, ascales, weight_scale, g, m, n, M,
                N, True, PTX, MAGIC, FLOATS, WIDE
            )  # fmt: skip
    at = out + m.to(tl.int64)[:, None] * N + n[None, :]
    tl.store(at, total.to(out.dtype.element_ty), mask=(m < M)[:, None] & (n < N)[None, :])
