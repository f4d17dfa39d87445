// The product of whole numbers in AVX2. Two int8 products fill the 16 bits of vpmaddubsw, so
// numbers are widened first and vpmaddwd adds pairs of products to int32: 16 multiply-adds an
// instruction, half of what the nibbles of dot_avx2.inl get, and no rescaling.

using Code8 = int16_t;
using Weight8 = int16_t;
using Table8 = __m256i;
constexpr int64_t STRETCH8 = 4;  // 16 KB of weights: half of L1
constexpr int ROWS8 = 6;  // 12 sums, two vectors of weights, one of codes: every register but one
constexpr int UNROLLED8 = 2;
constexpr int32_t OFFSET8 = 0;

inline Table8 table_of(const int8_t* levels) {
    return _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(levels)));
}

// Columns of every eight in the order 0 4, 2 6, 1 5, 3 7: bytes 0 and 2 of the even nibbles, bytes
// 1 and 3, and the same of the odd ones.
inline void store_codes8(const I codes[8], Code8* out) {
    const __m256i order = _mm256_setr_epi32(0, 4, 2, 6, 1, 5, 3, 7);
    for (int i = 0; i < 4; ++i) {
        const __m256i a = _mm256_permutevar8x32_epi32(codes[2 * i], order);
        const __m256i b = _mm256_permutevar8x32_epi32(codes[2 * i + 1], order);
        store_int(out + 16 * i, _mm256_permute4x64_epi64(_mm256_packs_epi32(a, b), 0xD8));
    }
}

// vpmulhrsw: with a level in the upper byte, ((level << 8) * scale + 2^14) >> 15 is
// (level * scale + 64) >> 7. -> (4, PANEL, 2) numbers from output n on.
inline void decode_eight(I word, Table8 table, I scale, Weight8* panel, int n) {
    const I nibbles = splat_int(0x0F0F0F0F), upper = splat_int(static_cast<int32_t>(0xFF00FF00u));
    for (int odd = 0; odd < 2; ++odd) {
        const I codes = and_(odd ? shift_right<4>(word) : word, nibbles);
        const I levels = _mm256_shuffle_epi8(table, codes);
        const I even_bytes = _mm256_mulhrs_epi16(_mm256_slli_epi16(levels, 8), scale);
        const I odd_bytes = _mm256_mulhrs_epi16(and_(levels, upper), scale);
        store_int(panel + (2 * odd * PANEL + n) * 2, even_bytes);
        store_int(panel + ((2 * odd + 1) * PANEL + n) * 2, odd_bytes);
    }
}

template <int R>
NIBBLE_NOINLINE void dot_whole(const Code8* codes, int64_t columns, const Weight8* panels,
                               int32_t* sums) {
    for (int p = 0; p < TILE_N / PANEL; ++p) {
        const Weight8* w = panels + p * STRETCH8 * GROUP * PANEL;
        __m256i sum[R][2];
        for (int r = 0; r < R; ++r)
            for (int v = 0; v < 2; ++v)
                sum[r][v] = load_int(sums + r * TILE_N + p * PANEL + v * LANES);
        for (int64_t k = 0; k < columns; k += 2 * UNROLLED8) {
            // The next tokens' codes: rows are too short for the processor's own prefetcher.
            if (p == 0 && k % 4 == 0) prefetch(codes + R * columns + k * 8);
            for (int u = 0; u < UNROLLED8; ++u, w += 2 * PANEL) {
                const __m256i w0 = load_int(w), w1 = load_int(w + PANEL);
                for (int r = 0; r < R; ++r) {
                    int32_t pair;
                    std::memcpy(&pair, codes + r * columns + k + 2 * u, 4);
                    const __m256i a = _mm256_set1_epi32(pair);
                    sum[r][0] = _mm256_add_epi32(sum[r][0], _mm256_madd_epi16(w0, a));
                    sum[r][1] = _mm256_add_epi32(sum[r][1], _mm256_madd_epi16(w1, a));
                    NIBBLE_IN_ORDER(sum[r][0], sum[r][1]);
                }
            }
        }
        for (int r = 0; r < R; ++r)
            for (int v = 0; v < 2; ++v)
                store_int(sums + r * TILE_N + p * PANEL + v * LANES, sum[r][v]);
    }
}
