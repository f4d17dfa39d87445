// What this CPU's units can do at most, with operands in registers: products of 8-bit integers, and
// of floats. Built and called by bench_ops.py where a compiler is at hand; each function returns
// multiply-adds a second of the calling thread.
#include <immintrin.h>

#include <chrono>
#include <cstdint>

namespace {

constexpr int SUMS =
    10;  // independent, enough to cover the latency of a product on both of a core's units

template <class Steps>
double rate(Steps twenty_thousand_steps, double per_step) {
    using clock = std::chrono::steady_clock;
    double steps = 0, seconds = 0;
    for (const auto start = clock::now(); seconds < 0.2;
         seconds = std::chrono::duration<double>(clock::now() - start).count()) {
        twenty_thousand_steps();
        steps += 20000;
    }
    return steps * per_step / seconds;
}

}  // namespace

// A loop of which the compiler may keep all sums in registers; the empty asm hides from it that
// every step is the same.
#define STEPS(type, zero, constraint, ...)                            \
    [] {                                                              \
        type sums[SUMS];                                              \
        _Pragma("GCC unroll 16") for (auto& sum : sums) sum = zero;   \
        for (int i = 0; i < 20000; ++i) {                             \
            _Pragma("GCC unroll 16") for (int j = 0; j < SUMS; ++j) { \
                type& sum = sums[j];                                  \
                __VA_ARGS__;                                          \
                asm volatile("" : constraint(sum));                   \
            }                                                         \
        }                                                             \
    }

// 32 products and sums of pairs an instruction, and the 16-bit addition that no kernel can do
// without: AVX2's integer peak.
extern "C" double maddubs_rate() {
    return rate(STEPS(__m256i, _mm256_setzero_si256(), "+x",
                      {
                          __m256i codes = _mm256_set1_epi8(3);
                          asm volatile("" : "+x"(codes));
                          sum = _mm256_add_epi16(sum,
                                                 _mm256_maddubs_epi16(codes, _mm256_set1_epi8(1)));
                      }),
                SUMS * 32.0);
}

extern "C" double fma_rate() {
    return rate(STEPS(__m256, _mm256_setzero_ps(), "+x",
                      sum = _mm256_fmadd_ps(_mm256_set1_ps(0.5f), _mm256_set1_ps(0.25f), sum)),
                SUMS * 8.0);
}

#ifdef __AVX512VNNI__
// 64 products and their sums by four an instruction: the integer peak where VNNI is there.
extern "C" double vnni_rate() {
    return rate(STEPS(__m512i, _mm512_setzero_si512(), "+v",
                      sum = _mm512_dpbusd_epi32(sum, _mm512_set1_epi8(3), _mm512_set1_epi8(2))),
                SUMS * 64.0);
}
#endif
