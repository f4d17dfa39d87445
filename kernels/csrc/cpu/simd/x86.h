// What AVX2 and AVX-512 share. Included inside their namespaces, after <immintrin.h>.

// Beyond the end of memory it does nothing.
inline void prefetch(const void* p) { _mm_prefetch(reinterpret_cast<const char*>(p), _MM_HINT_T0); }

// Eight groups on: the processor's own prefetcher loses rows that are left after a few lines.
inline void prefetch_ahead(const uint8_t* row) {
    prefetch(reinterpret_cast<const void*>(reinterpret_cast<uintptr_t>(row) + 256));
}

inline __m256i load_u16(const uint16_t* p) {
    return _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}

inline float total_of_eight(__m256 x) {
    __m128 sum = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
    sum = _mm_add_ps(sum, _mm_movehl_ps(sum, sum));
    return _mm_cvtss_f32(_mm_add_ss(sum, _mm_shuffle_ps(sum, sum, 1)));
}

// 32 int32 codes, in order, -> 16 bytes of nibbles, low nibble first.
inline __m128i pack_nibbles(__m256i a, __m256i b, __m256i c, __m256i d) {
    const __m256i bytes = _mm256_packs_epi16(
        _mm256_packs_epi32(a, b), _mm256_packs_epi32(c, d));  // quarters: a0 b0 c0 d0 a1 b1 c1 d1
    const __m256i ordered =
        _mm256_permutevar8x32_epi32(bytes, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
    const __m256i pairs = _mm256_maddubs_epi16(_mm256_and_si256(ordered, _mm256_set1_epi8(15)),
                                               _mm256_set1_epi16(0x1001));  // even + 16 odd
    const __m256i packed = _mm256_packus_epi16(pairs, pairs);
    return _mm256_castsi256_si128(_mm256_permute4x64_epi64(packed, 0x08));
}

// Weights at columns k .. k + 8 of a row of codewords of D columns; codes are places in the
// codebook.
template <int D>
__m256 eight_of_codewords(const float* codebook, const uint16_t* codes, int64_t k) {
    const uint16_t* c = codes + k / D;
    if constexpr (D == 8)
        return _mm256_loadu_ps(codebook + c[0]);
    else if constexpr (D == 4)
        return _mm256_insertf128_ps(_mm256_castps128_ps256(_mm_loadu_ps(codebook + c[0])),
                                    _mm_loadu_ps(codebook + c[1]), 1);
    else {
        const __m128d low =
            _mm_loadh_pd(_mm_load_sd(reinterpret_cast<const double*>(codebook + c[0])),
                         reinterpret_cast<const double*>(codebook + c[1]));
        const __m128d high =
            _mm_loadh_pd(_mm_load_sd(reinterpret_cast<const double*>(codebook + c[2])),
                         reinterpret_cast<const double*>(codebook + c[3]));
        return _mm256_insertf128_ps(_mm256_castps128_ps256(_mm_castpd_ps(low)), _mm_castpd_ps(high),
                                    1);
    }
}

// Eight numbers of 16 - down bits out of eight bytes, shifted left by `up`: each is in the two
// bytes named by `places`, and its factor moves it to the top of 16 bits.
inline void spread_8(const uint8_t* bytes, const uint8_t places[16], const uint16_t factors[8],
                     int down, int up, uint16_t* numbers) {
    const __m128i pairs =
        _mm_shuffle_epi8(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(bytes)),
                         _mm_loadu_si128(reinterpret_cast<const __m128i*>(places)));
    const __m128i top =
        _mm_mullo_epi16(pairs, _mm_loadu_si128(reinterpret_cast<const __m128i*>(factors)));
    const __m128i low = _mm_srl_epi16(top, _mm_cvtsi32_si128(down));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(numbers),
                     _mm_sll_epi16(low, _mm_cvtsi32_si128(up)));
}

// out[c][r] = in[r][c]
inline void transpose_8x8(const float* in, int64_t in_stride, float* out, int64_t out_stride) {
    __m256 x[8], y[8];
    for (int r = 0; r < 4; ++r) {  // halves of rows r and r + 4 side by side
        const __m256 top = _mm256_loadu_ps(in + r * in_stride),
                     bottom = _mm256_loadu_ps(in + (r + 4) * in_stride);
        x[r] = _mm256_permute2f128_ps(top, bottom, 0x20);
        x[r + 4] = _mm256_permute2f128_ps(top, bottom, 0x31);
    }
    for (int half = 0; half < 8; half += 4) {
        const __m256 a = _mm256_unpacklo_ps(x[half], x[half + 1]),
                     b = _mm256_unpackhi_ps(x[half], x[half + 1]);
        const __m256 c = _mm256_unpacklo_ps(x[half + 2], x[half + 3]),
                     d = _mm256_unpackhi_ps(x[half + 2], x[half + 3]);
        y[half] = _mm256_shuffle_ps(a, c, 0x44);
        y[half + 1] = _mm256_shuffle_ps(a, c, 0xEE);
        y[half + 2] = _mm256_shuffle_ps(b, d, 0x44);
        y[half + 3] = _mm256_shuffle_ps(b, d, 0xEE);
    }
    for (int c = 0; c < 8; ++c) _mm256_storeu_ps(out + c * out_stride, y[c]);
}
