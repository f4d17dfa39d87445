// quantize_down on a GPU: one read of x gives codes, scales and h = x . proj_down.
//
// A block owns 16, 32 or 40 tokens and all of K. Its warps take groups of 64 columns in turn and
// share nothing until the end, where their partial sums of h are added in the order of the warps:
// no atomics, no second kernel, the same bits every time. A lane's x stays in the registers it was
// loaded into: they are quantized there and are, as they are, the right operand of proj_down^T .
// x^T.
//
// The arithmetic that chose the shape, for FLUX (M = 4608, K = 3072, R = 32, bfloat16) on an H100;
// nothing of it is measured yet:
//   DRAM      28 MB of x, 7 MB of codes: 12 us at 3 TB/s. (Codes for Hopper's product are bytes: 14
//   MB, 14 us.) L2        a block reads all of proj_down, 196 KB. 16 tokens a block would make that
//   56 MB, twice what x is; 32 make it 28, 40 23. issue     18 instructions a value in the machine
//   code (smooth and divide 7, unpack, maximum, round and pack 5, exchanges, addresses and
//             product the rest); with the compiler's divisions it would be 30. Blocks of 32 would
//             give 12 of 132 multiprocessors two, 16 us; of 40, one to each of 116: 10 us. So the
//             host takes the size whose busiest multiprocessor has the fewest tokens.
//   loads     x of the next group is requested as soon as its registers are free, most of a group
//   before it is needed. A multiprocessor's
//             12 warps have up to 48 KB under way; 16 KB are what 700 ns of latency need.
// Few tokens (M <= 24 a multiprocessor) go 16 to a block, so that more multiprocessors share them:
// M = 256 takes 16 blocks, and a warp has 4 groups one after another.
//
// Ranks beyond 32 (a LoRA beside the branch): where tokens are many a block multiplies up to 96
// columns, with 8 warps, for sums of 96 columns fill the registers of 12. What is left are further
// blocks, which only multiply. They run beside the first block of their tokens, so x comes from
// memory once whatever R is, and from L2 R / 96 times (few tokens: R / 32).
#pragma once

#include "../../nibble.h"
#include "../primitives.cuh"
#include "row.cuh"

namespace nibble::cuda {

constexpr int DOWN_COLUMNS = 32;  // of proj_down that a warp multiplies at once
constexpr int DOWN_TILE_BYTES = GROUP * DOWN_COLUMNS * 2;
// Of several such tiles the next one is under way while one is multiplied.
template <int TILES>
constexpr int BUFFERS = TILES > 1 ? 2 : 1;
template <int TILES>
constexpr int WARP_BYTES = BUFFERS<TILES> * DOWN_TILE_BYTES + Reciprocals::BYTES;
constexpr int SUMS_STRIDE =
    DOWN_COLUMNS + 4;  // floats a token, so that the lanes of a warp write to different banks

// The type whose products the matrix unit makes, and how many such terms hold a number of x or of
// proj_down exactly. bfloat16 has 8 significant bits and float32's range, so it takes 1, 2 or 3 of
// them for bfloat16, float16 and float32.
template <class X, class P>
struct Terms {
    static constexpr bool HALVES = same<X, f16> && same<P, f16>;
    using Product = pick<HALVES, f16, bf16>;
    template <class T>
    static constexpr int OF = HALVES || same<T, bf16> ? 1
                              : same<T, f16>          ? 2
                                                      : 3;
};

// What is left of x after TERM leading bfloat16 terms. Cutting, unlike rounding, never overflows.
template <int TERM>
NIBBLE_DEVICE float after_terms(float x) {
#pragma unroll
    for (int i = 0; i < TERM; i++) x -= as_float(as_int(x) & int(0xFFFF0000));
    return x;
}

template <int TERM>
NIBBLE_DEVICE uint32_t pair_of_terms(float even, float odd) {
    return pick_bytes(uint32_t(as_int(after_terms<TERM>(even))),
                      uint32_t(as_int(after_terms<TERM>(odd))), 0x7632);
}

// Words pair `pair` of a lane's x, and a register of proj_down, as one term of each.
template <int TERMS, int TERM, class X>
NIBBLE_DEVICE uint32_t x_pair(const Chunk<X>& chunk, int pair) {
    if constexpr (TERMS == 1)
        return chunk.words[pair];
    else
        return pair_of_terms<TERM>(value(chunk, 2 * pair), value(chunk, 2 * pair + 1));
}
template <int TERMS, int TERM, class P>
NIBBLE_DEVICE uint32_t down_pair(uint32_t pair) {
    if constexpr (TERMS == 1)
        return pair;
    else
        return pair_of_terms<TERM>(low_half<P>(pair), high_half<P>(pair));
}

// The tile of proj_down in shared memory: 64 rows of k, four pieces of 8 columns each, exchanged so
// that what ldmatrix reads together, rows that differ in k % 2 and k / 8 % 4, lies in different
// banks.
NIBBLE_DEVICE int down_offset(int k, int eight) {
    return k * (DOWN_COLUMNS * 2) + (eight ^ (k >> 3 & 3)) * 16;
}

// `from`: row lane / 4 of the group, columns 8 (lane % 4).. of the block's.
template <class P>
NIBBLE_DEVICE void stage_down(char* tile, const char* from, uint32_t R, int columns, int lane) {
    if (R % 8 == 0) {
        const bool valid = lane % 4 * 8 < columns;
#pragma unroll
        for (int i = 0; i < GROUP / 8; i++)
            copy_async16(tile + down_offset(8 * i + lane / 4, lane % 4),
                         from + int64_t(i) * (16 * R), valid);
    } else {  // rows begin anywhere
        for (int i = 0; i < GROUP / 8; i++) {
            const P* row = reinterpret_cast<const P*>(from) + int64_t(8 * i) * R;
            P* to = reinterpret_cast<P*>(tile + down_offset(8 * i + lane / 4, lane % 4));
#pragma unroll
            for (int j = 0; j < 8; j++) to[j] = lane % 4 * 8 + j < columns ? row[j] : P{0};
        }
    }
    copy_async_commit();
}

// sums (32 columns of proj_down x 8 tokens) += proj_down^T . x^T over 16 of k, all pairs of terms.
template <class X, class P, int D_TERM = 0, int X_TERM = 0>
NIBBLE_DEVICE void multiply_terms(float (&sums)[2][4], const uint32_t (&down)[2][4],
                                  const Chunk<X>& chunk, int h) {
    using T = Terms<X, P>;
    constexpr int D_TERMS = T::template OF<P>, X_TERMS = T::template OF<X>;
    const uint32_t right[2] = {x_pair<X_TERMS, X_TERM>(chunk, 2 * h),
                               x_pair<X_TERMS, X_TERM>(chunk, 2 * h + 1)};
#pragma unroll
    for (int n = 0; n < 2; n++) {
        const uint32_t left[4] = {
            down_pair<D_TERMS, D_TERM, P>(down[n][0]), down_pair<D_TERMS, D_TERM, P>(down[n][1]),
            down_pair<D_TERMS, D_TERM, P>(down[n][2]), down_pair<D_TERMS, D_TERM, P>(down[n][3])};
        mma_16bit<typename T::Product>(sums[n], left, right);
    }
    if constexpr (X_TERM + 1 < X_TERMS)
        multiply_terms<X, P, D_TERM, X_TERM + 1>(sums, down, chunk, h);
    else if constexpr (D_TERM + 1 < D_TERMS)
        multiply_terms<X, P, D_TERM + 1, 0>(sums, down, chunk, h);
}

// The tokens are the product's columns: its right operand is two neighbouring words of a chunk, as
// they were loaded. Step (i, h) takes words 2h, 2h + 1 of chunk i: k 2t, 2t + 1 of lane t are
// columns 8 (t + 4i) + 4h + 0, 1 and k 2t + 8, 2t + 9 are + 2, 3. ldmatrix transposes proj_down and
// takes its rows in that order.
template <class X, class P, int EIGHTS>
NIBBLE_DEVICE void multiply(float (*sums)[2][4], const Chunk<X> (*x)[2], const char* tile,
                            int lane_offset) {
#pragma unroll
    for (int i = 0; i < 2; i++)
#pragma unroll
        for (int h = 0; h < 2; h++) {
            uint32_t down[2][4];
#pragma unroll
            for (int n = 0; n < 2; n++)
                load_matrix_x4_transposed(
                    down[n], tile + (lane_offset ^ 32 * n) + down_offset(32 * i + 4 * h, 0));
#pragma unroll
            for (int e = 0; e < EIGHTS; e++) multiply_terms<X, P>(sums[e], down, x[e][i], h);
        }
}

// A lane's row of `multiply`'s first step: matrices are k 0.. and columns 0.., columns 8.., k 8..
// and columns 0.., columns 8...
NIBBLE_DEVICE int multiply_offset(int lane) {
    const int row = lane % 8, matrix = lane / 8;
    return down_offset(row / 2 * 8 + row % 2 + matrix / 2 * 2, matrix % 2);
}

// Every warp's sums of a tile of h side by side, then added from the first warp to the last.
// columns: of h from first_column on, perhaps fewer than the tile's, or none.
template <int EIGHTS, int WARPS, class Op>
NIBBLE_DEVICE void add_warps(const Op& a, const float (&sums)[EIGHTS][2][4], int64_t first_row,
                             int tokens, int first_column, int columns) {
    constexpr int ROWS = 8 * EIGHTS;
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
    float* partial = reinterpret_cast<float*>(dynamic_shared());
    sync_block();
#pragma unroll
    for (int e = 0; e < EIGHTS; e++)
#pragma unroll
        for (int n = 0; n < 2; n++)
#pragma unroll
            for (int r = 0; r < 4; r++)
                partial[(warp * ROWS + 8 * e + 2 * t + r % 2) * SUMS_STRIDE + 16 * n + 8 * (r / 2) +
                        g] = sums[e][n][r];
    sync_block();
    for (int i = int(threadIdx.x); i < ROWS * DOWN_COLUMNS; i += 32 * WARPS) {
        const int row = i / DOWN_COLUMNS, column = i % DOWN_COLUMNS;
        float sum = 0;
#pragma unroll
        for (int w = 0; w < WARPS; w++) sum += partial[(w * ROWS + row) * SUMS_STRIDE + column];
        if (row < tokens && column < columns)
            a.h[(first_row + row) * a.R + first_column + column] = sum;
    }
}

// TILES: tiles of 32 columns of proj_down that the block multiplies; its sums take 8 registers for
// each and for 8 tokens.
template <class X, class P, Form FORM, Codes FORMAT, int EIGHTS, int WARPS, int BLOCKS, int TILES>
__global__ void __launch_bounds__(32 * WARPS, BLOCKS) quantize_down_kernel(const QuantizeDown a) {
    constexpr int ROWS = 8 * EIGHTS, GROUP_BYTES = FORMAT == Codes::packed ? GROUP / 2 : GROUP;
    allow_next_kernel();  // a whole linear's product, which waits for these codes
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
    // Blocks of the same tokens follow one another, so that x comes from memory for the first
    // alone.
    const unsigned block = blockIdx.y * gridDim.x + blockIdx.x, part_of_rank = block % gridDim.y;
    const int64_t first_row = int64_t(block / gridDim.y) * ROWS;
    const int first_column = int(part_of_rank) * TILES * DOWN_COLUMNS, groups = int(a.K / GROUP);
    const int columns = int(a.R) - first_column < TILES * DOWN_COLUMNS ? int(a.R) - first_column
                                                                       : TILES * DOWN_COLUMNS;
    const int tokens = a.M - first_row < ROWS ? int(a.M - first_row) : ROWS;
    const bool quantizes = part_of_rank == 0, multiplies = columns > 0;
    char* tile = dynamic_shared() + warp * WARP_BYTES<TILES>;
    char* reciprocals = tile + BUFFERS<TILES> * DOWN_TILE_BYTES;
    const int lane_offset = multiply_offset(lane);

    // Where the lane stands in every tensor, for the eight rows that begin the block, and how far
    // the next eight and the next group are.
    const char* x_lane = static_cast<const char*>(a.x) +
                         ((first_row + g) * a.x_stride + warp * GROUP + 8 * t) * int(sizeof(X));
    const char* down_lane = static_cast<const char*>(a.proj_down) +
                            ((warp * GROUP + lane / 4) * a.R + first_column + lane % 4 * 8) * 2;
    char* q_lane =
        static_cast<char*>(a.q) + ((first_row + g) * (a.K / GROUP) + warp) * GROUP_BYTES + 8 * t;
    float* scale_lane = a.ascales + warp * a.M + first_row + g;
    const uint32_t x_eight = uint32_t(8 * a.x_stride * int(sizeof(X))),
                   q_eight = uint32_t(8 * (a.K / GROUP) * GROUP_BYTES);

    Chunk<X> x[EIGHTS][2] = {};  // two chunks of each row; zeros beyond the last token
    float sums[TILES][EIGHTS][2][4] = {};
    uint32_t smooth_pair = 0;
    int buffer = 0;  // where the tile lies that is multiplied next
    if (warp < groups) {
        if (multiplies)
#pragma unroll
            for (int c = 0; c < BUFFERS<TILES>; c++)
                stage_down<P>(tile + c * DOWN_TILE_BYTES, down_lane + c * DOWN_COLUMNS * 2,
                              uint32_t(a.R), columns - c * DOWN_COLUMNS, lane);
        smooth_pair = *reinterpret_cast<const uint32_t*>(static_cast<const P*>(a.smooth) +
                                                         warp * GROUP + 2 * lane);
#pragma unroll
        for (int e = 0; e < EIGHTS; e++)
            if (g + 8 * e < tokens) load_row(x[e], x_lane + e * x_eight);
    }
    for (int group = warp; group < groups; group += WARPS) {
        const bool more = group + WARPS < groups;
        const P* smooth = static_cast<const P*>(a.smooth) + group * GROUP;
        copy_async_wait<BUFFERS<TILES> - 1>();
        if (quantizes) Reciprocals::keep<P, FORM>(reciprocals, smooth_pair, lane);
        if (more)
            smooth_pair = *reinterpret_cast<const uint32_t*>(smooth + WARPS * GROUP + 2 * lane);
        if (TILES == 1) down_lane += WARPS * GROUP * a.R * 2;
        sync_warp();
        // Tiles of proj_down but the last, which is multiplied where rows are quantized.
#pragma unroll
        for (int c = 0; c < TILES - 1; c++) {
#pragma unroll
            for (int part = 0; part < EIGHTS; part += 2)
                if (c * DOWN_COLUMNS < columns) {
                    if (part < EIGHTS - 1)
                        multiply<X, P, 2>(sums[c] + part, x + part, tile + buffer, lane_offset);
                    else
                        multiply<X, P, 1>(sums[c] + part, x + part, tile + buffer, lane_offset);
                }
            sync_warp();  // all lanes have read the tile
            // The tile after the next: of this group, or the first of the next group.
            const int ahead = c + 2 < TILES ? (c + 2) * DOWN_COLUMNS : 0;
            if (!ahead) down_lane += WARPS * GROUP * a.R * 2;
            if (ahead || more)
                stage_down<P>(tile + buffer, down_lane + ahead * 2, uint32_t(a.R), columns - ahead,
                              lane);
            else
                copy_async_commit();
            buffer ^= DOWN_TILE_BYTES;
            copy_async_wait<1>();
            sync_warp();
        }
#pragma unroll
        for (int part = 0; part < EIGHTS; part += 2) {  // two eights share a read of proj_down
            constexpr int LAST = EIGHTS - 1, AHEAD = BUFFERS<TILES> - 1;
            if (multiplies) {
                if (TILES > 1 && columns <= (TILES - 1) * DOWN_COLUMNS)
                    ;  // R ends before this tile
                else if (part < LAST)
                    multiply<X, P, 2>(sums[TILES - 1] + part, x + part, tile + buffer, lane_offset);
                else
                    multiply<X, P, 1>(sums[TILES - 1] + part, x + part, tile + buffer, lane_offset);
                if (part + 2 > LAST && more) {
                    sync_warp();  // all lanes have read the tile
                    stage_down<P>(tile + buffer, down_lane + AHEAD * DOWN_COLUMNS * 2,
                                  uint32_t(a.R), columns - AHEAD * DOWN_COLUMNS, lane);
                }
            }
#pragma unroll
            for (int e = part; e < part + 2 && e < EIGHTS; e++) {
                const bool in_range = g + 8 * e < tokens;
                if (quantizes) {
                    const char* factors = reciprocals + t * Reciprocals::CHUNK_BYTES;
                    const float scale =
                        FORM == Form::unsigned_codes && group < int(a.unsigned_from / GROUP)
                            ? quantize_row<X, P, Form::signed_codes, FORMAT>(
                                  x[e], factors, x_lane + e * x_eight, smooth, q_lane + e * q_eight,
                                  in_range, t)
                            : quantize_row<X, P, FORM, FORMAT>(x[e], factors, x_lane + e * x_eight,
                                                               smooth, q_lane + e * q_eight,
                                                               in_range, t);
                    if (in_range && t == 0) scale_lane[8 * e] = scale;
                }
                // The registers are free: the next group's row is requested while the other rows
                // are computed.
                if (more && in_range)
                    load_row(x[e], x_lane + e * x_eight + WARPS * GROUP * int(sizeof(X)));
            }
        }
        x_lane += WARPS * GROUP * int(sizeof(X)), q_lane += WARPS * GROUP_BYTES,
            scale_lane += WARPS * a.M;
        if (TILES > 1) buffer ^= DOWN_TILE_BYTES;
        sync_warp();  // all lanes have read the reciprocals
    }
    if (!multiplies) return;

#pragma unroll
    for (int c = 0; c < TILES; c++)
        add_warps<EIGHTS, WARPS>(a, sums[c], first_row, tokens, first_column + c * DOWN_COLUMNS,
                                 columns - c * DOWN_COLUMNS);
}

// h alone, in plain float32 arithmetic, for numbers that Turing's matrix unit cannot hold: 32
// tokens x 32 columns a block, four sums a thread.
template <class X, class P>
__global__ void __launch_bounds__(256) down_kernel(const QuantizeDown a) {
    float* x_tile =
        reinterpret_cast<float*>(dynamic_shared());  // 32 tokens x 64, rows 68 floats apart
    float* down_tile = x_tile + 32 * 68;             // 64 x 32
    const int thread = int(threadIdx.x), column = thread % 32,
              first_column = int(blockIdx.y) * DOWN_COLUMNS;
    const int64_t first_row = int64_t(blockIdx.x) * 32;
    float sums[4] = {};
    for (int64_t k = 0; k < a.K; k += GROUP) {
        for (int i = thread; i < 32 * GROUP; i += 256) {
            const int64_t row = first_row + i / GROUP;
            x_tile[i / GROUP * 68 + i % GROUP] =
                row < a.M ? to_float(static_cast<const X*>(a.x)[row * a.x_stride + k + i % GROUP])
                          : 0.0f;
            const int64_t from = first_column + i % 32;
            down_tile[i] =
                from < a.R ? to_float(static_cast<const P*>(a.proj_down)[(k + i / 32) * a.R + from])
                           : 0.0f;
        }
        sync_block();
        float group_sums[4] = {};  // sums of sums of eight lose less than one sum of K terms
        for (int eight = 0; eight < GROUP; eight += 8) {
            float eight_sums[4] = {};
#pragma unroll
            for (int j = eight; j < eight + 8; j++)
#pragma unroll
                for (int r = 0; r < 4; r++)
                    eight_sums[r] = fmaf(x_tile[(thread / 32 + 8 * r) * 68 + j],
                                         down_tile[j * 32 + column], eight_sums[r]);
#pragma unroll
            for (int r = 0; r < 4; r++) group_sums[r] += eight_sums[r];
        }
#pragma unroll
        for (int r = 0; r < 4; r++) sums[r] += group_sums[r];
        sync_block();
    }
#pragma unroll
    for (int r = 0; r < 4; r++) {
        const int64_t row = first_row + thread / 32 + 8 * r;
        if (row < a.M && first_column + column < a.R)
            a.h[row * a.R + first_column + column] = sums[r];
    }
}

}  // namespace nibble::cuda
