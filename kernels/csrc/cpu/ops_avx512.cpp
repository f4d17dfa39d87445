// x86 with AVX-512 F, BW, VL, DQ and VNNI. Flags: -mavx512f -mavx512bw -mavx512vl -mavx512dq
// -mavx512vnni -mavx2 -mfma -mf16c, or /arch:AVX512.
#include "isa.h"

#ifdef NIBBLE_X86
#include <cstring>
#if defined(__GNUC__) && \
    !defined(__clang__)  // GCC's own headers define undefined vectors by themselves
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif
#ifdef NIBBLE_SIMDE  // a test runs this file on processors without AVX-512
#include "avx512_by_simde.h"
#else
#include <immintrin.h>
#endif

#include "threads.h"

#ifdef __GNUC__
#define NIBBLE_UNROLL_16 _Pragma("GCC unroll 16")
#define NIBBLE_LIKELY(condition) __builtin_expect(condition, 1)
#else
#define NIBBLE_UNROLL_16
#define NIBBLE_LIKELY(condition) (condition)
#endif
#define NIBBLE_DOT "simd/dot_avx512.inl"
#define NIBBLE_DOT_WHOLE "simd/whole_avx512.inl"

namespace nibble::cpu {
namespace {
#include "simd/x86.h"
#include "simd/avx512.h"
#include "kernels.inl"
}  // namespace

const Ops ops_avx512{quantize_down, gemm_w4a4_up, gemm_w4a4_up_gelu_quantize_down, w4a16, w4a16,
                     gemm_vq,       linear_w4a8};

}  // namespace nibble::cpu
#endif
