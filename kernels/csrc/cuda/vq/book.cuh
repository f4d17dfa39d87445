// A codebook in shared memory, and a lane's indices: what both codebook kernels read weights
// through.
//
// A lane decodes 16 neighbouring columns of a group of 64, so its indices are 16 / D * BITS bits:
// 3, 4, 6 or 8 bytes that begin at a whole byte. Lanes look up codewords at random, and those that
// meet in a bank wait for one another: 8 bytes a lane take about 6 turns instead of 2 (16 lanes at
// random over 16 pairs of banks, twice). So the codebook lies there in COPIES interleaved copies,
// and lane l reads copy l % COPIES, whose words lie in banks of their own. 16 KB of copies leave 3
// turns for 8 bits and 4 columns, 1 a word for 6 bits (8 KB for 4 columns).
#pragma once

#include "../../nibble.h"
#include "../primitives.cuh"

namespace nibble::cuda {

template <int BITS_, int D_>
struct Layout {
    static constexpr int BITS = BITS_, D = D_, CODEWORDS = 1 << BITS_,
                         WORD = 2 * D_;  // bytes of a codeword
    static constexpr int LANE_BYTES = 16 / D_ * BITS_ / 8, GROUP_BYTES = 4 * LANE_BYTES;
    static constexpr int FIT = 16384 / (CODEWORDS * WORD), MOST = 128 / WORD,
                         COPIES = FIT < MOST ? FIT : MOST;
    static constexpr int BOOK_BYTES = CODEWORDS * WORD * COPIES;
    static_assert(FIT > 0 &&
                  (LANE_BYTES == 3 || LANE_BYTES == 4 || LANE_BYTES == 6 || LANE_BYTES == 8));
};

// All copies, in the type T of the product's operands, from float16. Ends without a barrier.
template <class L, class T>
NIBBLE_DEVICE void stage_book(char* book, const GemmVQ& a, int threads) {
    const uint32_t* from = static_cast<const uint32_t*>(a.codebook);
    constexpr int PAIRS = L::D / 2;
    for (int i = int(threadIdx.x); i < L::CODEWORDS * PAIRS; i += threads) {
        const uint32_t pair = from[i];
        const uint32_t word =
            same<T, f16> ? pair : pack2<T>(low_half<f16>(pair), high_half<f16>(pair));
        char* to = book + i / PAIRS * (L::WORD * L::COPIES) + i % PAIRS * 4;
#pragma unroll
        for (int copy = 0; copy < L::COPIES; copy++)
            *reinterpret_cast<uint32_t*>(to + copy * L::WORD) = word;
    }
}

// The indices of 16 columns, the first one lowest: lane t's of a group whose bytes begin at `from`,
// which is a multiple of 4.
template <class L>
NIBBLE_DEVICE uint64_t lane_indices(const char* from, int t) {
    const uint32_t* words = reinterpret_cast<const uint32_t*>(from) + L::LANE_BYTES * t / 4;
    if constexpr (L::LANE_BYTES == 3) {  // lane 3's lie in the last of three words
        const uint32_t second = reinterpret_cast<const uint32_t*>(from)[t < 2 ? 1 : 2];
        return (words[0] | uint64_t(second) << 32) >> 8 * (3 * t % 4);
    }
    if constexpr (L::LANE_BYTES == 4) return words[0];
    const uint64_t two = words[0] | uint64_t(words[1]) << 32;
    return L::LANE_BYTES == 6 && t % 2 ? two >> 16 : two;
}

// Columns 4 s .. 4 s + 3 of the lane's 16, as two pairs. `book`: the lane's copy.
template <class L>
NIBBLE_DEVICE uint2 four_weights(const char* book, uint64_t indices, int s) {
    constexpr uint32_t MASK = L::CODEWORDS - 1;
    constexpr int STEP = L::WORD * L::COPIES;
    if constexpr (L::D == 4) {
        return *reinterpret_cast<const uint2*>(book +
                                               (uint32_t(indices >> (s * L::BITS)) & MASK) * STEP);
    } else {
        const uint32_t both = uint32_t(indices >> (2 * s * L::BITS));
        return {*reinterpret_cast<const uint32_t*>(book + (both & MASK) * STEP),
                *reinterpret_cast<const uint32_t*>(book + (both >> L::BITS & MASK) * STEP)};
    }
}

// Element i of a scale or bias.
NIBBLE_DEVICE float parameter(const void* values, Dtype dtype, int64_t i) {
    if (dtype == Dtype::f32) return static_cast<const float*>(values)[i];
    return dtype == Dtype::f16 ? to_float(static_cast<const f16*>(values)[i])
                               : to_float(static_cast<const bf16*>(values)[i]);
}

// (scale, bias) of an output.
NIBBLE_DEVICE float2 scale_and_bias(const GemmVQ& a, int64_t n) {
    return {a.scale && n < a.N ? parameter(a.scale, a.param_dtype, n) : 1.0f,
            a.bias && n < a.N ? parameter(a.bias, a.param_dtype, n) : 0.0f};
}

// What is stored for a sum: sum * scale + bias + addend.
template <class X>
NIBBLE_DEVICE X finished(const GemmVQ& a, float sum, float2 with, int64_t m, int64_t n) {
    const float y = fmaf(sum, with.x, with.y);
    return from_float<X>(a.addend ? y + to_float(static_cast<const X*>(a.addend)[m * a.N + n]) : y);
}

}  // namespace nibble::cuda
