// The fused int4 product: one kernel for every GPU whose matrix unit is driven by mma.sync.
//
// A block computes ROWS x 128 of out. K is walked in groups of 64: a stage of the ring in shared
// memory holds one group of both operands, as they lie in the file, and its scales. A group's
// integer sums are exact; they are scaled and added to fp32 sums, which begin as the low-rank
// branch plus bias. So whatever K is, nothing is stored before the end.
//
// Matrix units are fast; what could bound the kernel is the rescaling: M * N * K / 64 sums, each to
// be turned into a float, multiplied by two scales and added. So integer sums start from the bits
// of MAGIC = 1.5 * 2^23 instead of 0. While |sum| < 2^22 the register, read as a float, is MAGIC +
// sum exactly, for in [2^23, 2^24) neighbouring floats are 1 apart. Then
//     fma(as_float(register), ws, -MAGIC * ws) = sum * ws      and      fma(that, as, out)
// are all that is left: no conversion, no separate product. It is exact:
//   - |sum| <= 64 * 15 * 8 = 7680 (13 bits), times UNIT = 256 where bytes are 16 * code: 1966080 <
//   2^22; with activations of 8 bits 64 * 127 * 8 = 65024, times 16: 1040384;
//   - ws has at most 11 significant bits (float16; bfloat16 8), so MAGIC * ws, of 2 bits more, is a
//   float and -MAGIC * ws is exact;
//     dividing ws by UNIT moves the exponent only: the smallest ws, 2^-133 (subnormal bfloat16),
//     becomes 2^-141, still above 2^-149;
//   - fma rounds once, and sum * ws has at most 13 + 11 = 24 significant bits: nothing is rounded
//   at all. (Sums of 8-bit codes have 16 bits: there a product is rounded, once.)
// A weight_scale that is not finite, or of more than 2.7e31 (MAGIC * ws overflows), makes its
// output NaN.
#pragma once

#include "../../nibble.h"
#include "lowrank.cuh"
#include "mma.cuh"
#include "tile.cuh"
#include "../primitives.cuh"

namespace nibble::cuda {

constexpr float MAGIC = 12582912.f;
constexpr int MAGIC_BITS = 0x4B400000;

// Copies STEP groups into a stage: of each 16 bytes of two rows of either operand a thread, a
// token's scale and the scales of two columns. What lies outside of the matrix becomes zero.
// Addresses are computed anew each time: it is a few instructions a round, and four pointers would
// be eight of the registers that the products need. Without asynchronous copies `issue` loads into
// registers and `land` stores them, with the round's computing in between.
template <class Mma, class Tp, int Rows>
class Loader {
    using G = Group<Mma, Tp, Rows>;
    static constexpr int PASS =
        THREADS<Rows> / 2;  // rows that all threads copy at once, two of them a row
    // Bytes of a row of A, and 16-byte chunks of it a thread, 32 bytes apart.
    static constexpr int A_ROW = Mma::ROW_BYTES, CHUNKS = A_ROW / 32;
    static constexpr int PASSES_A = Rows > PASS ? Rows / PASS : 1, PASSES_B = COLUMNS / PASS;

public:
    NIBBLE_DEVICE Loader(Corner corner, int thread)
        : corner_(corner),
          to_a_(Mma::offset(Tile<Rows>::place_of_row(thread / 2), thread % 2)),
          to_b_(G::B + PackedRows::offset(Tile<Rows>::place_of_column(thread / 2), thread % 2)) {}

    // `groups` of the STEP from `group` on exist.
    NIBBLE_DEVICE void issue(G* stage, int group, int groups, const GemmW4A4Up& op) {
        const int row0 = recomputed(corner_.row), column0 = recomputed(corner_.column);
        const int rows = int(op.M) - row0, columns = int(op.N) - column0;
        const int thread = int(threadIdx.x), row = thread / 2,
                  column = 2 * (thread - FIRST_OF_PAIRS);
        const int64_t bytes = op.K / 2, pass = bytes * PASS, at = 32 * group + 16 * (thread % 2);
        const int64_t a_bytes = bytes * CHUNKS, a_pass = a_bytes * PASS;
        const uint8_t* a = static_cast<const uint8_t*>(op.q) + (row0 + row) * a_bytes +
                           A_ROW * group + 16 * (thread % 2);
        const uint8_t* b = static_cast<const uint8_t*>(op.weight) + (column0 + row) * bytes + at;
        const float* ascales = op.ascales + group * op.M + (row0 + thread);
        const Tp* pair =
            static_cast<const Tp*>(op.weight_scale) + group * op.N + (column0 + column);
        char* to = reinterpret_cast<char*>(stage);
#pragma unroll
        for (int s = 0; s < STEP<Mma, Rows>; s++, to += sizeof(G)) {
            if (s && groups <= s) break;
#pragma unroll
            for (int p = 0; p < PASSES_A; p++)
                if (copies_a(thread))
#pragma unroll
                    for (int c = 0; c < CHUNKS; c++)
                        copy(to + (to_a_ ^ 32 * c) + p * PASS * A_ROW,
                             a + p * a_pass + A_ROW * s + 32 * c, row + p * PASS < rows,
                             codes_a_[p][c]);
#pragma unroll
            for (int p = 0; p < PASSES_B; p++)
                copy(to + to_b_ + p * PASS * 32, b + p * pass + 32 * s, row + p * PASS < columns,
                     codes_b_[p]);
            if (thread < Rows)
                copy(to + G::ASCALES + 4 * thread, ascales + s * op.M, thread < rows, token_scale_);
            if (column >= 0) {
                const Tp* two = pair + s * op.N;
                if (op.N % 2) {  // rows begin at odd addresses: no copy of 4 bytes can read them
                    pair_scales_ = column < columns ? two[0].bits : 0;
                    if (column + 1 < columns) pair_scales_ |= uint32_t(two[1].bits) << 16;
                    if constexpr (Mma::ASYNC)
                        *reinterpret_cast<uint32_t*>(to + G::WEIGHT_SCALES + 2 * column) =
                            pair_scales_;
                } else {
                    copy(to + G::WEIGHT_SCALES + 2 * column, two, column < columns, pair_scales_);
                }
            }
        }
    }

    NIBBLE_DEVICE void land(G* stage) const {
        if constexpr (!Mma::ASYNC) {
            char* to = reinterpret_cast<char*>(stage);
            const int thread = int(threadIdx.x), column = 2 * (thread - FIRST_OF_PAIRS);
#pragma unroll
            for (int p = 0; p < PASSES_A; p++)
                if (copies_a(thread))
#pragma unroll
                    for (int c = 0; c < CHUNKS; c++)
                        *reinterpret_cast<uint4*>(to + (to_a_ ^ 32 * c) + p * PASS * A_ROW) =
                            codes_a_[p][c];
#pragma unroll
            for (int p = 0; p < PASSES_B; p++)
                *reinterpret_cast<uint4*>(to + to_b_ + p * PASS * 32) = codes_b_[p];
            if (thread < Rows)
                *reinterpret_cast<uint32_t*>(to + G::ASCALES + 4 * thread) = token_scale_;
            if (column >= 0)
                *reinterpret_cast<uint32_t*>(to + G::WEIGHT_SCALES + 2 * column) = pair_scales_;
        }
    }

private:
    static constexpr int FIRST_OF_PAIRS = THREADS<Rows> - COLUMNS / 2;
    NIBBLE_DEVICE static bool copies_a(int thread) { return Rows >= PASS || thread < 2 * Rows; }
    NIBBLE_DEVICE static void copy(void* to, const void* from, bool valid, uint4& held) {
        if constexpr (Mma::ASYNC)
            copy_async16(to, from, valid);
        else
            held = valid ? *static_cast<const uint4*>(from) : uint4{0, 0, 0, 0};
    }
    NIBBLE_DEVICE static void copy(void* to, const void* from, bool valid, uint32_t& held) {
        if constexpr (Mma::ASYNC)
            copy_async4(to, from, valid);
        else
            held = valid ? *static_cast<const uint32_t*>(from) : 0;
    }

    Corner corner_;
    int to_a_, to_b_;
    uint4 codes_a_[PASSES_A][CHUNKS], codes_b_[PASSES_B];
    uint32_t token_scale_, pair_scales_;
};

// sums += one group of a warp's share, which begins at (row, column) of the tile.
//
// AT_ONCE products' columns at a time: what belongs to them (fragments, scales, -MAGIC * scales)
// fills 24 registers where all eight would fill 48. Fragments of A are loaded anew for the next,
// one instruction for AT_ONCE products.
//
// sync_warp is a fence for the compiler and hardly an instruction: without it fragments are loaded
// long before they are needed, and there are not registers enough for that.
template <class Mma, class Tp, int Rows, bool Unsigned>
NIBBLE_DEVICE void multiply_group(float (&sums)[Tile<Rows>::MT][Tile<Rows>::NT][4],
                                  const Group<Mma, Tp, Rows>& group, int row, int column,
                                  int lane) {
    using T = Tile<Rows>;
    constexpr int AT_ONCE = Mma::AT_ONCE;
    const int g = lane / 4, t = lane % 4;
    const int magic[4] = {MAGIC_BITS, MAGIC_BITS, MAGIC_BITS, MAGIC_BITS};
#pragma unroll
    for (int first = 0; first < T::NT; first += AT_ONCE) {
        sync_warp();
        uint32_t b[AT_ONCE][2];
#pragma unroll
        for (int j = 0; j < AT_ONCE; j += 2) {  // lanes 0-7 and 8-15 name the first product's two
                                                // chunks, 16-31 those of the next
            uint32_t both[4];
            load_matrix_x4(both, group.b + (column + 8 * (first + j)) * 32 +
                                     PackedRows::offset(lane % 8 + lane / 16 * 8, lane / 8 % 2));
            b[j][0] = both[0], b[j][1] = both[1], b[j + 1][0] = both[2], b[j + 1][1] = both[3];
        }
        using Words = pick<AT_ONCE == 4, uint4, uint2>;
        alignas(16) uint32_t packed[AT_ONCE];
        *reinterpret_cast<Words*>(packed) = *reinterpret_cast<const Words*>(
            &group.weight_scales[column + T::column_of(t, first, 0)]);
        float ws[AT_ONCE][2], minus_magic_ws[AT_ONCE][2];
#pragma unroll
        for (int j = 0; j < AT_ONCE; j++) {
            ws[j][0] = low_half<Tp>(packed[j]) * (1.f / Mma::UNIT),
            ws[j][1] = high_half<Tp>(packed[j]) * (1.f / Mma::UNIT);
            minus_magic_ws[j][0] = -MAGIC * ws[j][0], minus_magic_ws[j][1] = -MAGIC * ws[j][1];
        }
#pragma unroll
        for (int i = 0; i < T::MT; i++) {
            sync_warp();
            uint32_t a[Mma::FRAGMENT];
            Mma::load(a, group.a + (row + 16 * i) * Mma::ROW_BYTES, lane);
            const float2 as =
                *reinterpret_cast<const float2*>(&group.ascales[row + T::row_of(g, i, 0)]);
#pragma unroll
            for (int j = 0; j < AT_ONCE; j++) {
                if (Mma::UNIT > 1 || !Mma::ASYNC)
                    sync_warp();  // widened fragments, or what `issue` holds, need registers too
                int dot[4];
                Mma::template product<Unsigned>(dot, a, b[j], magic);
#pragma unroll
                for (int e = 0; e < 4; e++) {
                    const float scaled =
                        fmaf(as_float(dot[e]), ws[j][e % 2], minus_magic_ws[j][e % 2]);
                    sums[i][first + j][e] =
                        fmaf(scaled, e / 2 ? as.y : as.x, sums[i][first + j][e]);
                }
            }
        }
    }
}

template <class Mma, class Tp, int Rows, bool Unsigned, class Epilogue>
__global__ void __launch_bounds__(THREADS<Rows>, BLOCKS<Mma, Rows>)
    gemm_w4a4(GemmW4A4Up op, Epilogue epilogue) {
    using T = Tile<Rows>;
    using Stage = Group<Mma, Tp, Rows>[STEP<Mma, Rows>];
    constexpr int DEPTH = STAGES<Mma, Rows>;
    Stage* ring = reinterpret_cast<Stage*>(dynamic_shared());
    const int groups = int(op.K / GROUP);
    wait_for_previous_kernel();

    const Corner corner = corner_of_block(op.M, op.N, Rows, blockIdx.x);
    Loader<Mma, Tp, Rows> loader(corner, int(threadIdx.x));
#pragma unroll
    for (int s = 0; s < DEPTH - 1; s++) {
        const int left = groups - s * STEP<Mma, Rows>;
        if (left > 0) {
            loader.issue(ring[s], s * STEP<Mma, Rows>, left, op);
            loader.land(ring[s]);
        }
        copy_async_commit();
    }
    float sums[T::MT][T::NT][4];
    const Corner again = corner_of_block(op.M, op.N, Rows, recomputed(blockIdx.x));
    low_rank_and_bias<Mma, Tp, T>(sums, op, Share<Tp, T>(op, again, recomputed(threadIdx.x)));

    const int lane = recomputed(threadIdx.x) & 31, row = T::first_row(threadIdx.x),
              column = T::first_column(threadIdx.x);
    int full = 0, empty = DEPTH - 1;  // the stage to compute with and the one to fill: the one that
                                      // was computed with before
    for (int left = groups; left > 0; left -= STEP<Mma, Rows>) {
        copy_async_wait<DEPTH - 2>();
        sync_block();  // everybody's copies of this stage have landed, and everybody is done with
                       // the empty one
        const int ahead = left - (DEPTH - 1) * STEP<Mma, Rows>;
        if (ahead > 0) loader.issue(ring[empty], groups - ahead, ahead, op);
        copy_async_commit();
        const int present = left < STEP<Mma, Rows> ? left : STEP<Mma, Rows>;
#pragma unroll 1
        for (int s = 0; s < present; s++) {
            // Counted from the end: a counter from the beginning is a register more.
            if (Unsigned && (left - s) * GROUP > int(op.K) - int(op.unsigned_from))
                multiply_group<Mma, Tp, Rows, false>(sums, ring[full][s], row, column, lane);
            else
                multiply_group<Mma, Tp, Rows, Unsigned>(sums, ring[full][s], row, column, lane);
        }
        if (ahead > 0) loader.land(ring[empty]);
        empty = full;
        full = full + 1 == DEPTH ? 0 : full + 1;
    }
    const Corner at_last = corner_of_block(op.M, op.N, Rows, recomputed(blockIdx.x));
    epilogue.template finish<T>(sums, op, at_last, recomputed(threadIdx.x), dynamic_shared());
}

}  // namespace nibble::cuda
