// The product of whole numbers in AVX-512 VNNI: vpdpbusd, 64 multiply-adds an instruction, on
// weights stored as bytes with 128 added; a token's sums start with -128 times the sum of its
// codes.

using Code8 = int8_t;
using Weight8 = uint8_t;
using Table8 = __m512i;
constexpr int64_t STRETCH8 = 8;
constexpr int ROWS8 = 8;
constexpr int32_t OFFSET8 = 128;

inline Table8 table_of(const int8_t* levels) {
    return _mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(levels)));
}

// Columns of every eight in the order 0 2 4 6, 1 3 5 7: a dword's even nibbles, then its odd ones.
inline void store_codes8(const I codes[4], Code8* out) {
    const I order = _mm512_setr_epi32(0, 2, 4, 6, 1, 3, 5, 7, 8, 10, 12, 14, 9, 11, 13, 15);
    for (int i = 0; i < 4; ++i)
        _mm_storeu_si128(reinterpret_cast<__m128i*>(out + 16 * i),
                         _mm512_cvtepi32_epi8(_mm512_permutexvar_epi32(order, codes[i])));
}

// vpmulhrsw: with a level in the upper byte, ((level << 8) * scale + 2^14) >> 15 is
// (level * scale + 64) >> 7. -> (2, PANEL, 4) bytes.
inline void decode_eight(I word, Table8 table, I scale, Weight8* panel, int) {
    const I nibbles = splat_int(0x0F0F0F0F), lower = splat_int(0x00FF00FF);
    const I top = splat_int(static_cast<int32_t>(0x80808080u));
    for (int odd = 0; odd < 2; ++odd) {
        const I codes = and_(odd ? shift_right<4>(word) : word, nibbles);
        const I levels = _mm512_shuffle_epi8(table, codes);
        const I even_bytes = _mm512_mulhrs_epi16(_mm512_slli_epi16(levels, 8), scale);
        const I odd_bytes = _mm512_mulhrs_epi16(andnot(lower, levels), scale);
        const I whole = or_(and_(even_bytes, lower), _mm512_slli_epi16(odd_bytes, 8));
        store_int(panel + odd * 4 * PANEL, xor_(whole, top));
    }
}

template <int R>
NIBBLE_NOINLINE void dot_whole(const Code8* codes, int64_t columns, const Weight8* panels,
                               int32_t* sums) {
    const Weight8 *left = panels, *right = panels + STRETCH8 * GROUP * PANEL;
    I sum[R][2];
    for (int r = 0; r < R; ++r)
        for (int v = 0; v < 2; ++v) sum[r][v] = load_int(sums + r * TILE_N + v * LANES);
    for (int64_t k = 0; k < columns; k += 4) {
        const I w0 = load_int(left + k * PANEL), w1 = load_int(right + k * PANEL);
        for (int r = 0; r < R; ++r) {
            int32_t quad;
            std::memcpy(&quad, codes + r * columns + k, 4);
            const I a = splat_int(quad);
            sum[r][0] = _mm512_dpbusd_epi32(sum[r][0], w0, a);
            sum[r][1] = _mm512_dpbusd_epi32(sum[r][1], w1, a);
        }
    }
    for (int r = 0; r < R; ++r)
        for (int v = 0; v < 2; ++v) store_int(sums + r * TILE_N + v * LANES, sum[r][v]);
}
