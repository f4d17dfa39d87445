// gemm_vq of one or two tokens: a row's codewords go from the cache straight into its sum. Part of
// vq.inl.

constexpr int64_t VQ_ROWS = 32;  // outputs of a task

struct VqFew {
    const Vq& vq;
    const float* x;  // (M, stride), zeros beyond K
    int64_t stride;
};

// One output of M tokens. Two sums a token in turns, so that one product does not wait for the
// other.
template <int D, int M>
NIBBLE_NOINLINE void vq_row(const VqFew& few, int64_t n, float* y) {
    const GemmVQ& op = few.vq.op;
    const uint8_t* from = static_cast<const uint8_t*>(op.indices) + n * few.vq.row_bytes;
    F sum[M][2];
    for (int m = 0; m < M; ++m) sum[m][0] = sum[m][1] = zero();
    uint16_t codes[VQ_COLUMNS / D];
    for (int64_t k0 = 0; k0 < op.K; k0 += VQ_COLUMNS) {
        const int64_t columns = smaller(VQ_COLUMNS, op.K - k0),
                      padded = divide_up(columns, 2 * LANES) * 2 * LANES;
        unpack_indices(few.vq, from + k0 / D * op.bits / 8, columns / D, log2_of(D), codes);
        for (int64_t i = columns / D; i < padded / D; ++i) codes[i] = 0;  // meets zeros of x
        for (int64_t k = 0; k < padded; k += 2 * LANES)
            for (int v = 0; v < 2; ++v) {
                const F weights = codewords<D>(few.vq.codebook, codes, k + v * LANES);
                for (int m = 0; m < M; ++m)
                    sum[m][v] =
                        fma(weights, load(few.x + m * few.stride + k0 + k + v * LANES), sum[m][v]);
            }
    }
    for (int m = 0; m < M; ++m) {
        float lanes[LANES];
        store(lanes, add(sum[m][0], sum[m][1]));
        for (int half = LANES / 2; half; half /= 2)
            for (int i = 0; i < half; ++i) lanes[i] += lanes[i + half];
        y[m * VQ_ROWS] = lanes[0];
    }
}

template <int D>
void vq_row(const VqFew& few, int64_t n, float* y) {
    if (few.vq.op.M == 1)
        vq_row<D, 1>(few, n, y);
    else
        vq_row<D, 2>(few, n, y);
}

inline void vq_few_task(const void* context, int64_t index, void*) {
    const VqFew& few = *static_cast<const VqFew*>(context);
    const GemmVQ& op = few.vq.op;
    const int64_t n0 = index * VQ_ROWS, some = smaller(VQ_ROWS, op.N - n0);
    static_assert(VQ_FEW_TOKENS == 2, "one case for each");
    float y[VQ_FEW_TOKENS * VQ_ROWS], scale[VQ_ROWS], bias[VQ_ROWS];
    for (int64_t i = 0; i < some; ++i) {
        if (op.vector == 2)
            vq_row<2>(few, n0 + i, y + i);
        else if (op.vector == 4)
            vq_row<4>(few, n0 + i, y + i);
        else
            vq_row<8>(few, n0 + i, y + i);
    }
    vq_parameters(op, n0, some, scale, bias);
    for (int64_t m = 0; m < op.M; ++m) store_vq(op, m, n0, some, scale, bias, y + m * VQ_ROWS);
}

inline void by_rows(const Vq& vq, int threads) {
    const GemmVQ& op = vq.op;
    const int64_t stride = divide_up(op.K, 2 * LANES) * 2 * LANES;
    Scratch<float> x(op.M * stride);
    for (int64_t m = 0; m < op.M; ++m) {
        to_floats(op.x_dtype, at(op.x, op.x_dtype, m * op.K), op.K, x.data + m * stride);
        for (int64_t k = op.K; k < stride; ++k) x.data[m * stride + k] = 0.0f;
    }
    const VqFew few{vq, x.data, stride};
    parallel(divide_up(op.N, VQ_ROWS), threads, 0, vq_few_task, &few);
}
