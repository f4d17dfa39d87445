// x86 with AVX2, FMA and F16C. Flags: -mavx2 -mfma -mf16c, or /arch:AVX2.
#include "isa.h"

#ifdef NIBBLE_X86
#include <cstring>
#include <immintrin.h>

#include "threads.h"

// GCC would turn a group's additions into a tree, to shorten the chain, and run out of
// registers: 1.7 times the time of this order.
#ifdef __GNUC__
#define NIBBLE_IN_ORDER(a, b) __asm__("" : "+x"(a), "+x"(b))
#define NIBBLE_UNROLL_16 _Pragma("GCC unroll 16")
#else
#define NIBBLE_IN_ORDER(a, b)
#define NIBBLE_UNROLL_16
#endif
#define NIBBLE_DOT "simd/dot_avx2.inl"
#define NIBBLE_DOT_WHOLE "simd/whole_avx2.inl"

namespace nibble::cpu {
namespace {
#include "simd/x86.h"
#include "simd/avx2.h"
#include "kernels.inl"
}  // namespace

const Ops ops_avx2{quantize_down, gemm_w4a4_up, gemm_w4a4_up_gelu_quantize_down, w4a16, w4a16,
                   gemm_vq,       linear_w4a8};

}  // namespace nibble::cpu
#endif
