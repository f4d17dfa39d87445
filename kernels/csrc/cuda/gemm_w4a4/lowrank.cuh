// What the accumulators start from: h . proj_up^T + bias.
//
// Operands come straight from global memory into fragments. They are small (R is 32 or so), several
// warps share them through the L1 cache, and no shared memory means that the main loop's first
// copies are under way meanwhile.
#pragma once

#include "../../nibble.h"
#include "tile.cuh"
#include "../primitives.cuh"

namespace nibble::cuda {

template <class T>
constexpr Dtype dtype_of();
template <>
constexpr Dtype dtype_of<float>() {
    return Dtype::f32;
}
template <>
constexpr Dtype dtype_of<f16>() {
    return Dtype::f16;
}
template <>
constexpr Dtype dtype_of<bf16>() {
    return Dtype::bf16;
}

// The power of two that makes a row's largest number less than 2 when it divides (0, infinity and
// NaN stay what they are).
NIBBLE_DEVICE float power_below(float largest) {
    const int exponent = as_int(largest) >> 23;
    return exponent > 0 && exponent < 253 ? as_float(exponent << 23)
                                          : 1.f;  // else the inverse would not be a normal number
}
NIBBLE_DEVICE float inverse_of_power(float power) { return as_float(0x7F000000 - as_int(power)); }

// That of one row of R numbers, found by the four lanes of one t together.
template <class T>
NIBBLE_DEVICE float power_of_row(const T* row, int R, int t) {
    float largest = 0;
#pragma unroll 1
    for (int k = t; k < R; k += 4) largest = fmaxf(largest, fabsf(to_float(row[k])));
    largest = fmaxf(largest, shuffle_xor(largest, 1));
    return power_below(fmaxf(largest, shuffle_xor(largest, 2)));
}

struct Pair {
    float first, second;
};
// row[k], row[k + 1], zero from R on. `even` says that rows begin at multiples of two elements, so
// that one load fetches both.
NIBBLE_DEVICE Pair pair_of(const float* row, int k, int R, bool even) {
    if (even && k + 1 < R) {
        const float2 both = *reinterpret_cast<const float2*>(row + k);
        return {both.x, both.y};
    }
    return {k < R ? row[k] : 0.f, k + 1 < R ? row[k + 1] : 0.f};
}
template <class T>
NIBBLE_DEVICE uint32_t bits_of(const T* row, int k, int R, bool even) {
    if (even && k + 1 < R) return *reinterpret_cast<const uint32_t*>(row + k);
    return uint32_t(k < R ? row[k].bits : 0) | uint32_t(k + 1 < R ? row[k + 1].bits : 0) << 16;
}

// A lane's part of the operands. Its rows of h follow one another, and so do its columns, those of
// its sums and every second one of B's fragments; so one address of each is kept. What lies outside
// of the matrix counts as a row of R = 0 numbers.
template <class Tp, class Tile>
struct Share {
    const float* h;  // the lane's first row
    const Tp *operand,
        *up;         // rows of proj_up: column g of the first product, and the lane's first sum
    const Tp* bias;  // of the lane's first sum
    int h_stride, R, rows, operands, columns,
        t;  // rows, operands, columns: how many of the matrix follow, from the lane's first on

    NIBBLE_DEVICE Share(const GemmW4A4Up& op, Corner corner, int thread)
        : h_stride(int(op.h_stride)), R(int(op.R)), t(thread % 4) {
        const int g = thread / 4 % 8;
        const int64_t row = corner.row + Tile::first_row(thread) + Tile::row_of(g, 0, 0),
                      left = corner.column + Tile::first_column(thread);
        const int64_t column_of_operand = left + Tile::column_of(g / 2, 0, g % 2),
                      column = left + Tile::column_of(t, 0, 0);
        rows = int(op.M - row), operands = int(op.N - column_of_operand),
        columns = int(op.N - column);
        h = op.h + row * op.h_stride;
        operand = static_cast<const Tp*>(op.proj_up) + column_of_operand * op.R;
        up = static_cast<const Tp*>(op.proj_up) + column * op.R;
        bias = op.bias ? static_cast<const Tp*>(op.bias) + column : nullptr;
    }
    NIBBLE_DEVICE int length_of_row(int r) const { return r < rows ? R : 0; }
    NIBBLE_DEVICE int length_of_operand(int j) const { return 2 * j < operands ? R : 0; }
};

// By matrix units: h is rounded to the parameters' dtype, as the layer's output will be.
//
// float16 cannot hold every h (an outlier may pass 65504) nor, on Turing, every bfloat16 proj_up.
// So rows of h, and there rows of proj_up too, are first divided by a power of two near their
// largest element, and the sums multiplied by it: exact, whatever h is.
template <class Mma, class Tp, class Tile>
NIBBLE_DEVICE void low_rank_by_mma(float (&sums)[Tile::MT][Tile::NT][4],
                                   const Share<Tp, Tile>& at) {
    using Operand = pick<Mma::BFLOAT16, Tp, f16>;
    constexpr bool SCALE_H = same<Operand, f16>, SCALE_UP = !same<Operand, Tp>;
    const int R = at.R;
    const bool even_h = at.h_stride % 2 == 0, even_up = R % 2 == 0;

    float of_row[Tile::MT][2], of_column[Tile::NT];
    if constexpr (SCALE_H)
#pragma unroll
        for (int i = 0; i < Tile::MT; i++)
#pragma unroll
            for (int half = 0; half < 2; half++)
                of_row[i][half] = power_of_row(at.h + (2 * i + half) * at.h_stride,
                                               at.length_of_row(2 * i + half), at.t);
    if constexpr (SCALE_UP)
#pragma unroll
        for (int j = 0; j < Tile::NT; j++)
            of_column[j] = power_of_row(at.operand + 2 * j * R, at.length_of_operand(j), at.t);

#pragma unroll 1
    for (int first = 0; first < R; first += 16) {
        const int r = first + 2 * at.t;
        uint32_t b[Tile::NT][2];
#pragma unroll
        for (int j = 0; j < Tile::NT; j++)
#pragma unroll
            for (int half = 0; half < 2; half++) {
                b[j][half] =
                    bits_of(at.operand + 2 * j * R, r + 8 * half, at.length_of_operand(j), even_up);
                if constexpr (SCALE_UP) {
                    const float unit = inverse_of_power(of_column[j]);
                    b[j][half] = pack2<f16>(low_half<Tp>(b[j][half]) * unit,
                                            high_half<Tp>(b[j][half]) * unit);
                }
            }
#pragma unroll
        for (int i = 0; i < Tile::MT; i++) {
            uint32_t a[4];
#pragma unroll
            for (int part = 0; part < 4; part++) {  // registers of A: the row's half changes first
                const int row = 2 * i + part % 2;
                const Pair h = pair_of(at.h + row * at.h_stride, r + 8 * (part / 2),
                                       at.length_of_row(row), even_h);
                const float unit = SCALE_H ? inverse_of_power(of_row[i][part % 2]) : 1.f;
                a[part] = pack2<Operand>(h.first * unit, h.second * unit);
            }
            sync_warp();  // lanes part ways at the edges above; and a fence for the compiler, as in
                          // the main loop
#pragma unroll
            for (int j = 0; j < Tile::NT; j++) mma_16bit<Operand>(sums[i][j], a, b[j]);
        }
    }
    if constexpr (SCALE_H || SCALE_UP)
#pragma unroll
        for (int j = 0; j < Tile::NT; j++) {
            // Sums are of columns 2t and 2t + 1, whose powers the lanes with g = 2t and 2t + 1
            // found.
            const float left = SCALE_UP ? shuffle(of_column[j], 8 * at.t) : 1.f;
            const float right = SCALE_UP ? shuffle(of_column[j], 8 * at.t + 4) : 1.f;
#pragma unroll
            for (int i = 0; i < Tile::MT; i++)
#pragma unroll
                for (int e = 0; e < 4; e++)
                    sums[i][j][e] *= of_row[i][e / 2] * (e % 2 ? right : left);
        }
}

// In fp32, for results of another dtype than the parameters: rounding h would be the largest error
// then.
template <class Tp, class Tile>
NIBBLE_DEVICE void low_rank_by_fma(float (&sums)[Tile::MT][Tile::NT][4],
                                   const Share<Tp, Tile>& at) {
#pragma unroll 1
    for (int r = 0; r < at.R; r++) {
        float up[Tile::NT][2];
#pragma unroll
        for (int j = 0; j < Tile::NT; j++)
#pragma unroll
            for (int n = 0; n < 2; n++)
                up[j][n] = 2 * j + n < at.columns ? to_float(at.up[(2 * j + n) * at.R + r]) : 0.f;
#pragma unroll
        for (int i = 0; i < Tile::MT; i++)
#pragma unroll
            for (int half = 0; half < 2; half++) {
                const float h =
                    2 * i + half < at.rows ? at.h[(2 * i + half) * at.h_stride + r] : 0.f;
#pragma unroll
                for (int j = 0; j < Tile::NT; j++)
#pragma unroll
                    for (int n = 0; n < 2; n++)
                        sums[i][j][2 * half + n] = fmaf(h, up[j][n], sums[i][j][2 * half + n]);
            }
    }
}

template <class Tp, class Tile>
NIBBLE_DEVICE void add_bias(float (&sums)[Tile::MT][Tile::NT][4], const Share<Tp, Tile>& at) {
    if (!at.bias) return;
#pragma unroll
    for (int j = 0; j < Tile::NT; j++)
#pragma unroll
        for (int n = 0; n < 2; n++) {
            const float bias = 2 * j + n < at.columns ? to_float(at.bias[2 * j + n]) : 0.f;
#pragma unroll
            for (int i = 0; i < Tile::MT; i++)
#pragma unroll
                for (int half = 0; half < 2; half++) sums[i][j][2 * half + n] += bias;
        }
}

// sums = h . proj_up^T + bias for the warp's share.
template <class Mma, class Tp, class Tile>
NIBBLE_DEVICE void low_rank_and_bias(float (&sums)[Tile::MT][Tile::NT][4], const GemmW4A4Up& op,
                                     const Share<Tp, Tile>& at) {
#pragma unroll
    for (int i = 0; i < Tile::MT; i++)
#pragma unroll
        for (int j = 0; j < Tile::NT; j++)
#pragma unroll
            for (int e = 0; e < 4; e++) sums[i][j][e] = 0;
    if (op.out_dtype == dtype_of<Tp>())
        low_rank_by_mma<Mma, Tp, Tile>(sums, at);
    else
        low_rank_by_fma<Tp, Tile>(sums, at);
    add_bias<Tp, Tile>(sums, at);
}

}  // namespace nibble::cuda
