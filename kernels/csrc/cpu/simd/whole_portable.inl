// The product of whole numbers in plain C++, in the order of AVX2's: pairs of int16.

using Code8 = int16_t;
using Weight8 = int16_t;
using Table8 = const int8_t*;
constexpr int64_t STRETCH8 = 4;
constexpr int ROWS8 = 4;
constexpr int32_t OFFSET8 = 0;
constexpr int ORDER8[8] = {0, 4, 2, 6, 1, 5, 3, 7};

inline Table8 table_of(const int8_t* levels) { return levels; }

inline void store_codes8(const I codes[16], Code8* out) {
    for (int i = 0; i < GROUP; ++i) {
        const int k = i / 8 * 8 + ORDER8[i % 8];
        out[i] = static_cast<Code8>(codes[k / LANES].v[k % LANES]);
    }
}

// (level * scale + 64) >> 7, in int8. -> (4, PANEL, 2) numbers from output n on.
inline void decode_eight(I word, Table8 table, I scale, Weight8* panel, int n) {
    for (int r = 0; r < LANES; ++r)
        for (int i = 0; i < 8; ++i) {
            const int code =
                static_cast<int>(static_cast<uint32_t>(word.v[r]) >> 4 * ORDER8[i] & 15);
            const int whole = (table[code] * (scale.v[r] >> 16) + 64) >> 7;
            panel[(i / 2 * PANEL + n + r) * 2 + i % 2] = static_cast<int8_t>(whole);
        }
}

template <int R>
NIBBLE_NOINLINE void dot_whole(const Code8* codes, int64_t columns, const Weight8* panels,
                               int32_t* sums) {
    for (int p = 0; p < TILE_N / PANEL; ++p)
        for (int r = 0; r < R; ++r) {
            const Weight8* w = panels + p * STRETCH8 * GROUP * PANEL;
            const Code8* a = codes + r * columns;
            int32_t* sum = sums + r * TILE_N + p * PANEL;
            for (int64_t k = 0; k < columns; k += 2, w += 2 * PANEL)
                for (int n = 0; n < PANEL; ++n) sum[n] += w[2 * n] * a[k] + w[2 * n + 1] * a[k + 1];
        }
}
