// Which kernel computes a codebook linear, for which layout.
#pragma once

#include "gemm.cuh"
#include "gemv.cuh"

namespace nibble::cuda {

template <class X, class L>
void vq_of(const GemmVQ& a, const Target& target) {
    if constexpr (sizeof(X) == 2) {
        // Turing multiplies float16 alone. One token is bound by memory and lookups in either
        // kernel, and the one without the matrix unit starts faster.
        const bool multiplies = target.capability >= 80 || std::is_same_v<X, f16>;
        if (multiplies && a.M > 1) return vq_gemm<X, L>(a, target);
    }
    if constexpr (!std::is_same_v<X, f16>) {
        if (a.M > 1) return start_vq_gemv<X, L, 4>(a, target);
    }
    start_vq_gemv<X, L, 1>(a, target);
}

template <class X>
void vq_of(const GemmVQ& a, const Target& target) {
    if (a.bits == 8 && a.vector == 4) return vq_of<X, Layout<8, 4>>(a, target);
    if (a.bits == 6 && a.vector == 2) return vq_of<X, Layout<6, 2>>(a, target);
    if (a.bits == 8 && a.vector == 2) return vq_of<X, Layout<8, 2>>(a, target);
    throw std::invalid_argument("gemm_vq on a GPU has no kernel for indices of " +
                                std::to_string(a.bits) + " bits and " + std::to_string(a.vector) +
                                " columns a codeword");
}

// One source for each type of x, so that they compile side by side.
void vq_bf16(const GemmVQ& a, const Target& target);
void vq_f16(const GemmVQ& a, const Target& target);
void vq_f32(const GemmVQ& a, const Target& target);

}  // namespace nibble::cuda
