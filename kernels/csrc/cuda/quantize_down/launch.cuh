// From quantize_down's struct to the kernel's instance: how many tokens a block takes, and the
// projection alone where the matrix unit cannot hold its numbers.
#pragma once

#include "../launch.cuh"
#include "kernel.cuh"

namespace nibble::cuda {

template <class X, class P, Form FORM, Codes FORMAT, int EIGHTS, int WARPS, int BLOCKS,
          int TILES = 1>
void start(const QuantizeDown& a, const Target& target) {
    constexpr int PARTIAL = WARPS * 8 * EIGHTS * SUMS_STRIDE * 4,
                  SHARED =
                      WARPS * WARP_BYTES<TILES> > PARTIAL ? WARPS * WARP_BYTES<TILES> : PARTIAL,
                  COLUMNS = TILES * DOWN_COLUMNS;
    const unsigned blocks = unsigned((a.M + 8 * EIGHTS - 1) / (8 * EIGHTS)),
                   columns = unsigned((a.R + COLUMNS - 1) / COLUMNS);
    launch(quantize_down_kernel<X, P, FORM, FORMAT, EIGHTS, WARPS, BLOCKS, TILES>,
           {blocks, columns ? columns : 1}, 32 * WARPS, SHARED, target, a);
}

// Tokens that the busiest multiprocessor gets.
inline int64_t busiest(int64_t M, int64_t tokens, int64_t multiprocessors) {
    const int64_t blocks = (M + tokens - 1) / tokens;
    return (blocks + multiprocessors - 1) / multiprocessors * tokens;
}

template <class X, class P, Form FORM, Codes FORMAT>
void start(const QuantizeDown& a, const Target& target) {
    // float32 fills the registers with 16 tokens, and where types differ the terms do.
    if constexpr (sizeof(X) == 2 && Terms<X, P>::template OF<X> == 1 &&
                  Terms<X, P>::template OF<P> == 1) {
        const int64_t gpu = multiprocessors(target.device), of_32 = busiest(a.M, 32, gpu),
                      of_40 = busiest(a.M, 40, gpu);
        // Three quarters of the multiprocessors busy with twice the tokens are as fast, and read
        // proj_down half as often.
        const bool many_tokens = (a.M + 31) / 32 * 4 >= gpu * 3;
        // 69 KB, more than Turing has.
        const bool fits = target.capability >= 80, fewer = of_40 < of_32;
        if (many_tokens && fits && a.R > DOWN_COLUMNS) {
            if constexpr (FORMAT != Codes::int8)  // they would spill registers on 12.0
                if (fewer) return start<X, P, FORM, FORMAT, 5, 8, 1, 3>(a, target);
            return start<X, P, FORM, FORMAT, 4, 8, 1, 3>(a, target);
        }
        if (many_tokens && fits && fewer) return start<X, P, FORM, FORMAT, 5, 12, 1>(a, target);
        if (many_tokens) return start<X, P, FORM, FORMAT, 4, 6, 2>(a, target);
    }
    start<X, P, FORM, FORMAT, 2, 12, 1>(a, target);
}

template <class X, class P, Codes FORMAT>
void quantize_down_of(const QuantizeDown& a, const Target& target) {
    // Turing multiplies float16 alone.
    const bool plain_product = target.capability < 80 && !Terms<X, P>::HALVES && a.R;
    QuantizeDown here = a;
    if (plain_product) {
        const unsigned blocks = unsigned((a.M + 31) / 32),
                       columns = unsigned((a.R + DOWN_COLUMNS - 1) / DOWN_COLUMNS);
        launch(down_kernel<X, P>, {blocks, columns}, 256, (32 * 68 + GROUP * 32) * 4, target, a);
        here.R = 0;
    }
    if (a.act_unsigned)
        start<X, P, Form::unsigned_codes, FORMAT>(here, target);
    else if (a.rotate)
        start<X, P, Form::rotated, FORMAT>(here, target);
    else
        start<X, P, Form::signed_codes, FORMAT>(here, target);
}

template <class X, Codes FORMAT>
void quantize_down_of(const QuantizeDown& a, const Target& target) {
    if (a.param_dtype == Dtype::bf16) return quantize_down_of<X, bf16, FORMAT>(a, target);
    if (a.param_dtype == Dtype::f16) return quantize_down_of<X, f16, FORMAT>(a, target);
    throw std::invalid_argument("quantize_down on a GPU takes parameters in bfloat16 or float16");
}

// One source for each type of x, so that they compile side by side, one for the codes that Hopper
// alone reads, and one for activations of 8 bits.
void quantize_down_bf16(const QuantizeDown& a, const Target& target);
void quantize_down_f16(const QuantizeDown& a, const Target& target);
void quantize_down_f32(const QuantizeDown& a, const Target& target);
void quantize_down_sm90(const QuantizeDown& a, const Target& target);
void quantize_down_int8(const QuantizeDown& a, const Target& target);

}  // namespace nibble::cuda
