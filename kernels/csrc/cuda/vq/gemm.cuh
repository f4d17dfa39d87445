// x . codebook[index]^T on the matrix unit, for x in 16 bits and more than one token. Indices are
// decoded where they are multiplied: a codeword is (half of) a register pair of the right operand,
// and the row's scale comes after the sum.
//
// A product may take its k in any order that both operands share. Lane t of four takes the columns
// 16 t .. 16 t + 15 of a group of 64, step s of them 4 s .. 4 s + 3: the first two as k = 2t, 2t +
// 1 and the others as k = 2t + 8, 2t + 9. So four columns of a codebook row are the two registers
// of the right operand as they lie, and 16 bytes of x are the left operand's for two steps.
//
// A tile of 128 x 128 by one group is 1 M multiply-adds: 1024 cycles of an A100's multiprocessor.
// Its 8 warps look up 64 times each, at 3 turns of shared memory 1536, halved by warps that decode
// for 64 rows instead of 32: 768, and 512 more to read x. Not measured yet.
#pragma once

#include "book.cuh"
#include "../w4a16/gemm.cuh"

namespace nibble::cuda {

// A block's tile and how its warps share it. A group of x and of indices is a stage.
template <class L, int WARPS_M, int WARPS_N, int TILES_M, int TILES_N, int STAGES_, int BLOCKS_>
struct VqTiling {
    using Book = L;
    static constexpr int M_WARPS = WARPS_M, M_TILES = TILES_M, N_TILES = TILES_N, STAGES = STAGES_,
                         BLOCKS = BLOCKS_;
    static constexpr int THREADS = 32 * WARPS_M * WARPS_N, ROWS = WARPS_M * TILES_M * 16,
                         COLUMNS = WARPS_N * TILES_N * 8;
    static constexpr int X_BYTES = ROWS * GROUP * 2,
                         STAGE_BYTES = X_BYTES + COLUMNS * L::GROUP_BYTES;
    static constexpr int SHARED = L::BOOK_BYTES + STAGES * STAGE_BYTES;
};

// The first two fit into Turing's 64 KB.
template <class L>
using VqFewTokens = VqTiling<L, 1, 4, 1, 2, 5, 3>;
template <class L>
using VqSomeTokens = VqTiling<L, 2, 4, 2, 4, 3, 2>;
template <class L>
using VqManyTokens = VqTiling<L, 2, 4, 4, 4, 3, 1>;

template <class S>
NIBBLE_DEVICE void vq_stage(char* shared, const GemmVQ& a, int group, int64_t first_row,
                            int64_t first_column) {
    using L = typename S::Book;
    char* x_tile = shared + L::BOOK_BYTES + group % S::STAGES * S::STAGE_BYTES;
    char* indices = x_tile + S::X_BYTES;
    const char* x = static_cast<const char*>(a.x) + int64_t(group) * 128;
    for (int i = int(threadIdx.x); i < S::ROWS * 8; i += S::THREADS) {
        const int64_t row = first_row + i / 8;
        const bool valid = row < a.M;
        copy_async16(x_tile + x_offset(i / 8, i % 8), x + (valid ? row * a.K * 2 + i % 8 * 16 : 0),
                     valid);
    }
    // A row of 12 or 24 bytes a group begins at a multiple of 4 only.
    constexpr int PIECE = L::GROUP_BYTES % 16 ? 4 : 16, PIECES = L::GROUP_BYTES / PIECE;
    const int64_t row_bytes = a.K / GROUP * L::GROUP_BYTES;
    const char* from = static_cast<const char*>(a.indices) + int64_t(group) * L::GROUP_BYTES;
    for (int i = int(threadIdx.x); i < S::COLUMNS * PIECES; i += S::THREADS) {
        const int64_t column = first_column + i / PIECES;
        const bool valid = column < a.N;
        const char* piece = from + (valid ? column * row_bytes + i % PIECES * PIECE : 0);
        if constexpr (PIECE == 16)
            copy_async16(indices + i * PIECE, piece, valid);
        else
            copy_async4(indices + i * PIECE, piece, valid);
    }
}

// sums += one group. `book`: the lane's copy.
template <class T, class S>
NIBBLE_DEVICE void vq_multiply_group(float (&sums)[S::M_TILES][S::N_TILES][4], const char* x_tile,
                                     const char* indices, const char* book, int lane) {
    using L = typename S::Book;
    const int g = lane / 4, t = lane % 4;
    uint64_t words[S::N_TILES];
#pragma unroll
    for (int n = 0; n < S::N_TILES; n++)
        words[n] = lane_indices<L>(indices + (8 * n + g) * L::GROUP_BYTES, t);
#pragma unroll
    for (int i = 0; i < 2; i++) {
        uint32_t left[2][S::M_TILES][4];
#pragma unroll
        for (int m = 0; m < S::M_TILES; m++)
#pragma unroll
            for (int half = 0; half < 2; half++) {
                const uint4 chunk = *reinterpret_cast<const uint4*>(
                    x_tile + x_offset(16 * m + 8 * half + g, 2 * t + i));
                left[0][m][half] = chunk.x, left[0][m][half + 2] = chunk.y;
                left[1][m][half] = chunk.z, left[1][m][half + 2] = chunk.w;
            }
#pragma unroll
        for (int step = 0; step < 2; step++)
#pragma unroll
            for (int n = 0; n < S::N_TILES; n++) {
                const uint2 pairs = four_weights<L>(book, words[n], 2 * i + step);
                const uint32_t right[2] = {pairs.x, pairs.y};
#pragma unroll
                for (int m = 0; m < S::M_TILES; m++) mma_16bit<T>(sums[m][n], left[step][m], right);
            }
    }
}

// Two neighbours of a row, of which the second or both may not exist.
template <class T>
NIBBLE_DEVICE void store_two(const GemmVQ& a, float even, float odd, const float2 (&with)[2],
                             int64_t row, int64_t column) {
    if (column >= a.N) return;
    T* to = static_cast<T*>(a.out) + row * a.N + column;
    const T first = finished<T>(a, even, with[0], row, column);
    if (column + 1 == a.N) {
        to[0] = first;
        return;
    }
    const T second = finished<T>(a, odd, with[1], row, column + 1);
    if (a.N % 2 == 0)
        *reinterpret_cast<uint32_t*>(to) = uint32_t(first.bits) | uint32_t(second.bits) << 16;
    else
        to[0] = first, to[1] = second;
}

template <class T, class S>
__global__ void __launch_bounds__(S::THREADS, S::BLOCKS) vq_gemm_kernel(const GemmVQ a) {
    using L = typename S::Book;
    const int thread = int(threadIdx.x), lane = thread % 32, warp_m = thread / 32 % S::M_WARPS,
              warp_n = thread / 32 / S::M_WARPS;
    // Blocks that follow one another share the rows of x, which are few, and read different
    // weights. All are along x: the other axes have 2^16 blocks at most.
    const unsigned across = unsigned((a.N + S::COLUMNS - 1) / S::COLUMNS);
    const int64_t first_row = int64_t(blockIdx.x / across) * S::ROWS,
                  first_column = int64_t(blockIdx.x % across) * S::COLUMNS;
    const int groups = int(a.K / GROUP);
    char* shared = dynamic_shared();
    const char* book = shared + lane % L::COPIES * L::WORD;
    float sums[S::M_TILES][S::N_TILES][4] = {};

#pragma unroll
    for (int group = 0; group < S::STAGES - 1; group++) {
        if (group < groups) vq_stage<S>(shared, a, group, first_row, first_column);
        copy_async_commit();
    }
    stage_book<L, T>(shared, a, S::THREADS);
    for (int group = 0; group < groups; group++) {
        copy_async_wait<S::STAGES - 2>();
        sync_block();  // the group's data are there (the first time the book too), and all warps
                       // are done with the one before
        if (group + S::STAGES - 1 < groups)
            vq_stage<S>(shared, a, group + S::STAGES - 1, first_row, first_column);
        copy_async_commit();
        const char* x_tile = shared + L::BOOK_BYTES + group % S::STAGES * S::STAGE_BYTES;
        vq_multiply_group<T, S>(sums, x_tile + warp_m * S::M_TILES * 16 * 128,
                                x_tile + S::X_BYTES + warp_n * S::N_TILES * 8 * L::GROUP_BYTES,
                                book, lane);
    }
    copy_async_wait<0>();

#pragma unroll
    for (int n = 0; n < S::N_TILES; n++) {
        const int64_t column = first_column + (warp_n * S::N_TILES + n) * 8 + 2 * (lane % 4);
        const float2 with[2] = {scale_and_bias(a, column), scale_and_bias(a, column + 1)};
#pragma unroll
        for (int m = 0; m < S::M_TILES; m++)
#pragma unroll
            for (int half = 0; half < 2; half++) {
                const int64_t row =
                    first_row + (warp_m * S::M_TILES + m) * 16 + 8 * half + lane / 4;
                if (row < a.M)
                    store_two<T>(a, sums[m][n][2 * half], sums[m][n][2 * half + 1], with, row,
                                 column);
            }
    }
}

}  // namespace nibble::cuda
