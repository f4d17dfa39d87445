// The product of 4-bit floats: out = (codes . W^T, scaled per 16 columns) * weight_scale_2
// + h . proj_up^T + bias, for GPUs of compute capability 12.0 and 12.1.
//
// One instruction multiplies 64 columns of 16 x 8 outputs and takes their scales with it, so
// nothing is rescaled on the way: 32 products a group and warp, 8 reads of shared memory for their
// operands and 4 for their scales. Tiles, their order in shared memory and the store are the
// integer product's (../gemm_w4a4/tile.cuh, store.cuh); operands and scales lie as in the file.
//
// A stage of the ring holds two groups of 64 columns, 64 bytes of a row, whose four pieces are
// copied by four neighbouring threads. Scales of four groups are 16 bytes of a row: they come with
// every second stage, into one of two places of their own. By count a tile of 128 x 128 asks 17.5
// bytes a clock and multiprocessor of the L2 cache at full rate and one of 256 x 128 13.2; not yet
// measured.
#pragma once

#include "../../nibble.h"
#include "../gemm_w4a4/store.cuh"
#include "../primitives_sm120.cuh"
#include "lowrank.cuh"

namespace nibble::cuda::nvfp4 {

constexpr int GROUPS = 2;        // of a stage
constexpr int SCALE_GROUPS = 4;  // whose scales are copied together
constexpr int SCALE_BYTES = 16;  // of a row in such a piece
constexpr int GROUP_SCALES = 4;  // bytes of a row's scales of one group
template <int Rows>
constexpr int STAGES = Rows == 128 ? 2 : 3;
template <int Rows>
constexpr int BLOCKS = Rows == 256 ? 1 : 2;

template <int Rows>
struct Shared {
    struct Stage {
        alignas(16) uint8_t a[GROUPS][Rows * 32];
        uint8_t b[GROUPS][COLUMNS * 32];
    } ring[STAGES<Rows>];
    uint32_t scales[2][Rows + COLUMNS][SCALE_GROUPS];  // of A's rows, then of B's
    NIBBLE_DEVICE static int offset(int place, int chunk) {
        return place * 32 + ((chunk ^ (place >> 2 & 1)) << 4);
    }
};

// Copies a stage; what lies outside of the matrices becomes zero, codes and scales.
template <int Rows>
class Loader {
    using S = Shared<Rows>;
    static constexpr int PASS = THREADS<Rows> / 4;  // rows that all threads copy at once

public:
    NIBBLE_DEVICE static void issue(S& shared, int stage, int step, Corner corner,
                                    const GemmNvfp4Up& op) {
        const int thread = int(threadIdx.x), piece = thread % 4, groups = int(op.K / GROUP);
        const bool present = GROUPS * step + piece / 2 < groups;
        const int64_t bytes = op.K / 2, at = int64_t(step) * 64 + 16 * piece;
        typename S::Stage& to = shared.ring[stage];
        copy<Rows>(to.a[piece / 2], static_cast<const uint8_t*>(op.q) + at, bytes, corner.row,
                   int(op.M), present, [](int row) { return Tile<Rows>::place_of_row(row); });
        copy<COLUMNS>(to.b[piece / 2], static_cast<const uint8_t*>(op.weight) + at, bytes,
                      corner.column, int(op.N), present,
                      [](int column) { return Tile<Rows>::place_of_column(column); });
        if (step % (SCALE_GROUPS / GROUPS) == 0)
            issue_scales(shared, step / (SCALE_GROUPS / GROUPS), corner, op);
    }

private:
    template <int Count, class Place>
    NIBBLE_DEVICE static void copy(uint8_t* to, const uint8_t* from, int64_t bytes, int first,
                                   int limit, bool present, Place place) {
        const int row = int(threadIdx.x) / 4, chunk = int(threadIdx.x) % 2;
#pragma unroll
        for (int p = 0; p < Count; p += PASS)
            copy_async16(to + S::offset(place(row + p), chunk), from + (first + row + p) * bytes,
                         present && first + row + p < limit);
    }

    NIBBLE_DEVICE static void issue_scales(S& shared, int quad, Corner corner,
                                           const GemmNvfp4Up& op) {
        const int64_t bytes = op.K / 16, at = int64_t(quad) * SCALE_BYTES;
        const bool whole = bytes % SCALE_BYTES == 0;  // else rows begin at multiples of 4 bytes
#pragma unroll
        for (int p = 0; p < Rows + COLUMNS; p += THREADS<Rows>) {
            const int row = int(threadIdx.x) + p;
            if (row >= Rows + COLUMNS) break;
            const bool of_a = row < Rows;
            const int index = of_a ? corner.row + row : corner.column + row - Rows;
            const bool valid = index < (of_a ? op.M : op.N);
            const uint8_t* from = static_cast<const uint8_t*>(of_a ? op.ascales : op.weight_scale) +
                                  index * bytes + at;
            uint32_t* to = shared.scales[quad % 2][row];
            if (whole) {
                copy_async16(to, from, valid);
            } else {
#pragma unroll
                for (int w = 0; w < SCALE_GROUPS; w++)
                    copy_async4(to + w, from + GROUP_SCALES * w,
                                valid && at + GROUP_SCALES * w < bytes);
            }
        }
    }
};

// Products of row tile I with all columns: the lanes that give scales are part of the instruction.
template <class T, int I, int J = 0>
NIBBLE_DEVICE void multiply_row(float (&sums)[T::MT][T::NT][4], const uint32_t (&a)[4],
                                const uint32_t (&b)[T::NT][2],
                                const uint32_t (&scales_a)[T::MT / 2],
                                const uint32_t (&scales_b)[T::NT / 4]) {
    mma_nvfp4<I % 2, J % 4>(sums[I][J], a, b[J], scales_a[I / 2], scales_b[J / 4]);
    if constexpr (J + 1 < T::NT) multiply_row<T, I, J + 1>(sums, a, b, scales_a, scales_b);
}
template <class T, int I = 0>
NIBBLE_DEVICE void multiply_rows(float (&sums)[T::MT][T::NT][4], const uint8_t* rows,
                                 const uint32_t (&b)[T::NT][2],
                                 const uint32_t (&scales_a)[T::MT / 2],
                                 const uint32_t (&scales_b)[T::NT / 4]) {
    uint32_t a[4];
    load_matrix_x4(a, rows + 16 * I * 32);
    multiply_row<T, I>(sums, a, b, scales_a, scales_b);
    if constexpr (I + 1 < T::MT) multiply_rows<T, I + 1>(sums, rows, b, scales_a, scales_b);
}

// sums += one group of a warp's share, which begins at (row, column) of the tile. Lane (g, t) holds
// the scales of column g of products 4x + t, and of row g + 8 (t % 2) of products 2x + t / 2.
template <int Rows>
NIBBLE_DEVICE void multiply_group(float (&sums)[Tile<Rows>::MT][Tile<Rows>::NT][4],
                                  const uint8_t* rows, const uint8_t* columns,
                                  const uint32_t (*scales)[SCALE_GROUPS], int row, int column,
                                  int lane) {
    using T = Tile<Rows>;
    using S = Shared<Rows>;
    const int g = lane / 4, t = lane % 4;
    uint32_t b[T::NT][2], scales_a[T::MT / 2], scales_b[T::NT / 4];
#pragma unroll
    for (int x = 0; x < T::MT / 2; x++)
        scales_a[x] = scales[row + T::row_of(g, 2 * x + t / 2, t % 2)][0];
#pragma unroll
    for (int x = 0; x < T::NT / 4; x++)
        scales_b[x] = scales[Rows + column + T::column_of(g / 2, 4 * x + t, g % 2)][0];
#pragma unroll
    for (int j = 0; j < T::NT; j += 2) {  // lanes 0-7 and 8-15 name the first product's two chunks,
                                          // 16-31 those of the next
        uint32_t both[4];
        load_matrix_x4(both, columns + (column + 8 * j) * 32 +
                                 S::offset(lane % 8 + lane / 16 * 8, lane / 8 % 2));
        b[j][0] = both[0], b[j][1] = both[1], b[j + 1][0] = both[2], b[j + 1][1] = both[3];
    }
    multiply_rows<T>(sums, rows + row * 32 + S::offset(lane % 16, lane / 16), b, scales_a,
                     scales_b);
}

// The part of the integer product's struct that the branch and the store read.
NIBBLE_DEVICE GemmW4A4Up as_integer_product(const GemmNvfp4Up& op) {
    GemmW4A4Up plain = {};
    plain.M = op.M, plain.N = op.N, plain.R = op.R;
    plain.h = op.h, plain.h_stride = op.R;
    plain.proj_up = op.proj_up, plain.bias = op.bias;
    plain.out = op.out, plain.out_dtype = op.out_dtype;
    return plain;
}

template <class Tp, int Rows>
__global__ void __launch_bounds__(THREADS<Rows>, BLOCKS<Rows>) gemm_kernel(const GemmNvfp4Up op) {
    using T = Tile<Rows>;
    constexpr int DEPTH = STAGES<Rows>;
    Shared<Rows>& shared = *reinterpret_cast<Shared<Rows>*>(dynamic_shared());
    const int steps = (int(op.K / GROUP) + GROUPS - 1) / GROUPS;
    const Corner corner = corner_of_block(op.M, op.N, Rows, blockIdx.x);
#pragma unroll
    for (int s = 0; s < DEPTH - 1; s++) {
        if (s < steps) Loader<Rows>::issue(shared, s, s, corner, op);
        copy_async_commit();
    }
    const int lane = threadIdx.x % 32, row = T::first_row(threadIdx.x),
              column = T::first_column(threadIdx.x);
    float sums[T::MT][T::NT][4] = {};
    int full = 0, empty = DEPTH - 1;  // the stage to compute with and the one to fill
    for (int step = 0; step < steps; step++) {
        copy_async_wait<DEPTH - 2>();
        sync_block();  // everybody's copies of this stage have landed, and everybody is done with
                       // the empty one
        if (step + DEPTH - 1 < steps)
            Loader<Rows>::issue(shared, empty, step + DEPTH - 1, corner, op);
        copy_async_commit();
        const typename Shared<Rows>::Stage& stage = shared.ring[full];
#pragma unroll 1
        for (int s = 0; s < GROUPS; s++) {
            const int place = (step * GROUPS + s) % SCALE_GROUPS;
            multiply_group<Rows>(sums, stage.a[s], stage.b[s],
                                 reinterpret_cast<const uint32_t (*)[SCALE_GROUPS]>(
                                     &shared.scales[step * GROUPS / SCALE_GROUPS % 2][0][place]),
                                 row, column, lane);
        }
        empty = full;
        full = full + 1 == DEPTH ? 0 : full + 1;
    }
    copy_async_wait<0>();
    const GemmW4A4Up plain = as_integer_product(op);
    const Corner at_last = corner_of_block(op.M, op.N, Rows, recomputed(blockIdx.x));
    const int thread = recomputed(threadIdx.x);
    const Share<Tp, T> share(plain, at_last, thread);
    const float* scale = op.weight_scale_2 + at_last.column + T::first_column(thread) +
                         T::column_of(thread % 4, 0, 0);
    finish_sums<Tp, T>(sums, scale, share, op.out_dtype == dtype_of<Tp>());
    Store().finish<T>(sums, plain, at_last, thread, nullptr);
}

}  // namespace nibble::cuda::nvfp4
