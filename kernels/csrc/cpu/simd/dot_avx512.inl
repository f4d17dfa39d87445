// The inner loop in AVX-512 VNNI: vpdpbusd multiplies 64 codes and adds quads to int32.
//
// The sums begin at the bits of C = 1.5 * 2^23, so that as floats they are C + sum: one fma with
// scale and start = -C * scale makes sum * scale of them, where a conversion and a product would be
// two instructions. That is exact but for the one rounding if -C * scale is a float, so the scale
// is rounded to 22 bits first: 2^-23 of it at most, as much as two roundings to float.

inline void finish_step(Step& step) {
    const I bits_of = bits(load(step.scale)), magnitude = and_(bits_of, splat_int(0x7FFFFFFF));
    const I zeros = shift_right_signed<31>(sub_int(magnitude, splat_int(1)));
    // Negative where the scale is more than 2^100, infinite or NaN; where it is less than 2^-100
    // and not 0.
    const I large = sub_int(splat_int((127 + 100) << 23), magnitude);
    const I small = andnot(zeros, sub_int(magnitude, splat_int((127 - 100) << 23)));
    const I strange = shift_right_signed<31>(or_(large, small));
    const F rounded = from_bits(and_(add_int(bits_of, splat_int(2)), splat_int(~3)));
    store(step.scale, from_bits(or_(and_(strange, bits_of), andnot(strange, bits(rounded)))));
    store(step.start, mul(rounded, splat(-12582912.0f)));
    int32_t lanes[LANES];
    store_int(lanes, strange);
    step.ordinary = 0;
    for (int r = 0; r < LANES; ++r) step.ordinary |= (lanes[r] + 1) << r;
}

// The same with a conversion, for a scale that C times would not fit.
inline F scaled_with_care(I sum, F weight_scale, float scale, F to) {
    const F exact = to_float(sub_int(sum, splat_int(FLOAT_ZERO)));
    return fma(exact, mul(weight_scale, splat(scale)), to);
}

template <int R>
NIBBLE_NOINLINE void dot_tile(const Step* steps, int first, const Stretch& stretch, float* tile) {
    constexpr int32_t ALL = (1 << R) - 1;
    for (int g = 0; g < stretch.groups; ++g) {
        const Step& step = steps[g];
        const uint8_t* left = stretch.panels[0] + g * GROUP * PANEL;
        const uint8_t* right = stretch.panels[1] + g * GROUP * PANEL;
        I sum[R][2];
        for (int r = 0; r < R; ++r) sum[r][0] = sum[r][1] = splat_int(step.offset[first + r]);
        NIBBLE_UNROLL_16
        for (int quad = 0; quad < GROUP / 4; ++quad) {
            const I w0 = _mm512_loadu_si512(left + quad * 4 * PANEL);
            const I w1 = _mm512_loadu_si512(right + quad * 4 * PANEL);
            for (int r = 0; r < R; ++r) {
                const I a = splat_int(step.codes[quad][first + r]);
                sum[r][0] = _mm512_dpbusd_epi32(sum[r][0], w0, a);
                sum[r][1] = _mm512_dpbusd_epi32(sum[r][1], w1, a);
            }
        }
        const F scales[2] = {load(stretch.scales + g * TILE_N),
                             load(stretch.scales + g * TILE_N + LANES)};
        const int32_t ordinary = step.ordinary >> first & ALL;
        if (NIBBLE_LIKELY(ordinary == ALL)) {
            for (int r = 0; r < R; ++r)
                for (int v = 0; v < 2; ++v) {
                    float* out = tile + r * TILE_N + v * LANES;
                    const F scaled = fma(from_bits(sum[r][v]), splat(step.scale[first + r]),
                                         splat(step.start[first + r]));
                    store(out, fma(scaled, scales[v], load(out)));
                }
            continue;
        }
        for (int r = 0; r < R; ++r)
            for (int v = 0; v < 2; ++v) {
                float* out = tile + r * TILE_N + v * LANES;
                const F scaled = fma(from_bits(sum[r][v]), splat(step.scale[first + r]),
                                     splat(step.start[first + r]));
                const F usual = fma(scaled, scales[v], load(out));
                store(out, ordinary >> r & 1 ? usual
                                             : scaled_with_care(sum[r][v], scales[v],
                                                                step.scale[first + r], load(out)));
            }
    }
}
