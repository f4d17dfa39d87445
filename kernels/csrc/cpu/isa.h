// The seven ops as compiled for one instruction set. Each ops_*.cpp defines one table; cpuid.cpp
// picks.
#pragma once

#include "../nibble.h"

#if !defined(NIBBLE_X86) && (defined(__x86_64__) || defined(_M_X64))
#define NIBBLE_X86 1
#endif

// An inner loop that is inlined into its caller shares the registers with it, and GCC then keeps
// sums in memory.
#ifdef _MSC_VER
#define NIBBLE_NOINLINE __declspec(noinline)
#else
#define NIBBLE_NOINLINE __attribute__((noinline))
#endif

namespace nibble::cpu {

// Up to so many tokens w4a16 goes from the file's bytes into the sums; for more of them decoding
// panels of weights first is faster.
constexpr int64_t FEW_TOKENS = 4;

// Up to so many tokens gemm_vq goes from the file's bytes into the sums of single outputs.
constexpr int64_t VQ_FEW_TOKENS = 2;
inline bool vq_by_rows(int64_t M, int vector) { return M <= VQ_FEW_TOKENS && vector > 1; }

// Whether gemm_vq looks products up instead of multiplying: a table of 16 tokens' products is to
// fit into half of L1, and to pay for itself.
inline bool vq_by_tables(int64_t N, int bits, int vector) {
    return vector > 1 && bits <= 8 && N >= (int64_t(1) << bits);
}

struct Ops {
    void (*quantize_down)(const QuantizeDown&, int threads);
    void (*gemm_w4a4_up)(const GemmW4A4Up&, int threads);
    void (*gemm_w4a4_up_gelu_quantize_down)(const GemmW4A4UpGeluQuantizeDown&, int threads);
    void (*gemv_w4a16)(const W4A16&, int threads);
    void (*gemm_w4a16)(const W4A16&, int threads);
    void (*gemm_vq)(const GemmVQ&, int threads);
    void (*linear_w4a8)(const LinearW4A8&, int threads);
};

extern const Ops ops_portable, ops_avx2, ops_avx512;

}  // namespace nibble::cpu
