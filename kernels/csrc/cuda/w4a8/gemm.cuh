// The product of weights that are read as int8: out = (codes . W8^T) * ascales * channel_scale
// + h . proj_up^T + bias, W8 = (table[code] * weight_scale + 64) >> 7, by mma.sync on 8-bit
// integers. Sums are 32-bit integers over all of K: nothing is rescaled before the end.
//
// Tiles and their order in shared memory are the int4 product's (../gemm_w4a4/tile.cuh). A lane's
// register of eight neighbours 8t.. of a weight's row becomes two registers of four neighbours
// each, in the order of the columns, and so do the activations' codes, which need no move for it.
//
// Reading eight weights takes 23 instructions: 11 look them up (a byte permutation in either half
// of the table, and one that chooses between them), 10 scale them (two at a time: see `scaled`), 2
// pick a scale. A warp of 64 x 64 outputs does that 16 times for 64 products. By count not what
// bounds it where a multiprocessor has 1024 multiply-adds a clock (RTX 30 and later), and close to
// it where it has 2048 (A100); not yet measured.
#pragma once

#include "../../nibble.h"
#include "../gemm_w4a4/store.cuh"
#include "../nvfp4/lowrank.cuh"

namespace nibble::cuda::w4a8 {

// What a product has beside GemmW4A4Up's arguments, of which `weight_scale` is int8 (K/group, N)
// and `ascales` float32 (M,).
struct Levels {
    const float* channel_scale;  // (N,)
    const void* table;           // (16,) int8
    int64_t group;               // 16, 32 or 64
};

// 16-byte alignment and two blocks within the 100 KB of 8.6, 8.9 and 12.0.
constexpr int MOST_SCALES = GROUP / 16;
template <bool TURING, int Rows>
constexpr int STAGES = TURING       ? 2
                       : Rows == 32 ? 4
                                    : 3;
template <int Rows>
constexpr int BLOCKS = Rows == 32 ? 4 : 2;

// One group (k = 64) of a tile.
template <int Rows>
struct Stage {
    alignas(16) uint8_t a[Rows * 64];
    uint8_t b[COLUMNS * 32];
    int8_t scales[MOST_SCALES][COLUMNS];
};

// Copies a group; what lies outside of the matrices becomes zero.
template <int Rows>
NIBBLE_DEVICE void issue(Stage<Rows>& to, int group, Corner corner, const GemmW4A4Up& op,
                         int per_group) {
    constexpr int PASS_A = THREADS<Rows> / 4, PASS_B = THREADS<Rows> / 2;
    const int thread = int(threadIdx.x);
#pragma unroll
    for (int p = 0; p < Rows; p += PASS_A) {
        const int row = p + thread / 4, chunk = thread % 4;
        copy_async16(
            to.a + WideRows::offset(Tile<Rows>::place_of_row(row), chunk),
            static_cast<const uint8_t*>(op.q) + (corner.row + row) * op.K + 64 * group + 16 * chunk,
            corner.row + row < op.M);
    }
#pragma unroll
    for (int p = 0; p < COLUMNS; p += PASS_B) {
        const int column = p + thread / 2, chunk = thread % 2;
        copy_async16(to.b + PackedRows::offset(Tile<Rows>::place_of_column(column), chunk),
                     static_cast<const uint8_t*>(op.weight) +
                         (corner.column + column) * (op.K / 2) + 32 * group + 16 * chunk,
                     corner.column + column < op.N);
    }
    const int8_t* scales = static_cast<const int8_t*>(op.weight_scale) +
                           int64_t(group) * per_group * op.N + corner.column;
    if (op.N % 16 == 0) {
        const int row = thread / 8, column = thread % 8 * 16;
        if (row < per_group)
            copy_async16(&to.scales[row][column], scales + row * op.N + column,
                         corner.column + column < op.N);
    } else {  // rows begin anywhere
        for (int row = 0; row < per_group; row++)
            to.scales[row][thread] =
                corner.column + thread < op.N ? scales[row * op.N + thread] : int8_t(0);
    }
}

// The table's 16 levels, 128 added to each so that none is negative.
struct Table {
    uint32_t words[4];
    NIBBLE_DEVICE explicit Table(const void* levels) {
        const uint4 all = *static_cast<const uint4*>(levels);
        words[0] = all.x ^ 0x80808080, words[1] = all.y ^ 0x80808080;
        words[2] = all.z ^ 0x80808080, words[3] = all.w ^ 0x80808080;
    }
};

// (level * scale + 64) >> 7 of four levels, as bytes. Two levels are the halves of a register, and
// one product makes 2 * level * scale + 128 of each, whose upper byte is the result. `start` takes
// back the 128 of the levels and adds those of the rounding; and 1 to the upper half, which a
// negative lower half borrows: 2 * level * scale + 128 is even, so where nothing is borrowed the 1
// does not reach its upper byte.
NIBBLE_DEVICE uint32_t scaled(uint32_t levels, uint32_t scale2, uint32_t start) {
    const uint32_t first = pick_bytes(levels, 0, 0x4140) * scale2 + start,
                   second = pick_bytes(levels, 0, 0x4342) * scale2 + start;
    return pick_bytes(first, second, 0x7531);
}

// Eight codes of a row -> its weights of columns 0..3 and 4..7.
NIBBLE_DEVICE void decode(uint32_t (&weights)[2], uint32_t codes, const Table& table, int scale) {
    const uint32_t scale2 = uint32_t(2 * scale), low = codes & 0x77777777,
                   half = and_or(codes >> 1, 0x44444444, 0x32103210),
                   start = 0x00810080u - scale2 * 0x00800080u;
#pragma unroll
    for (int i = 0; i < 2; i++) {
        const uint32_t in = low >> 16 * i;
        const uint32_t levels = pick_bytes(pick_bytes(table.words[0], table.words[1], in & 0xFFFF),
                                           pick_bytes(table.words[2], table.words[3], in & 0xFFFF),
                                           half >> 16 * i & 0xFFFF);
        weights[i] = scaled(levels, scale2, start);
    }
}

// d += A . B over 64 columns: registers 0..3 of A and 0, 1 of B are the first four of each eight.
template <bool TURING>
NIBBLE_DEVICE void product(int (&d)[4], const uint32_t (&a)[2][4], const uint32_t (&b)[2][2]) {
#pragma unroll
    for (int part = 0; part < 2; part++) {
        if constexpr (TURING) {
#pragma unroll
            for (int half = 0; half < 2; half++) {
                mma_s8_k16(d[0], d[1], a[part][2 * half], b[part][half], d[0], d[1]);
                mma_s8_k16(d[2], d[3], a[part][2 * half + 1], b[part][half], d[2], d[3]);
            }
        } else {
            mma_s8_k32<false>(d, a[part], b[part], d);
        }
    }
}

// sums += one group of a warp's share, which begins at (row, column) of the tile.
template <bool TURING, int Rows>
NIBBLE_DEVICE void multiply_group(int (&sums)[Tile<Rows>::MT][Tile<Rows>::NT][4],
                                  const Stage<Rows>& stage, const Table& table, int group, int row,
                                  int column, int lane) {
    using T = Tile<Rows>;
    const int g = lane / 4, t = lane % 4;
    // Of columns 8t.. and 32 + 8t..; the bytes of column g of product j are 2j apart.
    const int8_t* scales[2] = {
        &stage.scales[8 * t / group][column + T::column_of(g / 2, 0, 0)],
        &stage.scales[(32 + 8 * t) / group][column + T::column_of(g / 2, 0, 0)]};
#pragma unroll
    for (int j = 0; j < T::NT; j += 2) {
        sync_warp();
        uint32_t both[4];  // lanes 0-7 and 8-15 name the first product's two chunks, 16-31 the next
        load_matrix_x4(both, stage.b + (column + 8 * j) * 32 +
                                 PackedRows::offset(lane % 8 + lane / 16 * 8, lane / 8 % 2));
        uint32_t b[2][2][2];  // product, part of eight, half of 64
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const uint32_t four = *reinterpret_cast<const uint32_t*>(scales[half] + 2 * j);
#pragma unroll
            for (int n = 0; n < 2; n++) {
                uint32_t weights[2];
                const int scale = int8_t(four >> 8 * (2 * n + g % 2));
                decode(weights, both[2 * n + half], table, scale);
                b[n][0][half] = weights[0], b[n][1][half] = weights[1];
            }
        }
#pragma unroll
        for (int i = 0; i < T::MT; i++) {
            sync_warp();
            uint32_t a[2][4];
#pragma unroll
            for (int part = 0; part < 4; part++) {
                const int chunk = part / 2 * 2 + t / 2;
                const uint2 eight = *reinterpret_cast<const uint2*>(
                    stage.a + (row + 16 * i) * 64 + WideRows::offset(g + part % 2 * 8, chunk) +
                    t % 2 * 8);
                a[0][part] = eight.x, a[1][part] = eight.y;
            }
            product<TURING>(sums[i][j], a, b[0]);
            product<TURING>(sums[i][j + 1], a, b[1]);
        }
    }
}

template <bool TURING, class Tp, int Rows>
__global__ void __launch_bounds__(THREADS<Rows>, BLOCKS<Rows>)
    w4a8_gemm_kernel(const GemmW4A4Up op, const Levels levels) {
    using T = Tile<Rows>;
    constexpr int DEPTH = STAGES<TURING, Rows>;
    Stage<Rows>* ring = reinterpret_cast<Stage<Rows>*>(dynamic_shared());
    const int groups = int(op.K / GROUP), group = int(levels.group), per_group = GROUP / group;
    wait_for_previous_kernel();
    const Corner corner = corner_of_block(op.M, op.N, Rows, blockIdx.x);
#pragma unroll
    for (int s = 0; s < DEPTH - 1; s++) {
        if (s < groups) issue<Rows>(ring[s], s, corner, op, per_group);
        copy_async_commit();
    }
    const Table table(levels.table);
    const int lane = threadIdx.x % 32, row = T::first_row(threadIdx.x),
              column = T::first_column(threadIdx.x);
    int sums[T::MT][T::NT][4] = {};
    int full = 0, empty = DEPTH - 1;  // the stage to compute with and the one to fill
    for (int k = 0; k < groups; k++) {
        copy_async_wait<DEPTH - 2>();
        sync_block();  // everybody's copies of this stage have landed, and everybody is done with
                       // the empty one
        if (k + DEPTH - 1 < groups) issue<Rows>(ring[empty], k + DEPTH - 1, corner, op, per_group);
        copy_async_commit();
        multiply_group<TURING, Rows>(sums, ring[full], table, group, row, column, lane);
        empty = full;
        full = full + 1 == DEPTH ? 0 : full + 1;
    }
    copy_async_wait<0>();
    const Corner at_last = corner_of_block(op.M, op.N, Rows, recomputed(blockIdx.x));
    const int thread = recomputed(threadIdx.x);
    const Share<Tp, T> share(op, at_last, thread);
    const float* ascales = op.ascales + (op.M - share.rows);
    float exact[T::MT][T::NT][4];
#pragma unroll
    for (int i = 0; i < T::MT; i++)
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const float scale = 2 * i + half < share.rows ? ascales[2 * i + half] : 0.f;
#pragma unroll
            for (int j = 0; j < T::NT; j++)
#pragma unroll
                for (int n = 0; n < 2; n++)
                    exact[i][j][2 * half + n] = float(sums[i][j][2 * half + n]) * scale;
        }
    const float* scale = levels.channel_scale + (op.N - share.columns);
    finish_sums<Tp, T>(exact, scale, share, !TURING && op.out_dtype == dtype_of<Tp>());
    Store().finish<T>(exact, op, at_last, thread, nullptr);
}

}  // namespace nibble::cuda::w4a8
