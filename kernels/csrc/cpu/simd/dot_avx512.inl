// The inner loop in AVX-512 VNNI: vpdpbusd multiplies 64 codes and adds quads to int32.

template <int R>
NIBBLE_NOINLINE void dot_tile(const Step* steps, const Stretch& stretch, float* tile) {
    for (int g = 0; g < stretch.groups; ++g) {
        const Step& step = steps[g];
        const uint8_t* left = stretch.panels[0] + g * GROUP * PANEL;
        const uint8_t* right = stretch.panels[1] + g * GROUP * PANEL;
        __m512i sum[R][2];
        for (int r = 0; r < R; ++r) sum[r][0] = sum[r][1] = _mm512_set1_epi32(step.offset[r]);
        for (int quad = 0; quad < GROUP / 4; ++quad) {
            const __m512i w0 = _mm512_loadu_si512(left + quad * 4 * PANEL);
            const __m512i w1 = _mm512_loadu_si512(right + quad * 4 * PANEL);
            for (int r = 0; r < R; ++r) {
                int32_t four;
                std::memcpy(&four, step.codes[quad][r], 4);
                const __m512i a = _mm512_set1_epi32(four);
                sum[r][0] = _mm512_dpbusd_epi32(sum[r][0], w0, a);
                sum[r][1] = _mm512_dpbusd_epi32(sum[r][1], w1, a);
            }
        }
        for (int r = 0; r < R; ++r)
            for (int v = 0; v < 2; ++v) {
                float* out = tile + r * TILE_N + v * LANES;
                const F scale =
                    mul(load(stretch.scales + g * TILE_N + v * LANES), splat(step.scale[r]));
                store(out, fma(to_float(sum[r][v]), scale, load(out)));
            }
    }
}
