// x -> codes, scales and x . proj_down in one read of x. A task is a block of tokens; it walks
// along K in blocks that stay in L1.

constexpr int64_t TOKENS = 32;   // of a task: that many share one conversion of proj_down
constexpr int DOWN_BLOCK = 128;  // columns of K at once

struct QuantizeScratch {
    float *x, *down, *h;
    QuantizeScratch(Carver& carver, int64_t rank)
        : x(carver.take<float>(TOKENS * DOWN_BLOCK)),
          down(carver.take<float>(DOWN_BLOCK * PANEL)),
          h(carver.take<float>(TOKENS * divide_up(rank, PANEL) * PANEL)) {}
    void clear(int64_t rows, int64_t rank) const {
        std::memset(h, 0, static_cast<size_t>(rows * divide_up(rank, PANEL) * PANEL) * 4);
    }
};

struct Quantize {
    const QuantizeDown& op;
    const float* smooth;     // (K,)
    int64_t ascales_stride;  // floats between two groups' scales; ascales may be a part of a wider
                             // array
};

inline void hadamard(F v[GROUP / LANES]) {
    constexpr int COUNT = GROUP / LANES;
    for (int i = 0; i < COUNT; ++i) v[i] = butterflies(v[i]);
    for (int step = 1; step < COUNT; step *= 2)
        for (int i = 0; i < COUNT; ++i)
            if (!(i & step)) {
                const F a = v[i], b = v[i + step];
                v[i] = add(a, b);
                v[i + step] = sub(a, b);
            }
    for (int i = 0; i < COUNT; ++i) v[i] = mul(v[i], splat(0.125f));
}

// Bytes of `columns` codes.
inline int64_t bytes_of(Codes codes, int64_t columns) {
    return codes == Codes::packed ? columns / 2 : columns;
}

// (64,) floats of a token, smoothed and rotated.
inline void smooth_group(const float* x, const float* smooth, bool shifted, bool rotate,
                         F v[GROUP / LANES]) {
    for (int i = 0; i < GROUP / LANES; ++i) {
        const F raw = load(x + i * LANES);
        v[i] = div(shifted ? add(raw, splat(SHIFT)) : raw, load(smooth + i * LANES));
    }
    if (rotate) hadamard(v);
}

// v / scale, rounded, and 0 where the scale is not finite, as rounding NaN gives there.
inline void round_group(const F v[GROUP / LANES], float scale, bool act_unsigned,
                        I codes[GROUP / LANES]) {
    const bool finite = scale <= 3.402823466e38f;
    const F step = splat(scale > 1.175494351e-38f ? scale : 1.175494351e-38f);
    for (int i = 0; i < GROUP / LANES; ++i) {
        const F code = div(v[i], step);
        codes[i] =
            finite ? round_to_int(act_unsigned ? maximum(code, zero()) : code) : splat_int(0);
    }
}

// One group of a token: (64,) floats -> 32 bytes, or 64 of 8 bits, and the scale.
inline void quantize_group(const float* x, const float* smooth, bool shifted, bool rotate,
                           Codes form, uint8_t* q, float* ascale) {
    constexpr int COUNT = GROUP / LANES;
    F v[COUNT];
    smooth_group(x, smooth, shifted, rotate, v);
    const bool wide = form == Codes::int8, act_unsigned = shifted && !wide;

    // Floats of one sign are ordered like their bits, and a NaN's are above infinity's: integer
    // maxima lose no NaN.
    I magnitude = splat_int(0), positive = splat_int(0);
    for (int i = 0; i < COUNT; ++i) {
        magnitude = max_int(magnitude, and_(bits(v[i]), splat_int(0x7FFFFFFF)));
        positive = max_int(positive, bits(v[i]));
    }
    const int32_t most = largest(magnitude),
                  above = act_unsigned && most <= 0x7F800000 ? largest(positive) : most;
    float peak;
    std::memcpy(&peak, &above, 4);
    const float narrow = act_unsigned ? 15.0f : 7.0f;
    *ascale = peak / (wide ? 127.0f : narrow);
    I codes[COUNT];
    round_group(v, *ascale, act_unsigned, codes);
    if (wide)
        store_bytes(codes, q);
    else
        pack_group(codes, q);
}

// x . proj_down of `columns` columns from k0 on, onto scratch.h. Their floats are in scratch.x.
inline void project_block(const QuantizeDown& op, int64_t k0, int64_t columns, int64_t rows,
                          const QuantizeScratch& scratch) {
    const int64_t padded = divide_up(op.R, PANEL) * PANEL;
    for (int64_t c = 0; c < op.R; c += PANEL) {
        const int64_t width = smaller(PANEL, op.R - c);
        to_panel(op.param_dtype, at(op.proj_down, op.param_dtype, k0 * op.R + c), op.R, width,
                 columns, scratch.down);
        fma_rows(rows, scratch.x, DOWN_BLOCK, scratch.down, columns, scratch.h + c, padded);
    }
}

inline void store_h(const QuantizeDown& op, int64_t m0, int64_t rows, const float* h) {
    const int64_t padded = divide_up(op.R, PANEL) * PANEL;
    for (int64_t r = 0; r < rows && op.R; ++r)
        std::memcpy(op.h + (m0 + r) * op.R, h + r * padded, static_cast<size_t>(op.R) * 4);
}

inline void quantize_task(const void* context, int64_t index, void* memory) {
    const Quantize& quantize = *static_cast<const Quantize*>(context);
    const QuantizeDown& op = quantize.op;
    Carver carver{static_cast<char*>(memory)};
    const QuantizeScratch scratch(carver, op.R);
    const int64_t m0 = index * TOKENS, rows = smaller(TOKENS, op.M - m0);
    scratch.clear(rows, op.R);

    for (int64_t k0 = 0; k0 < op.K; k0 += DOWN_BLOCK) {
        const int64_t columns = smaller(DOWN_BLOCK, op.K - k0);
        for (int64_t r = 0; r < rows; ++r) {
            float* x = scratch.x + r * DOWN_BLOCK;
            to_floats(op.x_dtype, at(op.x, op.x_dtype, (m0 + r) * op.x_stride + k0), columns, x);
            for (int64_t k = 0; k < columns; k += GROUP) {
                uint8_t* q =
                    static_cast<uint8_t*>(op.q) + bytes_of(op.codes, (m0 + r) * op.K + k0 + k);
                float* ascale = op.ascales + (k0 + k) / GROUP * quantize.ascales_stride + m0 + r;
                const bool is_unsigned = op.act_unsigned && k0 + k >= op.unsigned_from;
                quantize_group(x + k, quantize.smooth + k0 + k, is_unsigned, op.rotate, op.codes, q,
                               ascale);
            }
        }
        project_block(op, k0, columns, rows, scratch);
    }
    store_h(op, m0, rows, scratch.h);
}

inline void quantize_rows(const QuantizeDown& op, const float* smooth, int64_t ascales_stride,
                          int threads) {
    const Quantize quantize{op, smooth, ascales_stride};
    parallel(divide_up(op.M, TOKENS), threads, scratch_bytes<QuantizeScratch>(op.R), quantize_task,
             &quantize);
}

inline void quantize_down(const QuantizeDown& op, int threads) {
    if (op.M == 0) return;
    Scratch<float> smooth(op.K);
    to_floats(op.param_dtype, op.smooth, op.K, smooth.data);
    quantize_rows(op, smooth.data, op.M, threads);
}
