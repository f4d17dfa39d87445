// x . ((W - 8) * scale + zeros)^T on the matrix unit, for x in 16 bits and more than a few tokens.
//
// Codes enter the product as 16 + code, which both 16-bit floats hold exactly, and a group of 64 is
// summed before it is scaled:
//     out[m, n] += scale[n] * sum_k x (16 + code) + (zeros[n] - 24 scale[n]) * sum_k x
// So weights are never rounded and scales keep float32's range. sum_k x is one more column of the
// product, of ones.
//
// A register of the right operand holds nibbles p and p + 4 of a word of eight codes: one shift and
// one three-input logic operation. The order of k that this makes is followed by the left operand,
// whose 16-byte reads from shared memory are re-paired by byte picks: fragment s = 2i + h of lane t
// is columns 8c + {2h, 2h + 4} and 8c + {2h + 1, 2h + 5} of chunk c = 2t + i.
#pragma once

#include "../../nibble.h"
#include "../primitives.cuh"

namespace nibble::cuda {

// A block's tile and how its warps share it; bytes of shared memory for one group.
template <int WARPS_M, int WARPS_N, int TILES_M, int TILES_N, int STAGES_>
struct Tiling {
    static constexpr int M_WARPS = WARPS_M, N_WARPS = WARPS_N, M_TILES = TILES_M, N_TILES = TILES_N,
                         STAGES = STAGES_;
    static constexpr int THREADS = 32 * WARPS_M * WARPS_N, ROWS = WARPS_M * TILES_M * 16,
                         COLUMNS = WARPS_N * TILES_N * 8;
    static constexpr int X_BYTES = ROWS * GROUP * 2, STAGE_BYTES = X_BYTES + COLUMNS * GROUP / 2;
    static constexpr int SCALE_BYTES =
        COLUMNS * 8;  // (scale, offset) a column; two groups are kept
    static constexpr int SHARED = STAGES * STAGE_BYTES + 2 * SCALE_BYTES;
    static constexpr int BLOCKS = THREADS <= 128 ? 4 : 1;  // a multiprocessor, as registers allow
};

// Up to 16 tokens: narrow, so that there are many blocks, and deep, because reading the weight is
// all the work: 10 KB a block under way.
using FewTokens = Tiling<1, 4, 1, 2, 6>;
using SomeTokens = Tiling<2, 4, 2, 4, 4>;
// 62 KB: as much as Turing has.
using ManyTokens = Tiling<4, 2, 2, 8, 3>;

// Chunk c of row r of x: lanes that read together differ in t (chunks two apart) and in the lowest
// bit of the row.
NIBBLE_DEVICE int x_offset(int row, int chunk) { return row * 128 + (chunk ^ (row & 7)) * 16; }

template <class T>
NIBBLE_DEVICE uint32_t pair_of_codes(uint32_t word, int p) {
    constexpr bool HALF = same<T, f16>;
    constexpr uint32_t MASK = HALF ? 0x03C003C0u : 0x00780078u,
                       SIXTEEN = HALF ? 0x4C004C00u : 0x41804180u;
    const int up = (HALF ? 6 : 3) - 4 * p;
    return and_or(up >= 0 ? word << (up & 31) : word >> (-up & 31), MASK, SIXTEEN);
}

template <class S>
NIBBLE_DEVICE void stage(char* shared, const W4A16& a, int group, int64_t first_row,
                         int64_t first_column) {
    char* x_tile = shared + group % S::STAGES * S::STAGE_BYTES;
    char* codes = x_tile + S::X_BYTES;
    const char* x = static_cast<const char*>(a.x) + group * 128;
    const char* weight = static_cast<const char*>(a.weight) + group * 32;
    for (int i = int(threadIdx.x); i < S::ROWS * 8; i += S::THREADS) {
        const int64_t row = first_row + i / 8;
        const bool valid = row < a.M;
        copy_async16(x_tile + x_offset(i / 8, i % 8), x + (valid ? row * a.K * 2 + i % 8 * 16 : 0),
                     valid);
    }
    for (int i = int(threadIdx.x); i < S::COLUMNS * 2; i += S::THREADS) {
        const int64_t column = first_column + i / 2;
        const bool valid = column < a.N;
        copy_async16(codes + i * 16, weight + (valid ? column * (a.K / 2) + i % 2 * 16 : 0), valid);
    }
}

// (scale, zeros - 24 scale) of a group and column.
template <class P>
NIBBLE_DEVICE float2 scale_of(const W4A16& a, int group, int64_t column) {
    if (column >= a.N || group >= a.K / GROUP) return {0.0f, 0.0f};
    const float scale = to_float(static_cast<const P*>(a.weight_scale)[group * a.N + column]);
    const float zeros = a.weight_zeros
                            ? to_float(static_cast<const P*>(a.weight_zeros)[group * a.N + column])
                            : 0.0f;
    return {scale, fmaf(-24.0f, scale, zeros)};
}

// sums += one group.
template <class T, class S>
NIBBLE_DEVICE void multiply_group(float (&sums)[S::M_TILES][S::N_TILES][4], const char* x_tile,
                                  const char* codes, const float2* scales, int lane) {
    const int g = lane / 4, t = lane % 4;
    uint32_t left[S::M_TILES][4][4];
    float x_sums[S::M_TILES][4] = {};
    const uint32_t one = pack2<T>(1.0f, 1.0f), ones[2] = {one, one};
#pragma unroll
    for (int m = 0; m < S::M_TILES; m++) {
#pragma unroll
        for (int half = 0; half < 2; half++)
#pragma unroll
            for (int i = 0; i < 2; i++) {
                const uint4 chunk = *reinterpret_cast<const uint4*>(
                    x_tile + x_offset(16 * m + 8 * half + g, 2 * t + i));
                left[m][2 * i][half] = pick_bytes(chunk.x, chunk.z, 0x5410);
                left[m][2 * i][half + 2] = pick_bytes(chunk.x, chunk.z, 0x7632);
                left[m][2 * i + 1][half] = pick_bytes(chunk.y, chunk.w, 0x5410);
                left[m][2 * i + 1][half + 2] = pick_bytes(chunk.y, chunk.w, 0x7632);
            }
#pragma unroll
        for (int s = 0; s < 4; s++) mma_16bit<T>(x_sums[m], left[m][s], ones);
    }
#pragma unroll
    for (int n = 0; n < S::N_TILES; n++) {
        const uint2 words =
            *reinterpret_cast<const uint2*>(codes + (8 * n + g) * (GROUP / 2) + 8 * t);
        float group_sums[S::M_TILES][4] = {};
#pragma unroll
        for (int s = 0; s < 4; s++) {
            const uint32_t word = s / 2 ? words.y : words.x;
            const uint32_t right[2] = {pair_of_codes<T>(word, 2 * (s % 2)),
                                       pair_of_codes<T>(word, 2 * (s % 2) + 1)};
#pragma unroll
            for (int m = 0; m < S::M_TILES; m++) mma_16bit<T>(group_sums[m], left[m][s], right);
        }
        const float4 two =
            *reinterpret_cast<const float4*>(scales + 8 * n + 2 * t);  // columns 2t and 2t + 1
#pragma unroll
        for (int m = 0; m < S::M_TILES; m++)
#pragma unroll
            for (int r = 0; r < 4; r++)
                sums[m][n][r] = fmaf(r % 2 ? two.z : two.x, group_sums[m][r],
                                     fmaf(r % 2 ? two.w : two.y, x_sums[m][r], sums[m][n][r]));
    }
}

template <class T, class P, class S>
__global__ void __launch_bounds__(S::THREADS, S::BLOCKS) w4a16_gemm_kernel(const W4A16 a) {
    const int thread = int(threadIdx.x), lane = thread % 32, warp_m = thread / 32 % S::M_WARPS,
              warp_n = thread / 32 / S::M_WARPS;
    // Blocks that follow one another share the rows of x, which are few, and read different
    // weights. All are along x: the other axes have 2^16 blocks at most.
    const unsigned across = unsigned((a.N + S::COLUMNS - 1) / S::COLUMNS);
    const int64_t first_row = int64_t(blockIdx.x / across) * S::ROWS,
                  first_column = int64_t(blockIdx.x % across) * S::COLUMNS;
    const int groups = int(a.K / GROUP);
    char* shared = dynamic_shared();
    float2* scales = reinterpret_cast<float2*>(shared + S::STAGES * S::STAGE_BYTES);
    float sums[S::M_TILES][S::N_TILES][4] = {};

#pragma unroll
    for (int group = 0; group < S::STAGES - 1; group++) {
        if (group < groups) stage<S>(shared, a, group, first_row, first_column);
        copy_async_commit();
    }
    // Scales go through registers, which makes them floats: group j + 1's are kept while group j is
    // multiplied, j + 2's are under way.
    const bool has_scale = thread < S::COLUMNS;
    float2 pending = {0.0f, 0.0f};
    if (has_scale) {
        scales[thread] = scale_of<P>(a, 0, first_column + thread);
        pending = scale_of<P>(a, 1, first_column + thread);
    }
    for (int group = 0; group < groups; group++) {
        copy_async_wait<S::STAGES - 2>();
        sync_block();  // the group's data are there, and all warps are done with the one before
        if (group + S::STAGES - 1 < groups)
            stage<S>(shared, a, group + S::STAGES - 1, first_row, first_column);
        copy_async_commit();
        if (has_scale) {
            scales[(group + 1) % 2 * S::COLUMNS + thread] = pending;
            pending = scale_of<P>(a, group + 2, first_column + thread);
        }
        const char* x_tile = shared + group % S::STAGES * S::STAGE_BYTES;
        multiply_group<T, S>(sums, x_tile + warp_m * S::M_TILES * 16 * 128,
                             x_tile + S::X_BYTES + warp_n * S::N_TILES * 8 * (GROUP / 2),
                             scales + group % 2 * S::COLUMNS + warp_n * S::N_TILES * 8, lane);
    }
    copy_async_wait<0>();

#pragma unroll
    for (int m = 0; m < S::M_TILES; m++)
#pragma unroll
        for (int n = 0; n < S::N_TILES; n++)
#pragma unroll
            for (int half = 0; half < 2; half++) {
                const int64_t row =
                    first_row + (warp_m * S::M_TILES + m) * 16 + 8 * half + lane / 4;
                const int64_t column =
                    first_column + (warp_n * S::N_TILES + n) * 8 + 2 * (lane % 4);
                float pair[2] = {sums[m][n][2 * half], sums[m][n][2 * half + 1]};
                if (a.bias) {
#pragma unroll
                    for (int i = 0; i < 2; i++)
                        if (column + i < a.N)
                            pair[i] += to_float(static_cast<const P*>(a.bias)[column + i]);
                }
                T* to = static_cast<T*>(a.out) + row * a.N + column;
                if (row >= a.M) continue;
                if (a.N % 2 == 0) {
                    if (column < a.N) *reinterpret_cast<uint32_t*>(to) = pack2<T>(pair[0], pair[1]);
                } else {
                    if (column < a.N) to[0] = from_float<T>(pair[0]);
                    if (column + 1 < a.N) to[1] = from_float<T>(pair[1]);
                }
            }
}

}  // namespace nibble::cuda
