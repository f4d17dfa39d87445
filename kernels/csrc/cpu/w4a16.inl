// y = x . ((W - 8) * weight_scale + weight_zeros)^T + bias, activations in floating point.
//   few tokens   codes go from the file's bytes into the sum, scales once a group: the weights are
//   read once, at 4 bits more tokens  bound by multiplying: a panel of weights is decoded to floats
//   once and used by all tokens of a tile

constexpr int64_t MANY_CHUNK = 256;  // tokens converted at a time: bounds the scratch

// ---- few tokens ---------------------------------------------------------------------------------

// A dword holds 8 codes. Masking the code at bit 4 j without shifting it leaves code * 16^j, so
// token values come divided by 16^j; only the highest code is shifted down. A token whose values
// are so small that the division would lose bits is scaled up by 2^64 before.
struct Few {
    const W4A16& op;
    const float* x;     // (M, K), element k divided by 16^(k % 8), the eighth undivided
    const float* sums;  // (K / GROUP, M): the group's sum of x
    const float* undo;  // (M,) 1 or 2^-64
};

inline void prepare_few(const W4A16& op, float* x, float* sums, float* undo) {
    for (int64_t m = 0; m < op.M; ++m) {
        float* row = x + m * op.K;
        to_floats(op.x_dtype, at(op.x, op.x_dtype, m * op.K), op.K, row);
        float most = 0.0f;
        for (int64_t k = 0; k < op.K; ++k) {
            const float magnitude = row[k] < 0 ? -row[k] : row[k];
            most = magnitude > most ? magnitude : most;
        }
        const bool tiny = most < 1e-24f;
        undo[m] = tiny ? 5.421010862427522e-20f : 1.0f;
        for (int64_t g = 0; g < op.K / GROUP; ++g) {
            float sum = 0.0f;
            for (int k = 0; k < GROUP; ++k) {
                float& value = row[g * GROUP + k];
                value *= tiny ? 1.8446744073709552e19f : 1.0f;
                sum += value;
                value *= k % 8 == 7 ? 1.0f : 1.0f / static_cast<float>(1 << 4 * (k % 8));
            }
            sums[g * op.M + m] = sum;
        }
    }
}

constexpr int COLUMNS =
    2;  // vectors of outputs in a tile: a token's value and a mask are loaded once for both

// Code J of each dword, times the tokens' values. J is a constant of the program, so that the masks
// are constants too.
template <int J, int M>
void few_step(const I word[COLUMNS], const float* x, int64_t stride, F part[M][COLUMNS]) {
    F value[COLUMNS];
    for (int v = 0; v < COLUMNS; ++v) {
        if constexpr (J == 7)
            value[v] = sub(to_float(shift_right<28>(word[v])), splat(8.0f));
        else
            value[v] = sub(to_float(and_(word[v], splat_int(15 << 4 * J))),
                           splat(static_cast<float>(8 << 4 * J)));
    }
    for (int m = 0; m < M; ++m) {
        const F factor = splat(x[m * stride + J]);
        for (int v = 0; v < COLUMNS; ++v)
            part[m][v] = J ? fma(factor, value[v], part[m][v]) : mul(factor, value[v]);
    }
}

// A dword's 8 products are summed by themselves and then added to the group's sum: short chains of
// fmas, so that several go on at a time, and less rounding.
template <int M>
NIBBLE_NOINLINE void few_tile(const Few& few, int64_t n0, int valid) {
    const W4A16& op = few.op;
    const uint8_t* weight = static_cast<const uint8_t*>(op.weight) + n0 * (op.K / 2);
    F sum[M][COLUMNS];
    for (int m = 0; m < M; ++m)
        for (int v = 0; v < COLUMNS; ++v) sum[m][v] = zero();
    for (int64_t g = 0; g < op.K / GROUP; ++g) {
        I words[COLUMNS][8];
        for (int v = 0; v < COLUMNS; ++v) {
            // A vector wholly beyond N repeats the last row.
            const int first = v * LANES < valid ? v * LANES : valid - 1;
            load_words(weight + first * (op.K / 2) + g * (GROUP / 2), op.K / 2, valid - first,
                       words[v]);
        }
        F group[M][COLUMNS];
        for (int m = 0; m < M; ++m)
            for (int v = 0; v < COLUMNS; ++v) group[m][v] = zero();
        const float* x = few.x + g * GROUP;
        for (int d = 0; d < 8; ++d) {
            I word[COLUMNS];
            for (int v = 0; v < COLUMNS; ++v) word[v] = words[v][d];
            F part[M][COLUMNS];
            few_step<0, M>(word, x + 8 * d, op.K, part);
            few_step<1, M>(word, x + 8 * d, op.K, part);
            few_step<2, M>(word, x + 8 * d, op.K, part);
            few_step<3, M>(word, x + 8 * d, op.K, part);
            few_step<4, M>(word, x + 8 * d, op.K, part);
            few_step<5, M>(word, x + 8 * d, op.K, part);
            few_step<6, M>(word, x + 8 * d, op.K, part);
            few_step<7, M>(word, x + 8 * d, op.K, part);
            for (int m = 0; m < M; ++m)
                for (int v = 0; v < COLUMNS; ++v) group[m][v] = add(group[m][v], part[m][v]);
        }
        float scale[COLUMNS * LANES] = {}, zeros[COLUMNS * LANES] = {};
        to_floats(op.param_dtype, at(op.weight_scale, op.param_dtype, g * op.N + n0), valid, scale);
        if (op.weight_zeros)
            to_floats(op.param_dtype, at(op.weight_zeros, op.param_dtype, g * op.N + n0), valid,
                      zeros);
        for (int m = 0; m < M; ++m)
            for (int v = 0; v < COLUMNS; ++v) {
                sum[m][v] = fma(load(scale + v * LANES), group[m][v], sum[m][v]);
                if (op.weight_zeros)
                    sum[m][v] = fma(load(zeros + v * LANES), splat(few.sums[g * M + m]), sum[m][v]);
            }
    }
    float y[COLUMNS * LANES], bias[COLUMNS * LANES] = {};
    if (op.bias) to_floats(op.param_dtype, at(op.bias, op.param_dtype, n0), valid, bias);
    for (int m = 0; m < M; ++m) {
        for (int v = 0; v < COLUMNS; ++v)
            store(y + v * LANES, fma(sum[m][v], splat(few.undo[m]), load(bias + v * LANES)));
        from_floats(op.x_dtype, y, valid, const_cast<char*>(at(op.out, op.x_dtype, m * op.N + n0)));
    }
}

inline void few_task(const void* context, int64_t index, void*) {
    const Few& few = *static_cast<const Few*>(context);
    const int64_t columns = COLUMNS * LANES, n0 = index * columns;
    const int valid = static_cast<int>(smaller(columns, few.op.N - n0));
    static_assert(FEW_TOKENS == 4, "one case for each");
    switch (few.op.M) {
        case 1:
            return few_tile<1>(few, n0, valid);
        case 2:
            return few_tile<2>(few, n0, valid);
        case 3:
            return few_tile<3>(few, n0, valid);
        default:
            return few_tile<4>(few, n0, valid);
    }
}

inline void few_tokens(const W4A16& op, int threads) {
    const int64_t sums = op.K / GROUP * op.M;
    Scratch<float> x(op.M * op.K), group_sums(sums), undo(op.M);
    prepare_few(op, x.data, group_sums.data, undo.data);
    const Few few{op, x.data, group_sums.data, undo.data};
    parallel(divide_up(op.N, COLUMNS * LANES), threads, 0, few_task, &few);
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
