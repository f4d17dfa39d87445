"""The kernel of codebook linears in Triton: see `triton_vq`.

    y = (x . codebook[index]^T) * scale + bias + addend      VQ4DiT, arXiv 2408.17131, eq. 2

A codeword of D columns in 16 bits is read as one integer, and so are the D columns of x that meet
it: so a product is the sum over e = 0..D-1 of products of every D-th column, and neither operand
has to be put in another order. The codebook is at most 4 KB and stays in the L1 cache.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _indices(indices, n, i, N, words, BITS: tl.constexpr):
    """Indices i of rows n, int32 (i, n): of at most 8 bits, so they lie in two bytes."""
    row = words * BITS // 8
    byte = i * BITS // 8
    at = indices + n.to(tl.int64)[None, :] * row + byte[:, None]
    mask = (i < words)[:, None] & (n < N)[None, :]
    found = tl.load(at, mask=mask, other=0).to(tl.int32)
    if 8 % BITS:
        after = tl.load(at + 1, mask=mask & (byte + 1 < row)[:, None], other=0).to(tl.int32)
        found |= after << 8
    return (found >> (i * BITS % 8)[:, None]) & ((1 << BITS) - 1)


@triton.jit
def _column(word, e: tl.constexpr, KIND: tl.constexpr):
    """Of integers that hold columns of 16 bits each, column e as floats."""
    return (word >> (16 * e)).to(tl.int16).to(KIND, bitcast=True)


@triton.jit(do_not_specialize=["M"])
def gemm_vq(  # noqa: PLR0913 - a kernel's arguments
    x,
    indices,
    codebook,
    scale,
    bias,
    addend,
    out,
    M,
    N,
    words,
    stride,
    BITS: tl.constexpr,
    D: tl.constexpr,
    WHOLE: tl.constexpr,
    KIND: tl.constexpr,
    SCALE: tl.constexpr,
    BIAS: tl.constexpr,
    ADDEND: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    STEP: tl.constexpr,
    STRIPE: tl.constexpr,
):
    """x (M, D * words), rows `stride` apart, KIND; with WHOLE as integers of D columns, and
    `stride` in those · indices uint8 (N, words * BITS / 8) · codebook, integers of D columns in
    float16 · scale, bias (N,) · addend (M, N) -> out (M, N)

    A program does a tile of ROWS x COLUMNS, STEP codewords of each row at a time. STRIPE as in
    `triton_kernels.gemm_up`.
    """
    number = tl.program_id(0)
    width = STRIPE * tl.cdiv(N, COLUMNS)
    first = number // width * STRIPE
    height = tl.minimum(tl.cdiv(M, ROWS) - first, STRIPE)
    m = (first + number % width % height) * ROWS + tl.arange(0, ROWS)
    n = number % width // height * COLUMNS + tl.arange(0, COLUMNS)
    x_row = x + m.to(tl.int64)[:, None] * stride
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(0, words, STEP):
        i = start + tl.arange(0, STEP)
        index = _indices(indices, n, i, N, words, BITS)
        # where there is none a codeword of zeros: another's might not be finite
        word = tl.load(codebook + index, mask=(i < words)[:, None] & (n < N)[None, :], other=0)
        here = (m < M)[:, None] & (i < words)[None, :]
        if WHOLE:
            many = tl.load(x_row + i[None, :], mask=here, other=0)
        for e in tl.static_range(D):
            if WHOLE:
                left = _column(many, e, KIND)
            else:
                left = tl.load(x_row + (i * D + e)[None, :], mask=here, other=0.0)
            right = _column(word, e, tl.float16).to(KIND)
            total = tl.dot(left, right, total, input_precision="ieee")
    if SCALE:
        total *= tl.load(scale + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
    if BIAS:
        total += tl.load(bias + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
    at = m.to(tl.int64)[:, None] * N + n[None, :]
    mask = (m < M)[:, None] & (n < N)[None, :]
    if ADDEND:
        total += tl.load(addend + at, mask=mask, other=0.0).to(tl.float32)
    tl.store(out + at, total.to(out.dtype.element_ty), mask=mask)
