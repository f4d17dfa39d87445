// What kernel.cuh does with finished sums: adds the low-rank branch and the bias, rounds,
// and writes rows of `out`.
//
// A warp has 16 weight rows of each block of 64, and all tokens of the tile. Element e of a chunk
// is row g + 8 (e / 2 % 2) of these, token 8 (e / 4) + 2t + e % 2 of the chunk: as mma.sync has it,
// so mma.sync adds the low-rank branch onto the sums where they lie.
#pragma once

#include "tile.cuh"

namespace nibble::cuda::sm90 {

template <int Blocks, int Chunks>
using Sums = float[Blocks][Chunks][32];

// ---- low-rank branch ----------------------------------------------------------------------------

// Elements column, column + 1 of a row of R; zeros past its end, or all of it where the row is not
// there and `row` stands for another. No lane takes a way of its own: every product's warp is
// whole.
template <class T>
struct Pair {
    T x, y;
};
template <class T>
NIBBLE_DEVICE Pair<float> read_pair(const T* row, bool exists, int column, int R, bool paired) {
    const bool first = exists && column < R, second = exists && column + 1 < R;
    T x, y;
    if (paired) {  // R is even
        struct alignas(2 * sizeof(T)) Two {
            T x, y;
        } two = *reinterpret_cast<const Two*>(row + (first ? column : 0));
        x = two.x, y = two.y;
    } else {
        x = row[first ? column : 0], y = row[second ? column + 1 : 0];
    }
    return {first ? to_float(x) : 0.0f, second ? to_float(y) : 0.0f};
}

// With bfloat16 parameters h is rounded to them, as the layer's output will be: 16 columns of R a
// product. float16 would not do: h may pass its 65504, and has fewer of its bits below 6e-5. So
// there both sides are tf32, float16's 11 bits with float32's range, 8 columns a product; a lane's
// neighbouring columns are places t and t + 4 along k, of both sides alike.
template <int Blocks, int Chunks, class Param>
NIBBLE_DEVICE void add_low_rank(Sums<Blocks, Chunks>& acc, const Parameters<Param>& p, int row,
                                int token) {
    const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
    constexpr bool TF32 = same<Param, f16>;
    constexpr int PAIRS = TF32 ? 1 : 2;  // of a row's columns that a lane has
#pragma unroll 1
    for (int first = 0; first < p.R; first += 8 * PAIRS) {
        const int r = first + 2 * t;
        uint32_t a[Blocks][4];
#pragma unroll
        for (int block = 0; block < Blocks; block++)
#pragma unroll
            for (int i = 0; i < 2 * PAIRS; i++) {
                const int n = row + block * 64 + g + i % 2 * 8;
                const auto up = read_pair(p.proj_up + int64_t(n < p.N ? n : 0) * p.R, n < p.N,
                                          r + i / 2 * 8, p.R, p.paired);
                if constexpr (TF32)
                    a[block][i] = as_int(up.x), a[block][i + 2] = as_int(up.y);
                else
                    a[block][i] = pack2<Param>(up.x, up.y);
            }
#pragma unroll
        for (int j = 0; j < 8 * Chunks; j++) {
            sync_warp();  // and a fence for the compiler, which else loads for many products ahead
            uint32_t b[2];
            const int m = token + 8 * j + g;
            const float* of_token = p.h + (m < p.M ? m : 0) * p.h_stride;
#pragma unroll
            for (int i = 0; i < PAIRS; i++) {
                const auto h = read_pair(of_token, m < p.M, r + i * 8, p.R, p.paired);
                if constexpr (TF32)
                    b[0] = round_to_tf32(h.x), b[1] = round_to_tf32(h.y);
                else
                    b[i] = pack2<Param>(h.x, h.y);
            }
#pragma unroll
            for (int block = 0; block < Blocks; block++) {
                float* sums = &acc[block][j / 8][j % 8 * 4];
                float c[4] = {sums[0], sums[1], sums[2], sums[3]};
                if constexpr (TF32)
                    mma_tf32(c, a[block], b);
                else
                    mma_16bit<Param>(c, a[block], b);
#pragma unroll
                for (int i = 0; i < 4; i++) sums[i] = c[i];
            }
        }
    }
}

// The same for a float32 result, which would see h's rounding to 16 bits: without tensor cores.
// Rare, so it is simple instead of fast.
template <int Blocks, int Chunks, class Param>
NIBBLE_DEVICE void add_low_rank_float(Sums<Blocks, Chunks>& acc, const Parameters<Param>& p,
                                      int row, int token) {
    const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
    for (int r = 0; r < p.R; r++) {
        float up[2 * Blocks];
#pragma unroll
        for (int half = 0; half < 2 * Blocks; half++) {
            const int n = row + half / 2 * 64 + half % 2 * 8 + g;
            up[half] = n < p.N ? to_float(p.proj_up[int64_t(n) * p.R + r]) : 0.0f;
        }
        const float* from = p.h + (token + 2 * t) * p.h_stride + r;
#pragma unroll
        for (int column = 0; column < 16 * Chunks;
             column++, from += column % 2 ? p.h_stride : 7 * p.h_stride) {
            const float h = token + column / 2 * 8 + 2 * t + column % 2 < p.M ? *from : 0.0f;
#pragma unroll
            for (int half = 0; half < 2 * Blocks; half++) {
                float& sum =
                    acc[half / 2][column / 16][column / 2 % 8 * 4 + half % 2 * 2 + column % 2];
                sum = fmaf(up[half], h, sum);
            }
        }
    }
}

// ---- results ------------------------------------------------------------------------------------

template <int Blocks, int Chunks, class Param>
NIBBLE_DEVICE void add_bias(Sums<Blocks, Chunks>& acc, const Parameters<Param>& p, int row) {
    if (!p.bias) return;
#pragma unroll
    for (int half = 0; half < 2 * Blocks; half++) {
        const int n = row + half / 2 * 64 + half % 2 * 8 + threadIdx.x % 32 / 4;
        const float bias = n < p.N ? to_float(p.bias[n]) : 0.0f;
#pragma unroll
        for (int column = 0; column < 16 * Chunks; column++)
            acc[half / 2][column / 16][column / 2 % 8 * 4 + half % 2 * 2 + column % 2] += bias;
    }
}

// The sums lie across (neighbours along M); rows of `out` run along N. Each chunk is turned in
// shared memory, whose 16-byte units are exchanged by the token so that neither side meets a bank
// twice. `row` is the warpgroup's first.
template <class Out, int Blocks, int Chunks, class Param>
NIBBLE_DEVICE void write(const Sums<Blocks, Chunks>& acc, const Parameters<Param>& p, char* staging,
                         int row, int token) {
    constexpr int UNITS = 8 * Blocks;
    const int group = threadIdx.x / WARPGROUP, thread = threadIdx.x % WARPGROUP, warp = thread / 32,
              lane = thread % 32;
    Out* out = static_cast<Out*>(p.out);
#pragma unroll
    for (int chunk = 0; chunk < Chunks; chunk++) {
        sync_named(group, WARPGROUP);  // the chunk before has been read
#pragma unroll
        for (int block = 0; block < Blocks; block++)
#pragma unroll
            for (int j = 0; j < 8; j += 2) {
                const float* c = &acc[block][chunk][4 * j];
                const uint32_t r[4] = {pack2<Out>(c[0], c[1]), pack2<Out>(c[2], c[3]),
                                       pack2<Out>(c[4], c[5]), pack2<Out>(c[6], c[7])};
                const int to = 8 * (j + lane / 16) + lane % 8,
                          unit = 8 * block + 2 * warp + lane / 8 % 2;
                store_matrix_x4_transposed(staging + (to * UNITS + (unit ^ (to % 8))) * 16, r);
            }
        sync_named(group, WARPGROUP);
#pragma unroll
        for (int i = 0; i < CHUNK * UNITS / WARPGROUP; i++) {
            const int at = thread + i * WARPGROUP, from = at / UNITS, unit = at % UNITS;
            const int m = token + chunk * CHUNK + from, n = row + unit * 8;
            if (m >= p.M || n >= p.N) continue;
            const char* source = staging + (from * UNITS + (unit ^ (from % 8))) * 16;
            Out* target = out + int64_t(m) * p.N + n;
            if (p.N % 8 == 0) {
                *reinterpret_cast<uint4*>(target) = *reinterpret_cast<const uint4*>(source);
            } else {
                for (int e = 0; e < 8 && n + e < p.N; e++)
                    target[e] = reinterpret_cast<const Out*>(source)[e];
            }
        }
    }
}

// float32: the eight rows of a quad of lanes are one whole 32-byte sector of `out`.
template <int Blocks, int Chunks, class Param>
NIBBLE_DEVICE void write_float(const Sums<Blocks, Chunks>& acc, const Parameters<Param>& p, int row,
                               int token) {
    const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
#pragma unroll
    for (int i = 0; i < Blocks * Chunks * 32; i++) {
        const int n = row + i / (32 * Chunks) * 64 + i / 2 % 2 * 8 + g,
                  m = token + i / 4 % (8 * Chunks) * 8 + 2 * t + i % 2;
        if (n < p.N && m < p.M)
            static_cast<float*>(p.out)[int64_t(m) * p.N + n] = (&acc[0][0][0])[i];
    }
}

}  // namespace nibble::cuda::sm90
