// Which kernel computes a codebook linear, for which layout.
#pragma once

#include "../launch.cuh"
#include "gemm.cuh"
#include "gemv.cuh"

namespace nibble::cuda {

template <class T, class S>
void start_vq_gemm(const GemmVQ& a, const Target& target) {
    const unsigned columns = unsigned((a.N + S::COLUMNS - 1) / S::COLUMNS),
                   rows = unsigned((a.M + S::ROWS - 1) / S::ROWS);
    launch(vq_gemm_kernel<T, S>, {columns * rows}, S::THREADS, S::SHARED, target, a);
}

template <class T, class L>
void vq_gemm(const GemmVQ& a, const Target& target) {
    using Few = VqFewTokens<L>;
    using Some = VqSomeTokens<L>;
    using Many = VqManyTokens<L>;
    const int64_t large_tiles =
        (a.M + Many::ROWS - 1) / Many::ROWS * ((a.N + Many::COLUMNS - 1) / Many::COLUMNS);
    if (a.M <= Few::ROWS) return start_vq_gemm<T, Few>(a, target);
    // A large tile decodes a weight for twice the tokens, where there are enough of them, tiles for
    // every multiprocessor, and more shared memory than Turing's.
    const bool large = target.capability >= 80 && a.M > Some::ROWS &&
                       large_tiles >= multiprocessors(target.device);
    if (large) return start_vq_gemm<T, Many>(a, target);
    start_vq_gemm<T, Some>(a, target);
}

template <class X, class L, int TOKENS>
void start_vq_gemv(const GemmVQ& a, const Target& target) {
    const int64_t outputs = GEMV_OUTPUTS * GEMV_WARPS,
                  whole = (a.K + GEMV_STEP - 1) / GEMV_STEP * GEMV_STEP * TOKENS * 4;
    const unsigned blocks = unsigned((a.N + outputs - 1) / outputs),
                   tokens = unsigned((a.M + TOKENS - 1) / TOKENS);
    const size_t x = size_t(whole < GEMV_SHARED / 2 ? whole : GEMV_SHARED / 2);
    launch(vq_gemv_kernel<X, L, TOKENS>, {blocks * tokens}, 32 * GEMV_WARPS, L::BOOK_BYTES + x,
           target, a, int(tokens));
}

template <class X, class L>
void vq_of(const GemmVQ& a, const Target& target) {
    if constexpr (sizeof(X) == 2) {
        // Turing multiplies float16 alone. One token is bound by memory and lookups in either
        // kernel, and the one without the matrix unit starts faster.
        const bool multiplies = target.capability >= 80 || same<X, f16>;
        if (multiplies && a.M > 1) return vq_gemm<X, L>(a, target);
    }
    if constexpr (!same<X, f16>) {
        if (a.M > 1) return start_vq_gemv<X, L, 4>(a, target);
    }
    start_vq_gemv<X, L, 1>(a, target);
}

template <class X>
void vq_of(const GemmVQ& a, const Target& target) {
    if (a.bits == 8 && a.vector == 4) return vq_of<X, Layout<8, 4>>(a, target);
    if (a.bits == 6 && a.vector == 4) return vq_of<X, Layout<6, 4>>(a, target);
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
