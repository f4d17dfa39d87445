// The inner loop in AVX2. vpmaddubsw multiplies 32 codes and adds pairs, 2 * 15 * 127 at most. A
// group's 16 pairs and what they start with (`offset`) end below 2^15, with codes of 4 or 8 bits,
// so a group is summed in int16, modulo 2^16, and widened once. Zen 3 begins two products a cycle,
// 64 multiply-adds, but its adds take the products' units now and then: product and add alone reach
// 49 a cycle there, this loop with the rescaling 42.

inline void finish_step(Step&) {}

template <int R>
NIBBLE_NOINLINE void dot_tile(const Step* steps, int first, const Stretch& stretch, float* tile) {
    const __m256i ones = _mm256_set1_epi16(1);
    for (int p = 0; p < TILE_N / PANEL; ++p) {
        const uint8_t* w = stretch.panels[p];
        for (int g = 0; g < stretch.groups; ++g) {
            const Step& step = steps[g];
            __m256i sum[R][2];
            for (int r = 0; r < R; ++r)
                sum[r][0] = sum[r][1] = _mm256_set1_epi32(step.offset[first + r]);
            NIBBLE_UNROLL_16
            for (int quad = 0; quad < GROUP / 4; ++quad, w += 4 * PANEL) {
                const __m256i w0 = _mm256_load_si256(reinterpret_cast<const __m256i*>(w));
                const __m256i w1 = _mm256_load_si256(reinterpret_cast<const __m256i*>(w + 32));
                for (int r = 0; r < R; ++r) {
                    const __m256i a = _mm256_set1_epi32(step.codes[quad][first + r]);
                    sum[r][0] = _mm256_add_epi16(sum[r][0], _mm256_maddubs_epi16(w0, a));
                    sum[r][1] = _mm256_add_epi16(sum[r][1], _mm256_maddubs_epi16(w1, a));
                    NIBBLE_IN_ORDER(sum[r][0], sum[r][1]);
                }
            }
            const float* scales = stretch.scales + g * TILE_N + p * PANEL;
            for (int r = 0; r < R; ++r)
                for (int v = 0; v < 2; ++v) {
                    float* out = tile + r * TILE_N + p * PANEL + v * LANES;
                    const F exact = _mm256_cvtepi32_ps(_mm256_madd_epi16(sum[r][v], ones));
                    store(out,
                          fma(exact, mul(load(scales + v * LANES), splat(step.scale[first + r])),
                              load(out)));
                }
        }
    }
}
