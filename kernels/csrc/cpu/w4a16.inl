// y = x . ((W - 8) * weight_scale + weight_zeros)^T + bias, activations in floating point.
//   few tokens   codes go from the file's bytes into the sum, row by row, scales once a group: what
//                takes time is reading the weights, once
//   more tokens  bound by multiplying: a panel of weights is decoded to floats once and used by all
//                tokens of a tile

constexpr int64_t MANY_CHUNK = 256;  // tokens converted at a time: bounds the scratch

// ---- few tokens ---------------------------------------------------------------------------------

// A vector holds LANES dwords that follow one another in a row of weights; code j of dword d is
// column 8 d + j, and meets a vector of the token's values at these columns. FewCodes (simd/) makes
// floats of the codes, times UNIT[j]: the token's values come divided by it. A token whose values
// are so small that the division would lose bits is scaled up by 2^64 before.
struct Few {
    const W4A16& op;
    int64_t vectors;    // in a row; the last one may be half empty: zeros of x, and of scales
    const float* x;     // (M, vectors, 8, LANES)
    const float* sums;  // (K / GROUP, M): the group's sum of x
    const float* undo;  // (M,) 1 or 2^-64
};

constexpr int FEW_OUTPUTS = 64;  // of a task: their scales are converted together

inline void prepare_few(const W4A16& op, int64_t vectors, float* x, float* sums, float* undo) {
    Scratch<float> scratch(op.K);
    float* row = scratch.data;
    std::memset(x, 0, static_cast<size_t>(op.M * vectors * 8 * LANES) * 4);
    for (int64_t m = 0; m < op.M; ++m, x += vectors * 8 * LANES) {
        to_floats(op.x_dtype, at(op.x, op.x_dtype, m * op.K), op.K, row);
        float most = 0.0f;
        for (int64_t k = 0; k < op.K; ++k) {
            const float magnitude = row[k] < 0 ? -row[k] : row[k];
            most = magnitude > most ? magnitude : most;
        }
        const bool tiny = most < 1e-24f;
        undo[m] = tiny ? 5.421010862427522e-20f : 1.0f;
        for (int64_t k = 0; k < op.K; ++k) row[k] *= tiny ? 1.8446744073709552e19f : 1.0f;
        for (int64_t g = 0; g < op.K / GROUP; ++g) {
            float sum = 0.0f;
            for (int k = 0; k < GROUP; ++k) sum += row[g * GROUP + k];
            sums[g * op.M + m] = sum;
        }
        for (int64_t d = 0; d < op.K / 8; ++d)
            for (int j = 0; j < 8; ++j)
                x[(d / LANES * 8 + j) * LANES + d % LANES] = row[8 * d + j] / FewCodes::UNIT[j];
    }
}

// Code J of each dword, times the tokens' values. J is a constant of the program, so that masks and
// shifts are constants too.
template <int J, int M, int R>
void few_step(const FewCodes& codes, const I word[R], const float* x, int64_t stride,
              F part[M][R]) {
    if constexpr (J < 8) {
        F value[M];
        for (int m = 0; m < M; ++m) value[m] = load(x + m * stride + J * LANES);
        for (int r = 0; r < R; ++r) {
            const F code = codes.of<J>(word[r]);
            for (int m = 0; m < M; ++m)
                part[m][r] = J ? fma(value[m], code, part[m][r]) : mul(value[m], code);
        }
        few_step<J + 1, M, R>(codes, word, x, stride, part);
    }
}

// Vector i of R rows, whose dwords are `word`. Its 8 products are summed by themselves and then,
// scaled, added to the rows' sums: short chains of fmas, so that several go on at a time, and less
// rounding. `scales` are FEW_OUTPUTS floats apart from one group to the next.
template <int M, int R>
inline void few_vector(const Few& few, const FewCodes& codes, const I word[R], const float* scales,
                       int64_t i, F sum[M][R]) {
    F part[M][R];
    few_step<0, M, R>(codes, word, few.x + i * 8 * LANES, few.vectors * 8 * LANES, part);
    for (int r = 0; r < R; ++r) {
        const F scale = scales_of_vector(scales + r, FEW_OUTPUTS, i);
        for (int m = 0; m < M; ++m) sum[m][r] = fma(part[m][r], scale, sum[m][r]);
    }
}

// R rows of weights from `weight` on.
template <int M, int R>
NIBBLE_NOINLINE void few_tile(const Few& few, const uint8_t* weight, const float* scales,
                              float* result) {
    const FewCodes codes;
    const int64_t stride = few.op.K / 2, whole = stride / (4 * LANES);
    F sum[M][R];
    I word[R];
    for (int m = 0; m < M; ++m)
        for (int r = 0; r < R; ++r) sum[m][r] = zero();
    for (int64_t i = 0; i < whole; ++i) {
        for (int r = 0; r < R; ++r) {
            const uint8_t* p = weight + r * stride + i * 4 * LANES;
            prefetch(p + R * stride);
            word[r] = load_dwords(p);
        }
        few_vector<M, R>(few, codes, word, scales, i, sum);
    }
    if (whole < few.vectors) {
        for (int r = 0; r < R; ++r)
            word[r] = load_last_dwords(weight + r * stride + whole * 4 * LANES);
        few_vector<M, R>(few, codes, word, scales, whole, sum);
    }
    for (int m = 0; m < M; ++m)
        for (int r = 0; r < R; ++r) result[m * FEW_OUTPUTS + r] = total(sum[m][r]);
}

struct FewScratch {
    float *scales, *zeros, *result, *rest;
    FewScratch(Carver& carver, int64_t groups, int64_t tokens)
        : scales(carver.take<float>((groups + 1) * FEW_OUTPUTS)),
          zeros(carver.take<float>(FEW_OUTPUTS)),
          result(carver.take<float>(tokens * FEW_OUTPUTS)),
          rest(carver.take<float>(tokens * FEW_OUTPUTS)) {}
};

// Scales as floats, and what does not depend on codes: (M, FEW_OUTPUTS) zeros * sums of x.
inline void few_scales(const Few& few, int64_t n0, int64_t valid, const FewScratch& scratch) {
    const W4A16& op = few.op;
    const int64_t groups = op.K / GROUP;
    std::memset(scratch.scales, 0, static_cast<size_t>((groups + 1) * FEW_OUTPUTS) * 4);
    std::memset(scratch.rest, 0, static_cast<size_t>(op.M * FEW_OUTPUTS) * 4);
    for (int64_t g = 0; g < groups; ++g) {
        to_floats(op.param_dtype, at(op.weight_scale, op.param_dtype, g * op.N + n0), valid,
                  scratch.scales + g * FEW_OUTPUTS);
        if (!op.weight_zeros) continue;
        to_floats(op.param_dtype, at(op.weight_zeros, op.param_dtype, g * op.N + n0), valid,
                  scratch.zeros);
        for (int64_t m = 0; m < op.M; ++m) {
            float* rest = scratch.rest + m * FEW_OUTPUTS;
            const F sum = splat(few.sums[g * op.M + m]);
            for (int n = 0; n < FEW_OUTPUTS; n += LANES)
                store(rest + n, fma(load(scratch.zeros + n), sum, load(rest + n)));
        }
    }
}

template <int M>
void few_outputs(const Few& few, int64_t n0, int64_t valid, void* memory) {
    constexpr int R = M <= 2 ? 4 : 2;  // rows at once: as many sums as there are registers
    const W4A16& op = few.op;
    Carver carver{static_cast<char*>(memory)};
    const FewScratch scratch(carver, op.K / GROUP, M);
    few_scales(few, n0, valid, scratch);
    const uint8_t* weight = static_cast<const uint8_t*>(op.weight) + n0 * (op.K / 2);
    int64_t n = 0;
    for (; n + R <= valid; n += R)
        few_tile<M, R>(few, weight + n * (op.K / 2), scratch.scales + n, scratch.result + n);
    for (; n < valid; ++n)
        few_tile<M, 1>(few, weight + n * (op.K / 2), scratch.scales + n, scratch.result + n);
    float bias[FEW_OUTPUTS] = {};
    if (op.bias) to_floats(op.param_dtype, at(op.bias, op.param_dtype, n0), valid, bias);
    for (int m = 0; m < M; ++m) {
        float* y = scratch.result + m * FEW_OUTPUTS;
        for (n = 0; n < valid; ++n)
            y[n] = (y[n] + scratch.rest[m * FEW_OUTPUTS + n]) * few.undo[m] + bias[n];
        from_floats(op.x_dtype, y, valid, const_cast<char*>(at(op.out, op.x_dtype, m * op.N + n0)));
    }
}

inline void few_task(const void* context, int64_t index, void* memory) {
    const Few& few = *static_cast<const Few*>(context);
    const int64_t n0 = index * FEW_OUTPUTS, valid = smaller(FEW_OUTPUTS, few.op.N - n0);
    static_assert(FEW_TOKENS == 4, "one case for each");
    switch (few.op.M) {
        case 1:
            return few_outputs<1>(few, n0, valid, memory);
        case 2:
            return few_outputs<2>(few, n0, valid, memory);
        case 3:
            return few_outputs<3>(few, n0, valid, memory);
        default:
            return few_outputs<4>(few, n0, valid, memory);
    }
}

inline void few_tokens(const W4A16& op, int threads) {
    const int64_t groups = op.K / GROUP, vectors = divide_up(op.K, 8 * LANES);
    Scratch<float> x(op.M * vectors * 8 * LANES), group_sums(groups * op.M), undo(op.M);
    prepare_few(op, vectors, x.data, group_sums.data, undo.data);
    const Few few{op, vectors, x.data, group_sums.data, undo.data};
    parallel(divide_up(op.N, FEW_OUTPUTS), threads, scratch_bytes<FewScratch>(groups, op.M),
             few_task, &few);
}

// ---- more tokens --------------------------------------------------------------------------------

struct Many {
    const W4A16& op;
    float* x;  // (K in blocks, tokens, BLOCK): rows of a block lie near one another
    int64_t m_begin, tokens;
};

struct ManyScratch {
    float *tile, *panel;
    ManyScratch(Carver& carver, int64_t tokens)
        : tile(carver.take<float>(tokens * PANEL)), panel(carver.take<float>(BLOCK * PANEL)) {}
};

inline void convert_task(const void* context, int64_t token, void*) {
    const Many& many = *static_cast<const Many*>(context);
    const W4A16& op = many.op;
    for (int64_t k = 0; k < op.K; k += BLOCK) {
        const char* x = at(op.x, op.x_dtype, (many.m_begin + token) * op.K + k);
        to_floats(op.x_dtype, x, smaller(BLOCK, op.K - k),
                  many.x + k * many.tokens + token * BLOCK);
    }
}

// One group of PANEL outputs -> (GROUP, PANEL) floats.
inline void dequantize_panel(const W4A16& op, int64_t n0, int valid, int64_t g, float* panel) {
    const uint8_t* weight =
        static_cast<const uint8_t*>(op.weight) + n0 * (op.K / 2) + g * (GROUP / 2);
    float scales[PANEL] = {}, zeros[PANEL] = {};
    to_floats(op.param_dtype, at(op.weight_scale, op.param_dtype, g * op.N + n0), valid, scales);
    if (op.weight_zeros)
        to_floats(op.param_dtype, at(op.weight_zeros, op.param_dtype, g * op.N + n0), valid, zeros);
    const I flip = splat_int(static_cast<int32_t>(0x88888888u));
    for (int n = 0; n < PANEL; n += LANES) {
        I words[8];
        if (n < valid)
            load_words(weight + n * (op.K / 2), op.K / 2, valid - n, words);
        else
            load_words(weight + (valid - 1) * (op.K / 2), op.K / 2, 1, words);
        const F scale = load(scales + n), plus = load(zeros + n);
        for (int d = 0; d < 8; ++d) {
            // Flipping a nibble's highest bit makes it code - 8 in two's complement; shifting it up
            // and down extends the sign.
            const I w = xor_(words[d], flip);
            const I codes[8] = {shift_right_signed<28>(shift_left<28>(w)),
                                shift_right_signed<28>(shift_left<24>(w)),
                                shift_right_signed<28>(shift_left<20>(w)),
                                shift_right_signed<28>(shift_left<16>(w)),
                                shift_right_signed<28>(shift_left<12>(w)),
                                shift_right_signed<28>(shift_left<8>(w)),
                                shift_right_signed<28>(shift_left<4>(w)),
                                shift_right_signed<28>(w)};
            for (int j = 0; j < 8; ++j)
                store(panel + (8 * d + j) * PANEL + n, fma(to_float(codes[j]), scale, plus));
        }
    }
}

inline void many_task(const void* context, int64_t index, void* memory) {
    const Many& many = *static_cast<const Many*>(context);
    const W4A16& op = many.op;
    Carver carver{static_cast<char*>(memory)};
    const ManyScratch scratch(carver, many.tokens);
    const int64_t n0 = index * PANEL;
    const int valid = static_cast<int>(smaller(PANEL, op.N - n0));
    float bias[PANEL] = {};
    if (op.bias) to_floats(op.param_dtype, at(op.bias, op.param_dtype, n0), valid, bias);
    for (int64_t m = 0; m < many.tokens; ++m)
        std::memcpy(scratch.tile + m * PANEL, bias, sizeof bias);
    for (int64_t k0 = 0; k0 < op.K; k0 += BLOCK) {
        const int64_t columns = smaller(BLOCK, op.K - k0);
        for (int64_t k = 0; k < columns; k += GROUP)
            dequantize_panel(op, n0, valid, (k0 + k) / GROUP, scratch.panel + k * PANEL);
        // Tokens in full precision show the rounding of a long sum: theirs are added up in short
        // pieces, which costs a few percent.
        const int64_t piece = op.x_dtype == Dtype::f32 ? 16 : columns;
        for (int64_t k = 0; k < columns; k += piece)
            fma_rows(many.tokens, many.x + k0 * many.tokens + k, BLOCK, scratch.panel + k * PANEL,
                     piece, scratch.tile, PANEL);
    }
    for (int64_t m = 0; m < many.tokens; ++m)
        from_floats(op.x_dtype, scratch.tile + m * PANEL, valid,
                    const_cast<char*>(at(op.out, op.x_dtype, (many.m_begin + m) * op.N + n0)));
}

inline void many_tokens(const W4A16& op, int threads) {
    Scratch<float> x(smaller(op.M, MANY_CHUNK) * divide_up(op.K, BLOCK) * BLOCK);
    for (int64_t m = 0; m < op.M; m += MANY_CHUNK) {
        const Many many{op, x.data, m, smaller(MANY_CHUNK, op.M - m)};
        parallel(many.tokens, threads, 0, convert_task, &many);
        parallel(divide_up(op.N, PANEL), threads, scratch_bytes<ManyScratch>(many.tokens),
                 many_task, &many);
    }
}

// Both ops compute the same; which way is taken depends on the number of tokens alone.
inline void w4a16(const W4A16& op, int threads) {
    if (op.M == 0 || op.N == 0) return;
    if (op.M <= FEW_TOKENS)
        few_tokens(op, threads);
    else
        many_tokens(op, threads);
}
