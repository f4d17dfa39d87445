// AVX2 + FMA + F16C: the vocabulary that the .inl files are written in, eight floats at a time.

constexpr int LANES = 8;
using F = __m256;
using I = __m256i;

inline F zero() { return _mm256_setzero_ps(); }
inline F splat(float x) { return _mm256_set1_ps(x); }
inline F load(const float* p) { return _mm256_loadu_ps(p); }
inline void store(float* p, F x) { _mm256_storeu_ps(p, x); }
inline F add(F a, F b) { return _mm256_add_ps(a, b); }
inline F sub(F a, F b) { return _mm256_sub_ps(a, b); }
inline F mul(F a, F b) { return _mm256_mul_ps(a, b); }
inline F div(F a, F b) { return _mm256_div_ps(a, b); }
inline F fma(F a, F b, F c) { return _mm256_fmadd_ps(a, b, c); }
// Where one of the two operands is NaN, the second comes out.
inline F maximum(F a, F b) { return _mm256_max_ps(a, b); }
inline F minimum(F a, F b) { return _mm256_min_ps(a, b); }

inline I splat_int(int x) { return _mm256_set1_epi32(x); }
inline I bits(F x) { return _mm256_castps_si256(x); }
inline F from_bits(I x) { return _mm256_castsi256_ps(x); }
inline I and_(I a, I b) { return _mm256_and_si256(a, b); }
inline I or_(I a, I b) { return _mm256_or_si256(a, b); }
inline I xor_(I a, I b) { return _mm256_xor_si256(a, b); }
inline I andnot(I not_a, I b) { return _mm256_andnot_si256(not_a, b); }
inline I add_int(I a, I b) { return _mm256_add_epi32(a, b); }
inline I sub_int(I a, I b) { return _mm256_sub_epi32(a, b); }
inline I max_int(I a, I b) { return _mm256_max_epi32(a, b); }
inline I min_int(I a, I b) { return _mm256_min_epi32(a, b); }
template <int N>
I shift_left(I x) {
    return _mm256_slli_epi32(x, N);
}
template <int N>
I shift_right(I x) {
    return _mm256_srli_epi32(x, N);
}
template <int N>
I shift_right_signed(I x) {
    return _mm256_srai_epi32(x, N);
}
inline void store_int(void* p, I x) { _mm256_storeu_si256(static_cast<__m256i*>(p), x); }
inline I load_int(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }
// LANES signed bytes.
inline I widen_bytes(const int8_t* p) {
    return _mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
}
inline F to_float(I x) { return _mm256_cvtepi32_ps(x); }
inline I round_to_int(F x) { return _mm256_cvtps_epi32(x); }  // half to even

inline int largest(I x) {
    __m128i m = _mm_max_epi32(_mm256_castsi256_si128(x), _mm256_extracti128_si256(x, 1));
    m = _mm_max_epi32(m, _mm_shuffle_epi32(m, 0x4E));
    return _mm_cvtsi128_si32(_mm_max_epi32(m, _mm_shuffle_epi32(m, 0xB1)));
}

inline float total(F x) { return total_of_eight(x); }

inline F load_half(const uint16_t* p) {
    return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
inline F load_bf16(const uint16_t* p) { return from_bits(shift_left<16>(load_u16(p))); }
inline void store_half(uint16_t* p, F x) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(x, 0));
}

// The lowest 16 bits of each lane.
inline void store_u16(uint16_t* p, I x) {
    const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(x, x), 0x08);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_castsi256_si128(packed));
}

template <int D>
F codewords(const float* codebook, const uint16_t* codes, int64_t k) {
    return eight_of_codewords<D>(codebook, codes, k);
}

// The 32 bytes (one group of 64 codes) of eight rows, as eight vectors: words[d] holds the 4 bytes
// at 4 d of every row, row by row. `rows` are `stride` bytes apart; only the first `valid` exist,
// and the last of them stands in for the others.
template <bool ALL>
void transpose_eight(const uint8_t* rows, int64_t stride, int valid, I words[8]) {
    const auto row = [&](int r) { return rows + (ALL || r < valid ? r : valid - 1) * stride; };
    for (int r = 0; r < 8; ++r) prefetch_ahead(row(r));
    for (int half = 0; half < 2; ++half) {
        const auto part = [&](int r) {
            return _mm_loadu_si128(reinterpret_cast<const __m128i*>(row(r) + 16 * half));
        };
        I x[4];
        for (int r = 0; r < 4; ++r)
            x[r] = _mm256_inserti128_si256(_mm256_castsi128_si256(part(r)), part(r + 4), 1);
        const I a = _mm256_unpacklo_epi32(x[0], x[1]), b = _mm256_unpackhi_epi32(x[0], x[1]);
        const I c = _mm256_unpacklo_epi32(x[2], x[3]), d = _mm256_unpackhi_epi32(x[2], x[3]);
        words[4 * half] = _mm256_unpacklo_epi64(a, c);
        words[4 * half + 1] = _mm256_unpackhi_epi64(a, c);
        words[4 * half + 2] = _mm256_unpacklo_epi64(b, d);
        words[4 * half + 3] = _mm256_unpackhi_epi64(b, d);
    }
}

inline void load_words(const uint8_t* rows, int64_t stride, int valid, I words[8]) {
    if (valid >= 8)
        transpose_eight<true>(rows, stride, valid, words);
    else
        transpose_eight<false>(rows, stride, valid, words);
}

inline void pack_group(const I codes[8], uint8_t* q) {
    for (int i = 0; i < 2; ++i) {
        const __m128i packed =
            pack_nibbles(codes[4 * i], codes[4 * i + 1], codes[4 * i + 2], codes[4 * i + 3]);
        _mm_storeu_si128(reinterpret_cast<__m128i*>(q + 16 * i), packed);
    }
}

// 64 codes, in order, a byte each.
inline void store_bytes(const I codes[8], uint8_t* q) {
    const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
    for (int i = 0; i < 2; ++i) {
        const I* four = codes + 4 * i;
        const __m256i bytes = _mm256_packs_epi16(_mm256_packs_epi32(four[0], four[1]),
                                                 _mm256_packs_epi32(four[2], four[3]));
        store_int(q + 32 * i, _mm256_permutevar8x32_epi32(bytes, order));
    }
}

// Butterflies between lanes: (a, b) -> (a + b, a - b) for lanes that differ in one bit of their
// number.
inline F butterflies(F x) {
    const F s1 = _mm256_setr_ps(0.f, -0.f, 0.f, -0.f, 0.f, -0.f, 0.f, -0.f);
    const F s2 = _mm256_setr_ps(0.f, 0.f, -0.f, -0.f, 0.f, 0.f, -0.f, -0.f);
    const F s4 = _mm256_setr_ps(0.f, 0.f, 0.f, 0.f, -0.f, -0.f, -0.f, -0.f);
    x = _mm256_add_ps(_mm256_permute_ps(x, 0xB1), _mm256_xor_ps(x, s1));
    x = _mm256_add_ps(_mm256_permute_ps(x, 0x4E), _mm256_xor_ps(x, s2));
    return _mm256_add_ps(_mm256_permute2f128_ps(x, x, 1), _mm256_xor_ps(x, s4));
}

// ---- 4-bit weights of a few tokens (w4a16.inl) --------------------------------------------------

#include "few_codes.inl"

// A row's next dwords; here a vector is a group.
inline I load_dwords(const uint8_t* p) {
    return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
}
inline I load_last_dwords(const uint8_t* p) { return load_dwords(p); }
inline F scales_of_vector(const float* scales, int64_t stride, int64_t vector) {
    return splat(scales[vector * stride]);
}

// ---- the int4 product's inner loop --------------------------------------------------------------

// Tiles of 32 outputs of a task, side by side: with more, an L2 of 512 KB overflows.
constexpr int MOST_TILES = 1;

constexpr int ROWS = 4;      // tokens at once
constexpr int FMA_ROWS = 6;  // and in floating point, where no register holds codes

// Starting values of the sums that make up for weights stored as code + 8: two int16 a token, -8
// times the sum of its codes in either half of the quads. A half's products then stay within
// 32 * 8 * 127 = 32512, whatever wraps around on the way.
inline I offset(I first, I second) {
    const I low = sub_int(splat_int(0), shift_left<3>(first));
    const I high = sub_int(splat_int(0), shift_left<3>(second));
    return or_(and_(low, splat_int(0xFFFF)), shift_left<16>(high));
}
