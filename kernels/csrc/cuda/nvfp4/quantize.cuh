// x -> e2m1 codes, an e4m3 scale for 16 columns, and h = x . proj_down: one read of x. Formula:
// kernels/reference/nvfp4.py. Numbers are the reference's to the last bit, but for codes under a
// scale of 0, which are 0.
//
// The block, the projection and the exact division by `smooth` are quantize_down's: see
// ../quantize_down/kernel.cuh and row.cuh. 16 columns that share a scale lie in two neighbouring
// lanes, 8 in each.
#pragma once

#include "../../nibble.h"
#include "../primitives_sm120.cuh"
#include "../quantize_down/kernel.cuh"

namespace nibble::cuda {

constexpr float LARGEST_E2M1 = 6.0f, LARGEST_E4M3 = 448.0f;

// A scale as the product reads it; the sign is 0. An exponent of 0 is that of subnormal numbers in
// both formats, so a power of two is all that differs.
NIBBLE_DEVICE float scale_of_e4m3(uint32_t byte) {
    return byte == 0x7F ? as_float(0x7FC00000) : as_float(int(byte << 20)) * 0x1p120f;
}

// The largest magnitude of 16 columns, of which the lane has 8; NaN where one is.
NIBBLE_DEVICE float largest_of_16(const float* v) {
    float top = fabsf(v[0]);
#pragma unroll
    for (int j = 1; j < 8; j++) top = max_or_nan(top, fabsf(v[j]));
    return max_or_nan(top, shuffle_xor(top, 1));
}

// Eight values of 16 that share a scale -> their codes; returns the scale.
NIBBLE_DEVICE uint32_t encode_nvfp4(uint32_t& codes, float* v, float top, bool rounded) {
    const float exact = top > LARGEST_E2M1 * LARGEST_E4M3 ? LARGEST_E4M3 : top / LARGEST_E2M1;
    const uint32_t scale = round_to_e4m3(exact);
    const float by = rounded ? scale_of_e4m3(scale) : exact;
    // As a division rounds: see ../quantize_down/row.cuh. A scale that is not 0 is 2^-10 or more.
    const float hi = 1.0f / by, lo = fmaf(-hi, by, 1.0f) * hi;
#pragma unroll
    for (int j = 0; j < 8; j++) {
        const float near = fmaf(v[j], hi, v[j] * lo);
        v[j] = fmaf(fmaf(-near, by, v[j]), hi, near);
    }
    codes = scale ? pack8_e2m1(v) : 0;
    return scale;
}

// A row's values again by real divisions, for numbers beyond the fast path's range. Clamped behind
// `top`, so that no infinity meets the division by a scale: all beyond 2688 have one code.
template <class X, class P>
NIBBLE_DEVICE void divide_carefully(float (&v)[16], float (&top)[2], const Chunk<X> (&x)[2],
                                    const P* smooth, int t) {
#pragma unroll
    for (int j = 0; j < 16; j++)
        v[j] = value(x[j / 8], j % 8) / to_float(smooth[8 * t + j % 8 + j / 8 * 32]);
#pragma unroll
    for (int i = 0; i < 2; i++) top[i] = largest_of_16(v + 8 * i);
#pragma unroll
    for (int j = 0; j < 16; j++) v[j] = fminf(fmaxf(v[j], -0x1p64f), 0x1p64f);
}

// One row of one group of 64: its codes are written; returns the lane's part of its four scales.
template <class X, class P>
NIBBLE_DEVICE uint32_t quantize_nvfp4_row(const Chunk<X> (&x)[2], const char* reciprocals,
                                          const P* smooth, bool rounded, char* to, bool in_range,
                                          int t) {
    float v[16], top[2];
#pragma unroll
    for (int j = 0; j < 16; j += 2) {
        const float4 two = *reinterpret_cast<const float4*>(
            reciprocals + j / 8 * 4 * Reciprocals::CHUNK_BYTES + j % 8 * 8);
        const float even = value(x[j / 8], j % 8), odd = value(x[j / 8], j % 8 + 1);
        v[j] = fmaf(even, two.x, even * two.y);
        v[j + 1] = fmaf(odd, two.z, odd * two.w);
    }
#pragma unroll
    for (int i = 0; i < 2; i++) top[i] = largest_of_16(v + 8 * i);
    // Quotients below the fast path's range end under a scale of 0 and do not matter.
    const bool bad = in_range && !(top[0] <= 0x1p64f && top[1] <= 0x1p64f);
    if (any_in_warp(bad)) divide_carefully(v, top, x, smooth, t);
    uint32_t codes[2], scales = 0;
#pragma unroll
    for (int i = 0; i < 2; i++)
        scales |= encode_nvfp4(codes[i], v + 8 * i, top[i], rounded) << (16 * i + 8 * (t / 2));
    store_sector(to, codes[0], codes[1], in_range, t);
    return scales | shuffle_xor(scales, 2);
}

template <class X, class P, int EIGHTS, int WARPS, int BLOCKS>
__global__ void __launch_bounds__(32 * WARPS, BLOCKS)
    quantize_nvfp4_kernel(const QuantizeNvfp4Down a) {
    constexpr int ROWS = 8 * EIGHTS, GROUP_BYTES = GROUP / 2, X_GROUP = GROUP * int(sizeof(X));
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
    // Blocks of the same tokens follow one another, so that x comes from memory for the first
    // alone.
    const unsigned block = blockIdx.y * gridDim.x + blockIdx.x, part_of_rank = block % gridDim.y;
    const int64_t first_row = int64_t(block / gridDim.y) * ROWS;
    const int first_column = int(part_of_rank) * DOWN_COLUMNS, groups = int(a.K / GROUP);
    const int left = int(a.R) - first_column, columns = left < DOWN_COLUMNS ? left : DOWN_COLUMNS;
    const int tokens = a.M - first_row < ROWS ? int(a.M - first_row) : ROWS;
    const bool quantizes = part_of_rank == 0, multiplies = columns > 0;
    char* tile = dynamic_shared() + warp * WARP_BYTES<1>;
    char* reciprocals = tile + DOWN_TILE_BYTES;
    const int lane_offset = multiply_offset(lane);

    // Where the lane stands in every tensor, for the eight rows that begin the block, and how far
    // the next eight are.
    const char* x_lane = static_cast<const char*>(a.x) +
                         ((first_row + g) * a.x_stride + warp * GROUP + 8 * t) * int(sizeof(X));
    const char* down_lane = static_cast<const char*>(a.proj_down) +
                            ((warp * GROUP + lane / 4) * a.R + first_column + lane % 4 * 8) * 2;
    char* q_lane =
        static_cast<char*>(a.q) + ((first_row + g) * groups + warp) * GROUP_BYTES + 8 * t;
    uint32_t* scale_lane = static_cast<uint32_t*>(a.ascales) + (first_row + g) * groups + warp;
    const uint32_t x_eight = uint32_t(8 * a.x_stride * int(sizeof(X)));

    Chunk<X> x[EIGHTS][2] = {};  // two chunks of each row; zeros beyond the last token
    float sums[EIGHTS][2][4] = {};
    uint32_t smooth_pair = 0;
    if (warp < groups) {
        if (multiplies) stage_down<P>(tile, down_lane, uint32_t(a.R), columns, lane);
        smooth_pair = *reinterpret_cast<const uint32_t*>(static_cast<const P*>(a.smooth) +
                                                         warp * GROUP + 2 * lane);
#pragma unroll
        for (int e = 0; e < EIGHTS; e++)
            if (g + 8 * e < tokens) load_row(x[e], x_lane + e * x_eight);
    }
    for (int group = warp; group < groups; group += WARPS) {
        const bool more = group + WARPS < groups;
        const P* smooth = static_cast<const P*>(a.smooth) + group * GROUP;
        copy_async_wait<0>();
        Reciprocals::keep<P, Form::signed_codes>(reciprocals, smooth_pair, lane);
        if (more)
            smooth_pair = *reinterpret_cast<const uint32_t*>(smooth + WARPS * GROUP + 2 * lane);
        down_lane += WARPS * GROUP * a.R * 2;
        sync_warp();
#pragma unroll
        for (int part = 0; part < EIGHTS; part += 2) {  // two eights share a read of proj_down
            if (multiplies) {
                if (part < EIGHTS - 1)
                    multiply<X, P, 2>(sums + part, x + part, tile, lane_offset);
                else
                    multiply<X, P, 1>(sums + part, x + part, tile, lane_offset);
                if (part + 2 >= EIGHTS && more) {
                    sync_warp();  // all lanes have read the tile
                    stage_down<P>(tile, down_lane, uint32_t(a.R), columns, lane);
                }
            }
#pragma unroll
            for (int e = part; e < part + 2 && e < EIGHTS; e++) {
                const bool in_range = g + 8 * e < tokens;
                if (quantizes) {
                    const uint32_t scales = quantize_nvfp4_row<X, P>(
                        x[e], reciprocals + t * Reciprocals::CHUNK_BYTES, smooth, a.rounded,
                        q_lane + int64_t(8 * e) * groups * GROUP_BYTES, in_range, t);
                    if (in_range && t == 0) scale_lane[int64_t(8 * e) * groups] = scales;
                }
                // The registers are free: the next group's row is requested while the other rows
                // are computed.
                if (more && in_range) load_row(x[e], x_lane + e * x_eight + WARPS * X_GROUP);
            }
        }
        x_lane += WARPS * X_GROUP, q_lane += WARPS * GROUP_BYTES, scale_lane += WARPS;
        sync_warp();  // all lanes have read the reciprocals
    }
    if (!multiplies) return;
    add_warps<EIGHTS, WARPS>(a, sums, first_row, tokens, first_column, columns);
}

}  // namespace nibble::cuda
