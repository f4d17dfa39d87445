// Which of the two kernels computes a linear whose weights alone are 4-bit.
#pragma once

#include "../launch.cuh"
#include "gemm.cuh"
#include "gemv.cuh"

namespace nibble::cuda {

template <class T, class P, class S>
void start_gemm(const W4A16& a, const Target& target) {
    const unsigned columns = unsigned((a.N + S::COLUMNS - 1) / S::COLUMNS),
                   rows = unsigned((a.M + S::ROWS - 1) / S::ROWS);
    launch(w4a16_gemm_kernel<T, P, S>, {columns * rows}, S::THREADS, S::SHARED, target, a);
}

template <class T, class P>
void gemm(const W4A16& a, const Target& target) {
    const int64_t large_tiles = (a.M + ManyTokens::ROWS - 1) / ManyTokens::ROWS *
                                ((a.N + ManyTokens::COLUMNS - 1) / ManyTokens::COLUMNS);
    if (a.M <= FewTokens::ROWS) return start_gemm<T, P, FewTokens>(a, target);
    // A large tile decodes a weight for twice the tokens, where there are enough of them and tiles
    // for every multiprocessor.
    if (a.M > SomeTokens::ROWS && large_tiles >= multiprocessors(target.device))
        return start_gemm<T, P, ManyTokens>(a, target);
    start_gemm<T, P, SomeTokens>(a, target);
}

template <class X, class P, int TOKENS>
void start_gemv(const W4A16& a, const Target& target) {
    const int64_t outputs = GEMV_OUTPUTS * GEMV_WARPS,
                  whole = (a.K + GEMV_STEP - 1) / GEMV_STEP * GEMV_STEP * TOKENS * 4;
    const unsigned blocks = unsigned((a.N + outputs - 1) / outputs),
                   tokens = unsigned((a.M + TOKENS - 1) / TOKENS);
    const size_t shared = size_t(whole < GEMV_SHARED ? whole : GEMV_SHARED);
    launch(gemv_kernel<X, P, TOKENS>, {blocks * tokens}, 32 * GEMV_WARPS, shared, target, a,
           int(tokens));
}

template <class X, class P>
void gemv(const W4A16& a, const Target& target) {
    if (a.M == 1) return start_gemv<X, P, 1>(a, target);
    if (a.M == 2) return start_gemv<X, P, 2>(a, target);
    start_gemv<X, P, 4>(a, target);
}

template <class X, class P>
void w4a16_of(const W4A16& a, const Target& target) {
    if constexpr (sizeof(X) == 2) {
        // One or two tokens are bound by memory in either kernel, and the one without the matrix
        // unit starts faster.
        const bool few_tokens = a.M <= 2;
        // Turing multiplies float16 alone.
        const bool multiplies = target.capability >= 80 || same<X, f16>;
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
