// Which of the two kernels computes a linear whose weights alone are 4-bit.
#pragma once

#include "gemm.cuh"
#include "gemv.cuh"

namespace nibble::cuda {

template <class X, class P>
void w4a16_of(const W4A16& a, const Target& target) {
    if constexpr (sizeof(X) == 2) {
        // One or two tokens are bound by memory in either kernel, and the one without the matrix
        // unit starts faster.
        const bool few_tokens = a.M <= 2;
        // Turing multiplies float16 alone.
        const bool multiplies = target.capability >= 80 || std::is_same_v<X, f16>;
        if (multiplies && !few_tokens) return gemm<X, P>(a, target);
    }
    // float32 keeps its precision: the weight is read once for eight tokens, from the second-level
    // cache after the first.
    gemv<X, P>(a, target);
}

template <class X>
void w4a16_of(const W4A16& a, const Target& target) {
    if (a.param_dtype == Dtype::bf16) return w4a16_of<X, bf16>(a, target);
    if (a.param_dtype == Dtype::f16) return w4a16_of<X, f16>(a, target);
    throw std::invalid_argument("4-bit weights on a GPU take scales in bfloat16 or float16");
}

// One source for each type of x, so that they compile side by side.
void w4a16_bf16(const W4A16& a, const Target& target);
void w4a16_f16(const W4A16& a, const Target& target);
void w4a16_f32(const W4A16& a, const Target& target);

}  // namespace nibble::cuda
