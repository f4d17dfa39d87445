// x . codebook[index]^T for one to four tokens at a time, in float32 throughout: bound by reading
// the indices and looking them up.
//
// A warp computes 8 outputs; of each its lanes read the indices of 32 neighbouring columns, so a
// step covers 1024. x lies in shared memory as in w4a16/gemv.cuh, the codebook beside it. FLUX's
// modulation at 2 bits, K = 3072, N = 18432: 14 MB of indices are 5 us at 3 TB/s (H100) and 14 us
// at 1 TB/s (RTX 4090). A lookup serves 4 columns, so 14 M of them are 0.44 M a warp: at 3 turns
// each 7 us on 132 multiprocessors of 1.7 GHz. Not measured yet.
#pragma once

#include "book.cuh"
#include "../w4a16/gemv.cuh"

namespace nibble::cuda {

// The indices of 32 columns of 8 outputs: two halves of 16.
struct Indices8 {
    uint64_t halves[GEMV_OUTPUTS][2];
};

template <class L>
NIBBLE_DEVICE void load_indices(Indices8& loads, const GemmVQ& a, int64_t first, int64_t column) {
    const int64_t row_bytes = a.K / L::D * L::BITS / 8,
                  at = column < a.K ? column / 16 * L::LANE_BYTES : 0;
#pragma unroll
    for (int r = 0; r < GEMV_OUTPUTS; r++) {
        // Outputs that do not exist read the last one's; columns that do not exist meet zeros of x.
        const int64_t row = first + r < a.N ? first + r : a.N - 1;
        const uint32_t* from = reinterpret_cast<const uint32_t*>(
            static_cast<const char*>(a.indices) + row * row_bytes + at);
        if constexpr (L::LANE_BYTES == 3) {  // begin at a multiple of 2 only
            const uint16_t* parts = reinterpret_cast<const uint16_t*>(from);
            loads.halves[r][0] = parts[0] | uint32_t(parts[1]) << 16;
            loads.halves[r][1] = parts[1] >> 8 | uint32_t(parts[2]) << 8;
        } else if constexpr (L::LANE_BYTES == 4) {
            const uint2 two = *reinterpret_cast<const uint2*>(from);
            loads.halves[r][0] = two.x, loads.halves[r][1] = two.y;
        } else if constexpr (L::LANE_BYTES == 6) {
            const uint32_t middle = from[1];
            loads.halves[r][0] = from[0] | uint64_t(middle) << 32;
            loads.halves[r][1] = middle >> 16 | uint64_t(from[2]) << 16;
        } else {
            const uint4 four = *reinterpret_cast<const uint4*>(from);
            loads.halves[r][0] = four.x | uint64_t(four.y) << 32,
            loads.halves[r][1] = four.z | uint64_t(four.w) << 32;
        }
    }
}

// y += the lane's 32 columns. x: eight pieces of 4 columns, 128 floats apart; tokens 1024 floats
// apart.
template <class L, int TOKENS>
NIBBLE_DEVICE void vq_step(float (&y)[TOKENS][GEMV_OUTPUTS], const Indices8& indices,
                           const float* x, const char* book) {
#pragma unroll
    for (int piece = 0; piece < 8; piece++) {
        sync_warp();  // or the compiler reads all pieces ahead and runs out of registers
        float4 four[TOKENS];
#pragma unroll
        for (int m = 0; m < TOKENS; m++)
            four[m] = *reinterpret_cast<const float4*>(x + m * GEMV_STEP + piece * 128);
#pragma unroll
        for (int r = 0; r < GEMV_OUTPUTS; r++) {
            const uint2 pairs = four_weights<L>(book, indices.halves[r][piece / 4], piece % 4);
            const float w[4] = {low_half<f16>(pairs.x), high_half<f16>(pairs.x),
                                low_half<f16>(pairs.y), high_half<f16>(pairs.y)};
#pragma unroll
            for (int m = 0; m < TOKENS; m++) y[m][r] = dot(four[m], w, y[m][r]);
        }
    }
}

// The sum over all lanes of output lane / 4, halving what each lane keeps.
NIBBLE_DEVICE float sum_over_lanes(float (&y)[GEMV_OUTPUTS], int lane) {
#pragma unroll
    for (int keep = GEMV_OUTPUTS / 2, mask = 16; keep; keep /= 2, mask /= 2)
#pragma unroll
        for (int i = 0; i < keep; i++) {
            const bool upper = lane & mask;
            const float other = shuffle_xor(upper ? y[i] : y[i + keep], mask);
            y[i] = (upper ? y[i + keep] : y[i]) + other;
        }
    const float sum = y[0] + shuffle_xor(y[0], 2);
    return sum + shuffle_xor(sum, 1);
}

template <class X, class L, int TOKENS>
__global__ void __launch_bounds__(32 * GEMV_WARPS, TOKENS == 1 ? 4 : 3)
    vq_gemv_kernel(const GemmVQ a, const int token_blocks) {
    constexpr int64_t SPAN = GEMV_SHARED / 2 / 4 / TOKENS;  // columns of x in shared memory
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int64_t first = (int64_t(blockIdx.x) / token_blocks * GEMV_WARPS + warp) * GEMV_OUTPUTS;
    const int64_t first_token = int64_t(blockIdx.x) % token_blocks * TOKENS;
    char* book = dynamic_shared();
    float* shared = reinterpret_cast<float*>(book + L::BOOK_BYTES);
    float y[TOKENS][GEMV_OUTPUTS] = {};
    Indices8 indices = {};
    if (a.K) load_indices<L>(indices, a, first, 32 * lane);
    stage_book<L, f16>(book, a, 32 * GEMV_WARPS);
    book += lane % L::COPIES * L::WORD;
    for (int64_t from = 0; from < a.K; from += SPAN) {
        const int64_t to = from + SPAN < a.K ? from + SPAN : a.K;
        if (from) sync_block();  // all warps have read what is there
        stage_x<X, TOKENS>(shared, a, first_token, from, to);
        sync_block();
        for (int64_t k = from; k < to; k += GEMV_STEP) {
            Indices8 next = {};
            if (k + GEMV_STEP < a.K) load_indices<L>(next, a, first, k + GEMV_STEP + 32 * lane);
            vq_step<L, TOKENS>(y, indices, shared + (k - from) * TOKENS + 4 * lane, book);
            indices = next;
        }
    }
    const int64_t n = first + lane / 4;
    const float2 with = scale_and_bias(a, n);
#pragma unroll
    for (int m = 0; m < TOKENS; m++) {
        const float sum = sum_over_lanes(y[m], lane);
        const int64_t token = first_token + m;
        if (lane % 4 == 0 && n < a.N && token < a.M)
            static_cast<X*>(a.out)[token * a.N + n] = finished<X>(a, sum, with, token, n);
    }
}

}  // namespace nibble::cuda
