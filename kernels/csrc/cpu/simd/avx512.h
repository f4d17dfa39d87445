// AVX-512 (F, BW, VL, DQ, VNNI): the vocabulary that the .inl files are written in, sixteen floats
// at a time.

constexpr int LANES = 16;
using F = __m512;
using I = __m512i;

inline F zero() { return _mm512_setzero_ps(); }
inline F splat(float x) { return _mm512_set1_ps(x); }
inline F load(const float* p) { return _mm512_loadu_ps(p); }
inline void store(float* p, F x) { _mm512_storeu_ps(p, x); }
inline F add(F a, F b) { return _mm512_add_ps(a, b); }
inline F sub(F a, F b) { return _mm512_sub_ps(a, b); }
inline F mul(F a, F b) { return _mm512_mul_ps(a, b); }
inline F div(F a, F b) { return _mm512_div_ps(a, b); }
inline F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
// Where one of the two operands is NaN, the second comes out.
inline F maximum(F a, F b) { return _mm512_max_ps(a, b); }
inline F minimum(F a, F b) { return _mm512_min_ps(a, b); }

inline I splat_int(int x) { return _mm512_set1_epi32(x); }
inline I bits(F x) { return _mm512_castps_si512(x); }
inline F from_bits(I x) { return _mm512_castsi512_ps(x); }
inline I and_(I a, I b) { return _mm512_and_si512(a, b); }
inline I or_(I a, I b) { return _mm512_or_si512(a, b); }
inline I xor_(I a, I b) { return _mm512_xor_si512(a, b); }
inline I andnot(I not_a, I b) { return _mm512_andnot_si512(not_a, b); }
inline I add_int(I a, I b) { return _mm512_add_epi32(a, b); }
inline I sub_int(I a, I b) { return _mm512_sub_epi32(a, b); }
inline I max_int(I a, I b) { return _mm512_max_epi32(a, b); }
inline I min_int(I a, I b) { return _mm512_min_epi32(a, b); }
template <int N>
I shift_left(I x) {
    return _mm512_slli_epi32(x, N);
}
template <int N>
I shift_right(I x) {
    return _mm512_srli_epi32(x, N);
}
template <int N>
I shift_right_signed(I x) {
    return _mm512_srai_epi32(x, N);
}
inline void store_int(void* p, I x) { _mm512_storeu_si512(p, x); }
inline I load_int(const void* p) { return _mm512_loadu_si512(p); }
// LANES signed bytes.
inline I widen_bytes(const int8_t* p) {
    return _mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
inline F to_float(I x) { return _mm512_cvtepi32_ps(x); }
inline I round_to_int(F x) { return _mm512_cvtps_epi32(x); }  // half to even

inline __m256i half_of(I x, int which) {
    return which ? _mm512_extracti64x4_epi64(x, 1) : _mm512_castsi512_si256(x);
}
inline I join(__m256i low, __m256i high) {
    return _mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1);
}

inline int largest(I x) {
    const __m256i eight = _mm256_max_epi32(half_of(x, 0), half_of(x, 1));
    __m128i m = _mm_max_epi32(_mm256_castsi256_si128(eight), _mm256_extracti128_si256(eight, 1));
    m = _mm_max_epi32(m, _mm_shuffle_epi32(m, 0x4E));
    return _mm_cvtsi128_si32(_mm_max_epi32(m, _mm_shuffle_epi32(m, 0xB1)));
}

inline float total(F x) {
    const __m256 low = _mm256_castsi256_ps(half_of(bits(x), 0));
    return total_of_eight(_mm256_add_ps(low, _mm256_castsi256_ps(half_of(bits(x), 1))));
}

inline F load_half(const uint16_t* p) {
    return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
inline F load_bf16(const uint16_t* p) {
    return from_bits(shift_left<16>(
        _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))));
}
inline void store_half(uint16_t* p, F x) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(x, 0));
}

// The lowest 16 bits of each lane.
inline void store_u16(uint16_t* p, I x) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(x));
}

template <int D>
F codewords(const float* codebook, const uint16_t* codes, int64_t k) {
    const __m256 low = eight_of_codewords<D>(codebook, codes, k),
                 high = eight_of_codewords<D>(codebook, codes, k + 8);
    return from_bits(join(_mm256_castps_si256(low), _mm256_castps_si256(high)));
}

// The 32 bytes (one group of 64 codes) of sixteen rows, as eight vectors: words[d] holds the 4
// bytes at 4 d of every row, row by row. `rows` are `stride` bytes apart; only the first `valid`
// exist, and the last of them stands in for the others.
template <bool ALL>
void transpose_sixteen(const uint8_t* rows, int64_t stride, int valid, I words[8]) {
    const auto row = [&](int r) { return rows + (ALL || r < valid ? r : valid - 1) * stride; };
    for (int r = 0; r < 16; ++r) prefetch_ahead(row(r));
    for (int half = 0; half < 2; ++half) {
        const auto part = [&](int r) {
            return _mm_loadu_si128(reinterpret_cast<const __m128i*>(row(r) + 16 * half));
        };
        I x[4];
        for (int r = 0; r < 4; ++r) {
            x[r] = _mm512_inserti32x4(_mm512_castsi128_si512(part(r)), part(r + 4), 1);
            x[r] = _mm512_inserti32x4(x[r], part(r + 8), 2);
            x[r] = _mm512_inserti32x4(x[r], part(r + 12), 3);
        }
        const I a = _mm512_unpacklo_epi32(x[0], x[1]), b = _mm512_unpackhi_epi32(x[0], x[1]);
        const I c = _mm512_unpacklo_epi32(x[2], x[3]), d = _mm512_unpackhi_epi32(x[2], x[3]);
        words[4 * half] = _mm512_unpacklo_epi64(a, c);
        words[4 * half + 1] = _mm512_unpackhi_epi64(a, c);
        words[4 * half + 2] = _mm512_unpacklo_epi64(b, d);
        words[4 * half + 3] = _mm512_unpackhi_epi64(b, d);
    }
}

inline void load_words(const uint8_t* rows, int64_t stride, int valid, I words[8]) {
    if (valid >= 16)
        transpose_sixteen<true>(rows, stride, valid, words);
    else
        transpose_sixteen<false>(rows, stride, valid, words);
}

inline void pack_group(const I codes[4], uint8_t* q) {
    for (int i = 0; i < 2; ++i) {
        const I a = codes[2 * i], b = codes[2 * i + 1];
        const __m128i packed =
            pack_nibbles(half_of(a, 0), half_of(a, 1), half_of(b, 0), half_of(b, 1));
        _mm_storeu_si128(reinterpret_cast<__m128i*>(q + 16 * i), packed);
    }
}

// 64 codes, in order, a byte each.
inline void store_bytes(const I codes[4], uint8_t* q) {
    for (int i = 0; i < 4; ++i)
        _mm_storeu_si128(reinterpret_cast<__m128i*>(q + 16 * i), _mm512_cvtepi32_epi8(codes[i]));
}

// Butterflies between lanes: (a, b) -> (a + b, a - b) for lanes that differ in one bit of their
// number.
inline F butterflies(F x) {
    const F minus = _mm512_sub_ps(_mm512_setzero_ps(), x);
    const F x1 = _mm512_add_ps(_mm512_permute_ps(x, 0xB1), _mm512_mask_blend_ps(0xAAAA, x, minus));
    const F m1 = _mm512_sub_ps(_mm512_setzero_ps(), x1);
    const F x2 = _mm512_add_ps(_mm512_permute_ps(x1, 0x4E), _mm512_mask_blend_ps(0xCCCC, x1, m1));
    const F m2 = _mm512_sub_ps(_mm512_setzero_ps(), x2);
    const F x4 =
        _mm512_add_ps(_mm512_shuffle_f32x4(x2, x2, 0xB1), _mm512_mask_blend_ps(0xF0F0, x2, m2));
    const F m4 = _mm512_sub_ps(_mm512_setzero_ps(), x4);
    return _mm512_add_ps(_mm512_shuffle_f32x4(x4, x4, 0x4E), _mm512_mask_blend_ps(0xFF00, x4, m4));
}

// ---- 4-bit weights of a few tokens (w4a16.inl) --------------------------------------------------

// Codes - 8 of a vector of dwords, by table: vpermps reads a lane's lowest four bits.
struct FewCodes {
    static constexpr float UNIT[8] = {1, 1, 1, 1, 1, 1, 1, 1};
    F table = _mm512_setr_ps(-8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7);
    template <int J>
    F of(I word) const {
        return _mm512_permutexvar_ps(J ? shift_right<4 * J>(word) : word, table);
    }
};

// A row's next dwords; here a vector is two groups, of which the last one may lack the second.
inline I load_dwords(const uint8_t* p) { return _mm512_loadu_si512(p); }
inline I load_last_dwords(const uint8_t* p) {
    const __m256i group = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    return join(group, _mm256_setzero_si256());
}
inline F scales_of_vector(const float* scales, int64_t stride, int64_t vector) {
    const float* first = scales + 2 * vector * stride;
    return _mm512_mask_blend_ps(0xFF00, splat(first[0]), splat(first[stride]));
}

// ---- the int4 product's inner loop --------------------------------------------------------------

// Tiles of 32 outputs of a task, side by side: 128 KB of sums with 256 tokens, in an L2 of 1 MB or
// more.
constexpr int MOST_TILES = 4;

constexpr int ROWS = 8;       // tokens at once
constexpr int FMA_ROWS = 12;  // and in floating point

// A sum begins at the bits of 1.5 * 2^23, so that as a float it is 1.5 * 2^23 + sum: nothing has to
// be converted. See dot_avx512.inl.
#define NIBBLE_SUMS_ARE_FLOATS
constexpr int32_t FLOAT_ZERO = 0x4B400000;

// Starting values of the sums that make up for weights stored as code + 8.
inline I offset(I first, I second) {
    return sub_int(splat_int(FLOAT_ZERO), shift_left<3>(add_int(first, second)));
}
