// AVX-512 in terms of what the machine has: SIMDe (github.com/simd-everywhere/simde) under the
// intrinsics' own names.
#pragma once
#define SIMDE_ENABLE_NATIVE_ALIASES
#include <simde/x86/avx512.h>
#include <simde/x86/f16c.h>
#include <simde/x86/fma.h>

// What SIMDe 0.7.4 lacks, lane by lane.
namespace gaps {

template <class To, class From>
To cast(From from) {
    static_assert(sizeof(To) == sizeof(From), "a cast keeps the bits");
    To to;
    __builtin_memcpy(&to, &from, sizeof to);
    return to;
}

struct Floats {
    float v[16];
};
struct Ints {
    int32_t v[16];
};
struct Bytes {
    int8_t v[16];
};
struct Halves {
    uint16_t v[16];
};

inline __m512 to_float(__m512i x) {
    const Ints in = cast<Ints>(x);
    Floats out;
    for (int i = 0; i < 16; ++i) out.v[i] = static_cast<float>(in.v[i]);
    return cast<__m512>(out);
}

inline __m512i to_int(__m512 x) {
    const Floats in = cast<Floats>(x);
    Ints out;
    for (int i = 0; i < 16; ++i) out.v[i] = _mm_cvtss_si32(_mm_set_ss(in.v[i]));
    return cast<__m512i>(out);
}

inline __m512i shift_right_signed(__m512i x, int n) {
    Ints in = cast<Ints>(x);
    for (int32_t& lane : in.v) lane >>= n;
    return cast<__m512i>(in);
}

inline __m512i widen(__m256i x) {
    const Halves in = cast<Halves>(x);
    Ints out;
    for (int i = 0; i < 16; ++i) out.v[i] = in.v[i];
    return cast<__m512i>(out);
}

inline __m128i narrow_to_bytes(__m512i x) {
    const Ints in = cast<Ints>(x);
    Bytes out;
    for (int i = 0; i < 16; ++i) out.v[i] = static_cast<int8_t>(in.v[i]);
    return cast<__m128i>(out);
}

inline __m512i widen_bytes(__m128i x) {
    const Bytes in = cast<Bytes>(x);
    Ints out;
    for (int i = 0; i < 16; ++i) out.v[i] = in.v[i];
    return cast<__m512i>(out);
}

inline __m256i narrow(__m512i x) {
    const Ints in = cast<Ints>(x);
    Halves out;
    for (int i = 0; i < 16; ++i) out.v[i] = static_cast<uint16_t>(in.v[i]);
    return cast<__m256i>(out);
}

inline __m512 from_half(__m256i x) {
    struct Two {
        __m128i v[2];
    } in = cast<Two>(x);
    struct Both {
        __m256 v[2];
    } out = {{_mm256_cvtph_ps(in.v[0]), _mm256_cvtph_ps(in.v[1])}};
    return cast<__m512>(out);
}

inline __m256i to_half(__m512 x) {
    struct Two {
        __m256 v[2];
    } in = cast<Two>(x);
    struct Both {
        __m128i v[2];
    } out = {{_mm256_cvtps_ph(in.v[0], 0), _mm256_cvtps_ph(in.v[1], 0)}};
    return cast<__m256i>(out);
}

// Inside each quarter, or whole quarters: lane i comes from where `select` says.
inline __m512 permute(__m512 x, int select, bool quarters) {
    const Floats in = cast<Floats>(x);
    Floats out;
    for (int i = 0; i < 16; ++i) {
        const int from = select >> (quarters ? i / 4 : i % 4) * 2 & 3;
        out.v[i] = in.v[quarters ? from * 4 + i % 4 : i / 4 * 4 + from];
    }
    return cast<__m512>(out);
}

}  // namespace gaps

#define _mm512_cvtepi32_ps(x) gaps::to_float(x)
#define _mm512_cvtps_epi32(x) gaps::to_int(x)
#define _mm512_srai_epi32(x, n) gaps::shift_right_signed(x, n)
#define _mm512_cvtepu16_epi32(x) gaps::widen(x)
#define _mm512_cvtepi32_epi8(x) gaps::narrow_to_bytes(x)
#define _mm512_cvtepi8_epi32(x) gaps::widen_bytes(x)
#define _mm512_cvtepi32_epi16(x) gaps::narrow(x)
#define _mm512_cvtph_ps(x) gaps::from_half(x)
#define _mm512_cvtps_ph(x, rounding) gaps::to_half(x)
#define _mm512_permute_ps(x, select) gaps::permute(x, select, false)
#define _mm512_shuffle_f32x4(x, same, select) \
    gaps::permute(x, select, true)  // both operands are one in this code
