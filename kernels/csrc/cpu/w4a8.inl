// Linears of 4-bit weights that are int8 numbers once they are read (the formula: LinearW4A8). A
// chunk of tokens is quantized, a scale a token, then multiplied in tiles as in gemm_w4a4.inl, but
// that sums are integers over all of K: nothing is rescaled before the end.
//
// Here too eight neighbours of K are taken apart as a dword of nibbles is: the even columns, then
// the odd ones. whole_*.inl says in which order, and how wide codes and weights are:
//   Code8, Weight8       a code of an activation, a weight
//   STRETCH8             groups whose weights are decoded at a time
//   OFFSET8              weights are stored with so much added
//   store_codes8         codes of a group in order
//   table_of, decode_eight   the levels, and 8 columns of LANES outputs as numbers
//   dot_whole            the inner loop

#include NIBBLE_DOT_WHOLE

struct TokensScratch {
    float* row;
    QuantizeScratch project;
    TokensScratch(Carver& carver, int64_t columns, int64_t rank)
        : row(carver.take<float>(columns)), project(carver, rank) {}
};

struct WholeScratch {
    GemmScratch start;  // its tile is what low rank and bias give
    int32_t* sums;
    Weight8* panels;
    WholeScratch(Carver& carver, int64_t tile_m, int64_t tiles)
        : start(carver, tile_m * TILE_N),
          sums(carver.take<int32_t>(tiles * tile_m * TILE_N)),
          panels(carver.take<Weight8>(STRETCH8 * GROUP * TILE_N)) {}
};

// One chunk of tokens.
struct Whole {
    const LinearW4A8& op;
    QuantizeDown quantizer;  // of this chunk: x, the projection and h
    GemmW4A4Up branch;       // of this chunk: low rank, bias, out
    const float* smooth;
    Code8* codes;     // (stretches, tokens, columns of a stretch)
    float* ascales;   // (tokens,)
    int32_t* starts;  // (tokens,) of the sums
    int64_t tile_m, tiles;
};

// Codes of a token from column k on, in the stretch that begins at k0.
inline Code8* codes_at(const Whole& whole, int64_t k0, int64_t token) {
    const int64_t columns = smaller(STRETCH8 * GROUP, whole.op.K - k0);
    return whole.codes + k0 * whole.quantizer.M + token * columns;
}

inline int32_t sum_of(I x) {
    int32_t lanes[LANES], sum = 0;
    store_int(lanes, x);
    for (int r = 0; r < LANES; ++r) sum += lanes[r];
    return sum;
}

// (K,) smoothed floats of a token -> its codes, scale and start.
inline void round_token(const Whole& whole, int64_t token, const float* row) {
    const int64_t K = whole.op.K;
    I largest_bits = splat_int(0), total_codes = splat_int(0);
    for (int64_t k = 0; k < K; k += LANES)
        largest_bits = max_int(largest_bits, and_(bits(load(row + k)), splat_int(0x7FFFFFFF)));
    const int32_t most = largest(largest_bits);
    float peak;
    std::memcpy(&peak, &most, 4);
    const float scale = whole.ascales[token] = peak / 127.0f;
    for (int64_t k = 0; k < K; k += GROUP) {
        F v[GROUP / LANES];
        I codes[GROUP / LANES];
        for (int i = 0; i < GROUP / LANES; ++i) v[i] = load(row + k + i * LANES);
        round_group(v, scale, false, codes);
        for (int i = 0; i < GROUP / LANES; ++i) total_codes = add_int(total_codes, codes[i]);
        const int64_t k0 = k / (STRETCH8 * GROUP) * (STRETCH8 * GROUP);
        store_codes8(codes, codes_at(whole, k0, token) + (k - k0));
    }
    whole.starts[token] = -OFFSET8 * sum_of(total_codes);
}

inline void quantize_tokens_task(const void* context, int64_t index, void* memory) {
    const Whole& whole = *static_cast<const Whole*>(context);
    const QuantizeDown& op = whole.quantizer;
    Carver carver{static_cast<char*>(memory)};
    const TokensScratch scratch(carver, op.K, op.R);
    const int64_t m0 = index * TOKENS, rows = smaller(TOKENS, op.M - m0);
    for (int64_t r = 0; r < rows; ++r) {
        to_floats(op.x_dtype, at(op.x, op.x_dtype, (m0 + r) * op.x_stride), op.K, scratch.row);
        for (int64_t k = 0; k < op.K; k += GROUP) {
            F v[GROUP / LANES];
            smooth_group(scratch.row + k, whole.smooth + k, false, op.rotate, v);
            for (int i = 0; i < GROUP / LANES; ++i) store(scratch.row + k + i * LANES, v[i]);
        }
        round_token(whole, m0 + r, scratch.row);
    }
    if (op.R == 0) return;
    scratch.project.clear(rows, op.R);
    for (int64_t k0 = 0; k0 < op.K; k0 += DOWN_BLOCK) {
        const int64_t columns = smaller(DOWN_BLOCK, op.K - k0);
        for (int64_t r = 0; r < rows; ++r)
            to_floats(op.x_dtype, at(op.x, op.x_dtype, (m0 + r) * op.x_stride + k0), columns,
                      scratch.project.x + r * DOWN_BLOCK);
        project_block(op, k0, columns, rows, scratch.project);
    }
    store_h(op, m0, rows, scratch.project.h);
}

// Scales of LANES outputs, of which the first `valid` exist: int8 -> each twice, as two int16.
inline I pairs_of_scales(const int8_t* scales, int valid) {
    int8_t part[LANES] = {};
    std::memcpy(part, scales, static_cast<size_t>(valid < LANES ? valid : LANES));
    const I wide = widen_bytes(part);
    return or_(and_(wide, splat_int(0xFFFF)), shift_left<16>(wide));
}

// One group of PANEL outputs, from n0 on, of which `valid` exist -> (GROUP, PANEL) weights.
inline void decode_whole(const LinearW4A8& op, const Table8& table, int64_t group, int64_t n0,
                         int valid, Weight8* panel) {
    const int64_t stride = op.K / 2, each = op.group / 8;  // dwords that share a scale
    const uint8_t* weight =
        static_cast<const uint8_t*>(op.weight) + n0 * stride + group * GROUP / 2;
    const int8_t* scales =
        static_cast<const int8_t*>(op.weight_scale) + group * (GROUP / op.group) * op.N + n0;
    for (int n = 0; n < PANEL; n += LANES) {
        const int first = n < valid ? n : valid - 1;
        I words[8], scale = splat_int(0);
        load_words(weight + first * stride, stride, valid - first, words);
        for (int d = 0; d < 8; ++d) {
            if (d % each == 0)
                scale = pairs_of_scales(scales + d / each * op.N + first, valid - first);
            decode_eight(words[d], table, scale, panel + d * 8 * PANEL, n);
        }
    }
}

// Up to R tokens.
template <int R>
void dot_whole_rows(int rows, const Code8* codes, int64_t columns, const Weight8* panels,
                    int32_t* sums) {
    if constexpr (R > 0) {
        if (rows >= R)
            dot_whole<R>(codes, columns, panels, sums);
        else
            dot_whole_rows<R - 1>(rows, codes, columns, panels, sums);
    }
}

// What a tile's low rank and bias give, + sums * ascale * channel_scale, stored.
inline void finish_whole(const Whole& whole, int64_t m0, int64_t rows, int64_t n0, int valid,
                         const GemmScratch& scratch, const int32_t* sums) {
    start_tile(whole.branch, m0, rows, n0, valid, scratch, scratch.tiles);
    float scales[TILE_N] = {};
    std::memcpy(scales, whole.op.channel_scale + n0, static_cast<size_t>(valid) * 4);
    for (int64_t r = 0; r < rows; ++r) {
        const F ascale = splat(whole.ascales[m0 + r]);
        float* row = scratch.tiles + r * TILE_N;
        for (int n = 0; n < TILE_N; n += LANES) {
            const F exact = to_float(load_int(sums + r * TILE_N + n));
            store(row + n, fma(mul(exact, ascale), load(scales + n), load(row + n)));
        }
    }
    store_tile(&whole.branch, scratch.tiles, m0, rows, n0, valid);
}

inline void whole_task(const void* context, int64_t index, void* memory) {
    const Whole& whole = *static_cast<const Whole*>(context);
    const LinearW4A8& op = whole.op;
    Carver carver{static_cast<char*>(memory)};
    const WholeScratch scratch(carver, whole.tile_m, whole.tiles);
    const int64_t width = whole.tiles * TILE_N, across = divide_up(op.N, width);
    const int64_t m0 = index / across * whole.tile_m,
                  rows = smaller(whole.tile_m, whole.branch.M - m0);
    const int64_t n_begin = index % across * width, n_end = smaller(op.N, n_begin + width);
    const auto valid = [&](int64_t n0) { return static_cast<int>(smaller(TILE_N, n_end - n0)); };
    const auto tile = [&](int64_t n0) { return scratch.sums + (n0 - n_begin) * whole.tile_m; };
    const Table8 table = table_of(static_cast<const int8_t*>(op.table));

    for (int64_t n0 = n_begin; n0 < n_end; n0 += TILE_N)
        for (int64_t r = 0; r < rows; ++r)
            for (int n = 0; n < TILE_N; n += LANES)
                store_int(tile(n0) + r * TILE_N + n, splat_int(whole.starts[m0 + r]));
    for (int64_t k0 = 0; k0 < op.K; k0 += STRETCH8 * GROUP) {
        const int64_t columns = smaller(STRETCH8 * GROUP, op.K - k0);
        for (int64_t n0 = n_begin; n0 < n_end; n0 += TILE_N) {
            for (int p = 0; p < TILE_N / PANEL; ++p) {
                // As in decode_stretch: a panel wholly beyond N repeats the last row.
                const int first = p * PANEL < valid(n0) ? p * PANEL : valid(n0) - 1;
                Weight8* panel = scratch.panels + p * STRETCH8 * GROUP * PANEL;
                for (int64_t k = 0; k < columns; k += GROUP)
                    decode_whole(op, table, (k0 + k) / GROUP, n0 + first, valid(n0) - first,
                                 panel + k * PANEL);
            }
            for (int64_t r = 0; r < rows; r += ROWS8)
                dot_whole_rows<ROWS8>(static_cast<int>(smaller(ROWS8, rows - r)),
                                      codes_at(whole, k0, m0 + r), columns, scratch.panels,
                                      tile(n0) + r * TILE_N);
        }
    }
    for (int64_t n0 = n_begin; n0 < n_end; n0 += TILE_N)
        finish_whole(whole, m0, rows, n0, valid(n0), scratch.start, tile(n0));
}

// The quantizer's and the low-rank branch's part of an op, for tokens from m on.
inline QuantizeDown quantizer_of(const LinearW4A8& op, int64_t m, int64_t tokens, float* h) {
    QuantizeDown part{};
    part.M = tokens, part.K = op.K, part.R = op.R;
    part.x = at(op.x, op.x_dtype, m * op.x_stride);
    part.x_stride = op.x_stride, part.x_dtype = op.x_dtype;
    part.proj_down = op.proj_down, part.param_dtype = op.param_dtype;
    part.rotate = op.rotate, part.codes = Codes::int8, part.h = h;
    return part;
}

inline GemmW4A4Up branch_of(const LinearW4A8& op, int64_t m, int64_t tokens, const float* h) {
    GemmW4A4Up part{};
    part.M = tokens, part.N = op.N, part.K = op.K, part.R = op.R;
    part.h = h, part.h_stride = op.R;
    part.proj_up = op.proj_up, part.bias = op.bias, part.param_dtype = op.param_dtype;
    part.out = const_cast<char*>(at(op.out, op.x_dtype, m * op.N)), part.out_dtype = op.x_dtype;
    return part;
}

inline void linear_w4a8(const LinearW4A8& op, int threads) {
    if (op.M == 0 || op.N == 0) return;
    const int64_t most = smaller(op.M, CHUNK);
    Scratch<float> smooth(op.K), ascales(most), h(most * op.R);
    Scratch<int32_t> starts(most);
    Scratch<Code8> codes(most * op.K);
    to_floats(op.param_dtype, op.smooth, op.K, smooth.data);
    for (int64_t m = 0; m < op.M; m += CHUNK) {
        const int64_t tokens = smaller(CHUNK, op.M - m);
        // As in gemm_chunk.
        const int64_t tile_m =
            divide_up(divide_up(tokens, divide_up(tokens, TILE_M)), ROWS8) * ROWS8;
        const int64_t all = divide_up(tokens, tile_m) * divide_up(op.N, TILE_N);
        const int64_t wide = smaller(MOST_TILES, all / (4 * threads)), tiles = wide > 1 ? wide : 1;
        const Whole whole{op,
                          quantizer_of(op, m, tokens, h.data),
                          branch_of(op, m, tokens, h.data),
                          smooth.data,
                          codes.data,
                          ascales.data,
                          starts.data,
                          tile_m,
                          tiles};
        parallel(divide_up(tokens, TOKENS), threads, scratch_bytes<TokensScratch>(op.K, op.R),
                 quantize_tokens_task, &whole);
        parallel(divide_up(tokens, tile_m) * divide_up(op.N, tiles * TILE_N), threads,
                 scratch_bytes<WholeScratch>(tile_m, tiles), whole_task, &whole);
    }
}
