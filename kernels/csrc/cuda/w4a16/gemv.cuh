// x . ((W - 8) * scale + zeros)^T for one to four tokens at a time, in float32 throughout: bound by
// reading the weight once.
//
// A warp computes 8 outputs. Its lanes read 16 bytes of each of 8 rows, 32 neighbouring codes, so a
// step covers 1024 columns and has 4 KB under way; the scales of 8 neighbouring outputs are one
// more 16-byte load. x lies in shared memory as float32, in the order in which the lanes read it
// without bank conflicts. A nibble becomes a float by one logic operation and one addition, both
// exact.
//
// FLUX's modulation, M = 1, K = 3072, N = 18432: 28 MB of codes and 3.5 MB of scales and zeros
// are 10.5 us at 3 TB/s (H100), 32 us at 1 TB/s (RTX 4090), 88 us at 360 GB/s (RTX 3060). 2304
// warps, 17 a multiprocessor of an H100, all live at once: 70 KB under way on each. Three
// instructions a code are 6, 4 and 29 us of arithmetic beside that. For more tokens the matrix unit
// is better where it can be used (gemm.cuh). Not measured yet.
#pragma once

#include "../../nibble.h"
#include "../primitives.cuh"

namespace nibble::cuda {

constexpr int GEMV_OUTPUTS = 8;         // a warp
constexpr int GEMV_WARPS = 4;           // a block
constexpr int GEMV_STEP = 1024;         // columns that a warp reads at once
constexpr int GEMV_SHARED = 32 * 1024;  // bytes of x at most

// What a lane reads for one step: 32 codes of each output, and the scales and zeros of all, as
// pairs of outputs.
struct Codes8 {
    uint32_t words[GEMV_OUTPUTS][4];
};
struct Scales8 {
    uint32_t scales[GEMV_OUTPUTS / 2], zeros[GEMV_OUTPUTS / 2];
};

template <class P>
NIBBLE_DEVICE void load_pairs(uint32_t (&pairs)[GEMV_OUTPUTS / 2], const void* values,
                              int64_t group, int64_t first, int64_t N) {
    const P* from = static_cast<const P*>(values) + group * N + first;
    if (N % 8 == 0) {
        const uint4 four = *reinterpret_cast<const uint4*>(from);
        pairs[0] = four.x, pairs[1] = four.y, pairs[2] = four.z, pairs[3] = four.w;
    } else {
#pragma unroll
        for (int i = 0; i < GEMV_OUTPUTS; i += 2)
            pairs[i / 2] = uint32_t(first + i < N ? from[i].bits : 0) |
                           uint32_t(first + i + 1 < N ? from[i + 1].bits : 0) << 16;
    }
}

// Columns beyond K and outputs beyond N have zero scales, and any codes that can be read.
template <class P>
NIBBLE_DEVICE void load_scales(Scales8& loads, const W4A16& a, int64_t first, int64_t column) {
#pragma unroll
    for (int i = 0; i < GEMV_OUTPUTS / 2; i++) loads.scales[i] = loads.zeros[i] = 0;
    if (column < a.K && first < a.N) {
        load_pairs<P>(loads.scales, a.weight_scale, column / GROUP, first, a.N);
        if (a.weight_zeros) load_pairs<P>(loads.zeros, a.weight_zeros, column / GROUP, first, a.N);
    }
}

NIBBLE_DEVICE void load_codes(Codes8& loads, int r, const W4A16& a, int64_t first, int64_t column) {
    const int64_t row = first + r < a.N ? first + r : a.N - 1;
    const uint4 four = *reinterpret_cast<const uint4*>(
        static_cast<const char*>(a.weight) + (row * a.K + (column < a.K ? column : 0)) / 2);
    loads.words[r][0] = four.x, loads.words[r][1] = four.y, loads.words[r][2] = four.z,
    loads.words[r][3] = four.w;
}

// code - 8, exact. Under the exponent of 2^(23 - p) the digits p..p+3 of a float count ones, so
// five of a word's eight nibbles become floats where they are, and the last three after one shift.
NIBBLE_DEVICE float signed_code(uint32_t word, int nibble) {
    const int at = 4 * (nibble < 5 ? nibble : nibble - 3);
    const float one = float(1 << (23 - at));
    return as_float(int(and_or(nibble < 5 ? word : word >> 12, 15u << at, uint32_t(as_int(one))))) -
           (one + 8.0f);
}

template <class P>
NIBBLE_DEVICE float of_pair(const uint32_t (&pairs)[GEMV_OUTPUTS / 2], int r) {
    return r % 2 ? high_half<P>(pairs[r / 2]) : low_half<P>(pairs[r / 2]);
}

// Four columns more.
NIBBLE_DEVICE float dot(const float4& x, const float (&w)[4], float sum) {
    return fmaf(x.w, w[3], fmaf(x.z, w[2], fmaf(x.y, w[1], fmaf(x.x, w[0], sum))));
}

// y += the lane's 32 columns, and the codes of the step at `next_column` are requested: of four
// outputs as soon as their registers are free, so that they are under way while the others are
// computed. Four outputs share a read of x: 32 instructions a lane for 4 cycles of shared memory.
// The scale comes after the sum. x: eight pieces of 4 columns, 128 floats apart; tokens 1024 floats
// apart.
template <class P, int TOKENS>
NIBBLE_DEVICE void step(float (&y)[TOKENS][GEMV_OUTPUTS], Codes8& codes, const Scales8& scales,
                        const float* x, const W4A16& a, int64_t first, int64_t next_column,
                        bool more) {
    float x_sum[TOKENS] = {};
#pragma unroll
    for (int begin = 0; begin < GEMV_OUTPUTS; begin += 4) {
        float sums[TOKENS][4] = {};
#pragma unroll
        for (int piece = 0; piece < 8; piece++) {
            sync_warp();  // or the compiler reads all pieces ahead and runs out of registers
            float4 four[TOKENS];
#pragma unroll
            for (int m = 0; m < TOKENS; m++) {
                four[m] = *reinterpret_cast<const float4*>(x + m * GEMV_STEP + piece * 128);
                if (begin == 0) x_sum[m] += (four[m].x + four[m].y) + (four[m].z + four[m].w);
            }
#pragma unroll
            for (int r = 0; r < 4; r++) {
                float w[4];
#pragma unroll
                for (int j = 0; j < 4; j++)
                    w[j] = signed_code(codes.words[begin + r][piece / 2], 4 * (piece % 2) + j);
#pragma unroll
                for (int m = 0; m < TOKENS; m++) sums[m][r] = dot(four[m], w, sums[m][r]);
            }
        }
        if (more) {
#pragma unroll
            for (int r = begin; r < begin + 4; r++) load_codes(codes, r, a, first, next_column);
        }
#pragma unroll
        for (int r = begin; r < begin + 4; r++) {
#pragma unroll
            for (int m = 0; m < TOKENS; m++)
                y[m][r] = fmaf(of_pair<P>(scales.scales, r), sums[m][r - begin],
                               fmaf(of_pair<P>(scales.zeros, r), x_sum[m], y[m][r]));
        }
    }
}

// Columns [from, to) of TOKENS tokens as float32, zeros beyond the last token and column: 1024
// columns, 8 pieces, 32 lanes, 4 columns.
template <class X, int TOKENS, class Op>
NIBBLE_DEVICE void stage_x(float* shared, const Op& a, int64_t first_token, int64_t from,
                           int64_t to) {
    const int steps = int(to - from + GEMV_STEP - 1) / GEMV_STEP;
    for (int i = int(threadIdx.x); i < steps * TOKENS * (GEMV_STEP / 4); i += 32 * GEMV_WARPS) {
        const int quad = i % (GEMV_STEP / 4), token = i / (GEMV_STEP / 4) % TOKENS,
                  step = i / (GEMV_STEP / 4) / TOKENS;
        const int64_t column = from + step * GEMV_STEP + quad * 4;
        float4 four = {0, 0, 0, 0};
        if (column < to && first_token + token < a.M) {
            const X* x = static_cast<const X*>(a.x) + (first_token + token) * a.K + column;
            if constexpr (sizeof(X) == 4) {
                four = *reinterpret_cast<const float4*>(x);
            } else {
                const uint2 two = *reinterpret_cast<const uint2*>(x);
                four = {low_half<X>(two.x), high_half<X>(two.x), low_half<X>(two.y),
                        high_half<X>(two.y)};
            }
        }
        // Lane quad / 8 reads it as its piece quad % 8.
        *reinterpret_cast<float4*>(shared + (step * TOKENS + token) * GEMV_STEP + quad % 8 * 128 +
                                   quad / 8 * 4) = four;
    }
}

// One token leaves room for five blocks: all of FLUX's modulation is under way at once.
template <class X, class P, int TOKENS>
__global__ void __launch_bounds__(32 * GEMV_WARPS, TOKENS == 1 ? 5 : 3)
    gemv_kernel(const W4A16 a, const int token_blocks) {
    constexpr int64_t SPAN = GEMV_SHARED / 4 / TOKENS;  // columns of x in shared memory
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    // Neighbouring blocks read the same weights for other tokens: once from DRAM.
    const int64_t first = (int64_t(blockIdx.x) / token_blocks * GEMV_WARPS + warp) * GEMV_OUTPUTS;
    const int64_t first_token = int64_t(blockIdx.x) % token_blocks * TOKENS;
    float* shared = reinterpret_cast<float*>(dynamic_shared());
    float y[TOKENS][GEMV_OUTPUTS] = {};
    Codes8 codes = {};
    Scales8 scales;
    load_scales<P>(scales, a, first, 32 * lane);
#pragma unroll
    for (int r = 0; r < GEMV_OUTPUTS; r++)
        if (a.K) load_codes(codes, r, a, first, 32 * lane);
    for (int64_t from = 0; from < a.K; from += SPAN) {
        const int64_t to = from + SPAN < a.K ? from + SPAN : a.K;
        if (from) sync_block();  // all warps have read what is there
        stage_x<X, TOKENS>(shared, a, first_token, from, to);
        sync_block();
        for (int64_t k = from; k < to; k += GEMV_STEP) {
            const int64_t next = k + GEMV_STEP;
            step<P, TOKENS>(y, codes, scales, shared + (k - from) * TOKENS + 4 * lane, a, first,
                            next + 32 * lane, next < a.K);
            load_scales<P>(scales, a, first, next + 32 * lane);
        }
    }
    // Sum over the lanes, halving what each keeps: lanes 4r..4r+3 end with output r.
#pragma unroll
    for (int m = 0; m < TOKENS; m++) {
#pragma unroll
        for (int keep = GEMV_OUTPUTS / 2, mask = 16; keep; keep /= 2, mask /= 2)
#pragma unroll
            for (int i = 0; i < keep; i++) {
                const bool upper = lane & mask;
                const float other = shuffle_xor(upper ? y[m][i] : y[m][i + keep], mask);
                y[m][i] = (upper ? y[m][i + keep] : y[m][i]) + other;
            }
        float sum = y[m][0];
        sum += shuffle_xor(sum, 2);
        sum += shuffle_xor(sum, 1);
        const int64_t n = first + lane / 4, token = first_token + m;
        if (lane % 4 == 0 && n < a.N && token < a.M) {
            if (a.bias) sum += to_float(static_cast<const P*>(a.bias)[n]);
            static_cast<X*>(a.out)[token * a.N + n] = from_float<X>(sum);
        }
    }
}

}  // namespace nibble::cuda
