// The inner loop in plain C++: products of a code and a weight are at most 127 * 15 = 1905, so a
// group's 16 quads are summed in int16 lanes.

inline void finish_step(Step&) {}

template <int R>
NIBBLE_NOINLINE void dot_tile(const Step* steps, int first, const Stretch& stretch, float* tile) {
    for (int p = 0; p < TILE_N / PANEL; ++p)
        for (int g = 0; g < stretch.groups; ++g) {
            const Step& step = steps[g];
            const uint8_t* w = stretch.panels[p] + g * GROUP * PANEL;
            const float* scales = stretch.scales + g * TILE_N + p * PANEL;
            for (int r = 0; r < R; ++r) {
                int16_t sum[4 * PANEL] = {};
                for (int quad = 0; quad < GROUP / 4; ++quad) {
                    int8_t four[4];
                    std::memcpy(four, &step.codes[quad][first + r], 4);
                    int16_t a[8];
                    for (int i = 0; i < 8; ++i) a[i] = four[i % 4];
                    for (int i = 0; i < 4 * PANEL; ++i)
                        sum[i] = static_cast<int16_t>(sum[i] + w[quad * 4 * PANEL + i] * a[i % 8]);
                }
                float* out = tile + r * TILE_N + p * PANEL;
                for (int n = 0; n < PANEL; ++n) {
                    const int exact = step.offset[first + r] + sum[4 * n] + sum[4 * n + 1] +
                                      sum[4 * n + 2] + sum[4 * n + 3];
                    out[n] += static_cast<float>(exact) * (scales[n] * step.scale[first + r]);
                }
            }
        }
}
