// x -> int8 codes with one scale a token, and h = x . proj_down.
//
// The block, the projection and the exact division by `smooth` are quantize_down's: see
// ../quantize_down/kernel.cuh and row.cuh. A token's largest number is known at the end of K: so a
// block reads its tokens a second time, from the L2 cache, and codes them then.
#pragma once

#include "../../nibble.h"
#include "../quantize_down/kernel.cuh"

namespace nibble::cuda::w4a8 {

// A row's largest magnitude of the lane's 16 columns of a group, by real divisions.
template <class X, class P, Form FORM>
NIBBLE_DEVICE float carefully_largest(const X* x, const P* smooth, int t) {
    float top = 0;
#pragma unroll 1
    for (int j = 0; j < 16; j++)
        top = max_or_nan(
            top, fabsf(value_before_scale<X, P, FORM>(x, smooth, 8 * t + j % 8 + j / 8 * 32)));
    return top;
}

// The lane's codes of a group under a scale, with the reference's treatment of NaN and infinities.
template <class X, class P, Form FORM>
NIBBLE_DEVICE void carefully_encode(CodeWords& codes, float scale, const X* x, const P* smooth,
                                    int t) {
    const float divisor = max_or_nan(scale, SMALLEST_NORMAL);
#pragma unroll
    for (int i = 0; i < 2; i++) {
        uint64_t chunk = 0;
#pragma unroll 1
        for (int j = 0; j < 8; j++) {
            const float v = value_before_scale<X, P, FORM>(x, smooth, 8 * t + j + i * 32) / divisor;
            chunk = chunk >> 8 | uint64_t(as_int((v != v ? 0.0f : v) + ROUNDER) & 255) << 56;
        }
        codes.words[i][0] = uint32_t(chunk), codes.words[i][1] = uint32_t(chunk >> 32);
    }
}

// Whether a row's largest number is beyond the fast path's range.
NIBBLE_DEVICE bool needs_care(float top) {
    return top != 0.0f && !(top >= 0x1p-64f && top <= 0x1p64f);
}

// The largest of every warp's `tops` of the block's rows: `shared` holds WARPS x ROWS floats.
template <int EIGHTS, int WARPS>
NIBBLE_DEVICE void over_warps(float (&tops)[EIGHTS], float* shared, int warp, int g, int t) {
    constexpr int ROWS = 8 * EIGHTS;
    sync_block();
#pragma unroll
    for (int e = 0; e < EIGHTS; e++) {
        tops[e] = max_or_nan(tops[e], shuffle_xor(tops[e], 1));
        tops[e] = max_or_nan(tops[e], shuffle_xor(tops[e], 2));
        if (t == 0) shared[warp * ROWS + 8 * e + g] = tops[e];
    }
    sync_block();
#pragma unroll
    for (int e = 0; e < EIGHTS; e++)
#pragma unroll
        for (int w = 0; w < WARPS; w++) tops[e] = max_or_nan(tops[e], shared[w * ROWS + 8 * e + g]);
    sync_block();
}

// `a.ascales`: (M,).
template <class X, class P, Form FORM, int EIGHTS, int WARPS, int BLOCKS>
__global__ void __launch_bounds__(32 * WARPS, BLOCKS) quantize_tokens_kernel(const QuantizeDown a) {
    constexpr int ROWS = 8 * EIGHTS, X_GROUP = GROUP * int(sizeof(X));
    allow_next_kernel();  // the product, which waits for these codes
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
    const char* factors = reciprocals + t * Reciprocals::CHUNK_BYTES;
    const int lane_offset = multiply_offset(lane);
    const P* smooth = static_cast<const P*>(a.smooth);

    // Where the lane stands, for the eight rows that begin the block and group 0.
    const char* x_lane =
        static_cast<const char*>(a.x) + ((first_row + g) * a.x_stride + 8 * t) * int(sizeof(X));
    const char* down_lane = static_cast<const char*>(a.proj_down) +
                            ((warp * GROUP + lane / 4) * a.R + first_column + lane % 4 * 8) * 2;
    const uint32_t x_eight = uint32_t(8 * a.x_stride * int(sizeof(X)));

    Chunk<X> x[EIGHTS][2] = {};  // two chunks of each row; zeros beyond the last token
    float sums[EIGHTS][2][4] = {}, tops[EIGHTS] = {};
    if (warp < groups && multiplies) stage_down<P>(tile, down_lane, uint32_t(a.R), columns, lane);
    for (int group = warp; group < groups; group += WARPS) {
#pragma unroll
        for (int e = 0; e < EIGHTS; e++)
            if (g + 8 * e < tokens) load_row(x[e], x_lane + e * x_eight + group * X_GROUP);
        copy_async_wait<0>();
        Reciprocals::keep<P, FORM>(
            reciprocals, *reinterpret_cast<const uint32_t*>(smooth + group * GROUP + 2 * lane),
            lane);
        down_lane += WARPS * GROUP * a.R * 2;
        sync_warp();
#pragma unroll
        for (int part = 0; part < EIGHTS; part += 2) {  // two eights share a read of proj_down
            if (multiplies) multiply<X, P, 2>(sums + part, x + part, tile, lane_offset);
#pragma unroll
            for (int e = part; e < part + 2; e++)
                if (quantizes) {
                    float v[16];
                    smoothed_row<X, FORM>(v, x[e], factors, t);
                    tops[e] = max_or_nan(tops[e], largest<false>(v));
                }
        }
        sync_warp();  // all lanes have read the tile and the reciprocals
        if (multiplies && group + WARPS < groups)
            stage_down<P>(tile, down_lane, uint32_t(a.R), columns, lane);
    }
    if (multiplies) add_warps<EIGHTS, WARPS>(a, sums, first_row, tokens, first_column, columns);
    if (!quantizes) return;

    float* shared = reinterpret_cast<float*>(dynamic_shared());
    over_warps<EIGHTS, WARPS>(tops, shared, warp, g, t);
    bool careful = false;
#pragma unroll
    for (int e = 0; e < EIGHTS; e++) careful |= needs_care(tops[e]);
    careful = any_in_warp(careful);  // every warp holds every row's
    float exact[EIGHTS] = {};
    if (careful) {
        for (int group = warp; group < groups; group += WARPS)
#pragma unroll
            for (int e = 0; e < EIGHTS; e++)
                if (needs_care(tops[e]) && g + 8 * e < tokens)
                    exact[e] =
                        max_or_nan(exact[e], carefully_largest<X, P, FORM>(
                                                 reinterpret_cast<const X*>(x_lane + e * x_eight) -
                                                     8 * t + group * GROUP,
                                                 smooth + group * GROUP, t));
        over_warps<EIGHTS, WARPS>(exact, shared, warp, g, t);
    }
    char* q_lane = static_cast<char*>(a.q) + (first_row + g) * a.K + 8 * t;
    for (int group = warp; group < groups; group += WARPS) {
        Reciprocals::keep<P, FORM>(
            reciprocals, *reinterpret_cast<const uint32_t*>(smooth + group * GROUP + 2 * lane),
            lane);
        sync_warp();
#pragma unroll
        for (int e = 0; e < EIGHTS; e++) {
            const bool in_range = g + 8 * e < tokens, zero = tops[e] == 0.0f;
            const char* from = x_lane + e * x_eight + group * X_GROUP;
            if (in_range) load_row(x[e], from);
            float v[16];
            smoothed_row<X, FORM>(v, x[e], factors, t);
            float scale = quick<FORM, Codes::int8>(v, zero ? 1.0f : tops[e]);
            if (zero) scale = 0.0f;
            CodeWords codes;
            encode<FORM, Codes::int8>(codes, v);
            if (careful && in_range && needs_care(tops[e])) {
                scale = exact[e] / STEPS<FORM, Codes::int8>;
                carefully_encode<X, P, FORM>(codes, scale, reinterpret_cast<const X*>(from) - 8 * t,
                                             smooth + group * GROUP, t);
            }
            store<Codes::int8>(q_lane + int64_t(8 * e) * a.K + group * GROUP, codes, in_range, t);
            if (in_range && t == 0 && group == 0) a.ascales[first_row + g + 8 * e] = scale;
        }
        sync_warp();  // all lanes have read the reciprocals
    }
}

}  // namespace nibble::cuda::w4a8
