// The first layer of an MLP straight into the second one's input. As many tokens as fit into the
// caches go through the product, the GELU and the quantizer before the next ones start, so y is
// never in memory as a whole.

constexpr int64_t MLP_TOKENS = 128;  // a multiple of TOKENS and of LANES

// e^x = 2^n * e^r, |r| <= ln(2) / 2, a polynomial of degree 6 (Cephes' expf). Below e^-87 it stays
// there, from e^88.4 on it is infinite.
inline F exponential(F x) {
    const F bounded = minimum(splat(89.0f), maximum(splat(-87.0f), x));
    const I n = round_to_int(mul(bounded, splat(1.44269504f)));
    const F whole = to_float(n);
    const F r = fma(whole, splat(2.12194440e-4f), fma(whole, splat(-0.693359375f), bounded));
    const float coefficients[] = {1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f,
                                  1.6666665459e-1f, 5.0000001201e-1f};
    F p = splat(1.9875691500e-4f);
    for (const float c : coefficients) p = fma(p, r, splat(c));
    p = add(fma(mul(r, r), p, r), splat(1.0f));
    return mul(p, from_bits(shift_left<23>(add_int(n, splat_int(127)))));
}

// x / 2 (1 + tanh(u)) = x / (1 + e^-2u), u = sqrt(2 / pi) (x + 0.044715 x^3): without the
// cancellation of 1 + tanh for negative x.
inline F gelu_tanh(F x) {
    const F cubic = fma(mul(mul(x, x), x), splat(0.044715f), x);
    return div(x, add(splat(1.0f), exponential(mul(cubic, splat(-1.5957691216f)))));
}

struct Middle {
    const GemmW4A4Up& first;
    float* y;  // (tokens of this chunk, N)
    int64_t m_begin;
};

// y, rounded to the dtype in which the layer would have stored it, through the GELU, into the
// chunk's buffer.
inline void gelu_tile(const void* context, float* tile, int64_t m0, int64_t rows, int64_t n0,
                      int64_t valid) {
    const Middle& middle = *static_cast<const Middle*>(context);
    const Dtype dtype = middle.first.out_dtype;
    for (int64_t r = 0; r < rows; ++r) {
        float* row = tile + r * TILE_N;
        if (dtype != Dtype::f32) {
            uint16_t rounded[TILE_N];
            from_floats(dtype, row, TILE_N, rounded);
            to_floats(dtype, rounded, TILE_N, row);
        }
        for (int n = 0; n < TILE_N; n += LANES) store(row + n, gelu_tanh(load(row + n)));
        std::memcpy(middle.y + (m0 + r - middle.m_begin) * middle.first.N + n0, row,
                    static_cast<size_t>(valid) * 4);
    }
}

inline void gemm_w4a4_up_gelu_quantize_down(const GemmW4A4UpGeluQuantizeDown& op, int threads) {
    const GemmW4A4Up& first = op.first;
    if (first.M == 0) return;
    const int64_t most = smaller(first.M, MLP_TOKENS);
    Scratch<Step> steps(divide_up(most, LANES) * (first.K / GROUP));
    Scratch<float> y(most * first.N), smooth(first.N);
    to_floats(first.param_dtype, op.smooth2, first.N, smooth.data);
    for (int64_t m = 0; m < first.M; m += MLP_TOKENS) {
        const int64_t tokens = smaller(MLP_TOKENS, first.M - m);
        const Middle middle{first, y.data, m};
        gemm_chunk(first, m, m + tokens, steps.data, threads, gelu_tile, &middle);
        QuantizeDown second{};
        second.M = tokens, second.K = first.N, second.R = op.R2;
        second.x = y.data, second.x_stride = first.N, second.x_dtype = Dtype::f32;
        second.proj_down = op.proj_down2, second.param_dtype = first.param_dtype;
        second.act_unsigned = op.act_unsigned2, second.rotate = op.rotate2;
        second.codes = op.codes2;
        second.q = static_cast<uint8_t*>(op.q2) + bytes_of(op.codes2, m * first.N);
        second.ascales = op.ascales2 + m;
        second.h = op.R2 ? op.h2 + m * op.R2 : nullptr;
        quantize_rows(second, smooth.data, first.M, threads);
    }
}
