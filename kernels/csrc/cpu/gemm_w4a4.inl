// The int4 product. A task is a tile of up to TILE_M tokens by a few times TILE_N outputs:
//   1. the tile starts as bias + h . proj_up^T;
//   2. for every stretch of STRETCH groups the weights of TILE_N outputs are decoded once into
//   panels that stay in L1,
//   3. ROWS tokens at a time run along a stretch: per group exact integer sums, then sum * ascale
//   * weight_scale onto the tile;
//   4. the tile is converted and stored.
// A stretch of the tokens' codes stays in L2 while the task's outputs take their turns.
// Codes inside a group may come in any order as long as both sides agree. A dword of packed codes
// holds 8 neighbours, and so do two of codes of 8 bits; it becomes two quads, the even columns (low
// nibbles) and the odd ones, so that decoding is two masks and a shift, of weights and of
// activations alike.

constexpr int TILE_M = 256;  // tokens that share one decoding of the weights
constexpr int TILE_N = 2 * PANEL;
constexpr int STRETCH = 8;       // groups: two panels of 8 KB and ROWS tokens' codes fit into L1
constexpr int64_t CHUNK = 1024;  // tokens unpacked at a time: bounds the scratch

// One group of LANES tokens, in the order in which the inner loop reads it.
struct Step {
    int32_t codes[GROUP / 4][LANES];  // a quad of codes each, as signed bytes
    int32_t offset[LANES];            // what the integer sums start with
    float scale[LANES];
#ifdef NIBBLE_SUMS_ARE_FLOATS
    float start[LANES];  // sum * scale = bits of the sum, as a float, * scale + start
    int32_t ordinary;    // a bit for each token of which that is true
#endif
};

// One group of PANEL outputs -> (GROUP / 4, PANEL, 4) bytes, each a code + 8. Flipping a nibble's
// highest bit adds the 8.
inline void decode_panel(const uint8_t* weight, int64_t stride, int valid, uint8_t* panel) {
    const I flip = splat_int(static_cast<int32_t>(0x88888888u)), low = splat_int(0x0F0F0F0F);
    for (int n = 0; n < PANEL; n += LANES) {
        I words[8];
        if (n < valid)
            load_words(weight + n * stride, stride, valid - n, words);
        else
            load_words(weight + (valid - 1) * stride, stride, 1, words);
        for (int d = 0; d < 8; ++d) {
            const I flipped = xor_(words[d], flip);
            store_int(panel + (2 * d * PANEL + n) * 4, and_(flipped, low));
            store_int(panel + ((2 * d + 1) * PANEL + n) * 4, and_(shift_right<4>(flipped), low));
        }
    }
}

// What the inner loop reads and adds to: one stretch of TILE_N outputs.
struct Stretch {
    int groups;
    uint8_t* panels[TILE_N / PANEL];  // (groups, GROUP / 4, PANEL, 4) each
    float* scales;                    // (groups, TILE_N)
};

#include NIBBLE_DOT

// Of the LANES tokens of a step: where their codes begin, how far they are apart, how many exist.
struct StepRows {
    const uint8_t* codes;
    int64_t stride;
    int valid;
};

// Sums of a token's codes, of the first two of all quads in the lower 16 bits and of the others in
// the upper ones, each code having `more` added -> what the token's integer sums start with.
inline I start_of(I pairs, int more) {
    const I bias = splat_int(more * GROUP / 2);
    return offset(sub_int(and_(pairs, splat_int(0xFFFF)), bias),
                  sub_int(shift_right<16>(pairs), bias));
}

// Packed codes of one group.
inline void unpack_nibbles(const StepRows& rows, bool is_unsigned, Step& step) {
    const I low = splat_int(0x0F0F0F0F), top = splat_int(0x08080808);
    I words[8], bytes = splat_int(0);  // sums of codes, + 8 if signed: 16 of them fit into a byte
    load_words(rows.codes, rows.stride, rows.valid, words);
    for (int quad = 0; quad < GROUP / 4; ++quad) {
        const I word = words[quad / 2];
        I codes = and_(quad % 2 ? shift_right<4>(word) : word, low);
        if (!is_unsigned) {
            bytes = add_int(bytes, xor_(codes, top));
            // A code's highest bit, 8, times 30 is 0xF0: the sign of the byte.
            const I sign = and_(codes, top);
            codes = or_(codes, sub_int(shift_left<5>(sign), shift_left<1>(sign)));
        } else {
            bytes = add_int(bytes, codes);
        }
        store_int(step.codes[quad], codes);
    }
    const I halves = splat_int(0x00FF00FF);
    const I pairs = add_int(and_(bytes, halves), and_(shift_right<8>(bytes), halves));
    store_int(step.offset, start_of(pairs, is_unsigned ? 0 : 8));
}

// Codes of 8 bits of one group. Two dwords, 8 neighbours, become a quad of even columns and one of
// odd columns, as the weights' nibbles do.
inline void unpack_bytes(const StepRows& rows, Step& step) {
    const I halves = splat_int(0x00FF00FF), lowest = splat_int(0xFF), second = splat_int(0xFF00);
    const I top = splat_int(static_cast<int32_t>(0x80808080u));
    I pairs = splat_int(0);
    for (int half = 0; half < 2; ++half) {
        I words[8];
        load_words(rows.codes + half * GROUP / 2, rows.stride, rows.valid, words);
        for (int eight = 0; eight < 4; ++eight) {
            const I left = words[2 * eight], right = words[2 * eight + 1];
            I quads[2];
            for (int odd = 0; odd < 2; ++odd) {
                // Bytes 0 and 2 of each, then side by side.
                const I a = and_(odd ? shift_right<8>(left) : left, halves);
                const I b = and_(odd ? shift_right<8>(right) : right, halves);
                const I low = or_(and_(a, lowest), and_(shift_right<8>(a), second));
                const I high = or_(and_(b, lowest), and_(shift_right<8>(b), second));
                quads[odd] = or_(low, shift_left<16>(high));
                const I positive = xor_(quads[odd], top);  // + 128
                pairs = add_int(
                    pairs, add_int(and_(positive, halves), and_(shift_right<8>(positive), halves)));
                store_int(step.codes[8 * half + 2 * eight + odd], quads[odd]);
            }
        }
    }
    store_int(step.offset, start_of(pairs, 128));
}

// Codes of one group of LANES tokens -> a step. Tokens that do not exist repeat the last one, with
// a scale of 0.
inline void unpack_step(const GemmW4A4Up& op, int64_t m0, int64_t group, Step& step) {
    const int valid = static_cast<int>(smaller(LANES, op.M - m0));
    const int64_t stride = bytes_of(op.codes, op.K);
    const uint8_t* codes = static_cast<const uint8_t*>(op.q) + m0 * stride;
    const StepRows rows{codes + bytes_of(op.codes, group * GROUP), stride, valid};
    if (op.codes == Codes::int8)
        unpack_bytes(rows, step);
    else
        unpack_nibbles(rows, op.act_unsigned && group * GROUP >= op.unsigned_from, step);
    for (int r = 0; r < LANES; ++r)
        step.scale[r] = r < valid ? op.ascales[group * op.M + m0 + r] : 0.0f;
    finish_step(step);
}

// Up to R tokens of LANES, from `first` on.
template <int R>
void dot_rows(int rows, const Step* steps, int first, const Stretch& stretch, float* tile) {
    if constexpr (R > 0) {
        if (rows >= R)
            dot_tile<R>(steps, first, stretch, tile);
        else
            dot_rows<R - 1>(rows, steps, first, stretch, tile);
    }
}

// proj_up (N, R), `valid` rows of it and `count` columns from r0 on -> (count, PANEL) floats.
// `rows` is scratch for (PANEL, BLOCK).
inline void load_up_panel(const void* proj_up, Dtype dtype, int64_t rank, int64_t n0, int valid,
                          int64_t r0, int64_t count, float* rows, float* panel) {
    for (int n = 0; n < PANEL; ++n) {
        if (n < valid)
            to_floats(dtype, at(proj_up, dtype, (n0 + n) * rank + r0), count, rows + n * BLOCK);
        else
            std::memset(rows + n * BLOCK, 0, static_cast<size_t>(count) * 4);
    }
    int64_t r = 0;
    for (; r + 8 <= count; r += 8)
        for (int n = 0; n < PANEL; n += 8)
            transpose_8x8(rows + n * BLOCK + r, BLOCK, panel + r * PANEL + n, PANEL);
    for (; r < count; ++r)
        for (int n = 0; n < PANEL; ++n) panel[r * PANEL + n] = rows[n * BLOCK + r];
}

struct GemmScratch {
    float *tiles, *rows, *up, *scales;
    uint8_t* panels;
    GemmScratch(Carver& carver, int64_t floats)
        : tiles(carver.take<float>(floats)),
          rows(carver.take<float>(BLOCK * PANEL)),
          up(carver.take<float>(BLOCK * PANEL)),
          scales(carver.take<float>(STRETCH * TILE_N)),
          panels(carver.take<uint8_t>(STRETCH * GROUP * TILE_N)) {}
};

// The finished tile (rows, TILE_N): `valid` of its columns are stored.
using Epilogue = void (*)(const void* context, float* tile, int64_t m0, int64_t rows, int64_t n0,
                          int64_t valid);

struct Gemm {
    const GemmW4A4Up& op;
    const Step* steps;       // (stretches, LANES tokens each, groups of a stretch) of this chunk
    int64_t m_begin, m_end;  // the chunk
    int64_t tile_m, tiles;   // of a task: tokens, and tiles of TILE_N outputs
    Epilogue epilogue;
    const void* context;
};

// The first step of a stretch that begins at group g0, of the LANES tokens of a number in the
// chunk: one stretch of all tokens lies together, as a task reads it.
inline int64_t step_of(const Gemm& gemm, int64_t g0, int64_t block) {
    const int64_t blocks = divide_up(gemm.m_end - gemm.m_begin, LANES);
    return g0 * blocks + block * smaller(STRETCH, gemm.op.K / GROUP - g0);
}

inline void start_tile(const GemmW4A4Up& op, int64_t m0, int64_t rows, int64_t n0, int valid,
                       const GemmScratch& scratch, float* tile) {
    float bias[TILE_N] = {};
    if (op.bias) to_floats(op.param_dtype, at(op.bias, op.param_dtype, n0), valid, bias);
    for (int64_t r = 0; r < rows; ++r) std::memcpy(tile + r * TILE_N, bias, sizeof bias);
    for (int p = 0; p * PANEL < valid; ++p)
        for (int64_t r0 = 0; r0 < op.R; r0 += BLOCK) {
            const int64_t count = smaller(BLOCK, op.R - r0);
            load_up_panel(op.proj_up, op.param_dtype, op.R, n0 + p * PANEL, valid - p * PANEL, r0,
                          count, scratch.rows, scratch.up);
            fma_rows(rows, op.h + m0 * op.h_stride + r0, op.h_stride, scratch.up, count,
                     tile + p * PANEL, TILE_N);
        }
}

// Weights and scales of up to STRETCH groups from g0 on, of `valid` outputs from n0 on.
inline Stretch decode_stretch(const GemmW4A4Up& op, int64_t g0, int64_t n0, int valid,
                              const GemmScratch& scratch) {
    const int64_t groups = op.K / GROUP, stride = op.K / 2;
    const uint8_t* weight = static_cast<const uint8_t*>(op.weight) + n0 * stride + g0 * (GROUP / 2);
    Stretch stretch{static_cast<int>(smaller(STRETCH, groups - g0)), {}, scratch.scales};
    for (int p = 0; p < TILE_N / PANEL; ++p) {
        stretch.panels[p] = scratch.panels + p * STRETCH * GROUP * PANEL;
        // A panel wholly beyond N repeats the last row: its columns are computed with the others'
        // and not stored.
        const int first = p * PANEL < valid ? p * PANEL : valid - 1;
        for (int g = 0; g < stretch.groups; ++g)
            decode_panel(weight + first * stride + g * (GROUP / 2), stride, valid - first,
                         stretch.panels[p] + g * GROUP * PANEL);
    }
    for (int g = 0; g < stretch.groups; ++g) {
        float* scales = scratch.scales + g * TILE_N;
        to_floats(op.param_dtype, at(op.weight_scale, op.param_dtype, (g0 + g) * op.N + n0), valid,
                  scales);
        for (int n = valid; n < TILE_N; ++n) scales[n] = 0.0f;
    }
    return stretch;
}

inline void gemm_task(const void* context, int64_t index, void* memory) {
    const Gemm& gemm = *static_cast<const Gemm*>(context);
    const GemmW4A4Up& op = gemm.op;
    Carver carver{static_cast<char*>(memory)};
    const GemmScratch scratch(carver, gemm.tiles * gemm.tile_m * TILE_N);
    const int64_t width = gemm.tiles * TILE_N, columns = divide_up(op.N, width);
    const int64_t m0 = gemm.m_begin + index / columns * gemm.tile_m,
                  rows = smaller(gemm.tile_m, gemm.m_end - m0), groups = op.K / GROUP;
    const int64_t n_begin = index % columns * width, n_end = smaller(op.N, n_begin + width);
    const auto valid = [&](int64_t n0) { return static_cast<int>(smaller(TILE_N, n_end - n0)); };
    const auto tile = [&](int64_t n0) { return scratch.tiles + (n0 - n_begin) * gemm.tile_m; };

    for (int64_t n0 = n_begin; n0 < n_end; n0 += TILE_N)
        start_tile(op, m0, rows, n0, valid(n0), scratch, tile(n0));
    for (int64_t g0 = 0; g0 < groups; g0 += STRETCH)
        for (int64_t n0 = n_begin; n0 < n_end; n0 += TILE_N) {
            const Stretch stretch = decode_stretch(op, g0, n0, valid(n0), scratch);
            for (int64_t r = 0; r < rows; r += ROWS)
                dot_rows<ROWS>(static_cast<int>(smaller(ROWS, rows - r)),
                               gemm.steps + step_of(gemm, g0, (m0 - gemm.m_begin + r) / LANES),
                               static_cast<int>(r % LANES), stretch, tile(n0) + r * TILE_N);
        }
    for (int64_t n0 = n_begin; n0 < n_end; n0 += TILE_N)
        gemm.epilogue(gemm.context, tile(n0), m0, rows, n0, valid(n0));
}

inline void unpack_task(const void* context, int64_t tile, void*) {
    const Gemm& gemm = *static_cast<const Gemm*>(context);
    Step* steps = const_cast<Step*>(gemm.steps);
    for (int64_t g = 0; g < gemm.op.K / GROUP; ++g)
        unpack_step(gemm.op, gemm.m_begin + tile * LANES, g,
                    steps[step_of(gemm, g / STRETCH * STRETCH, tile) + g % STRETCH]);
}

// Tokens m_begin .. m_end - 1, through `epilogue`. `steps` is scratch for them.
inline void gemm_chunk(const GemmW4A4Up& op, int64_t m_begin, int64_t m_end, Step* steps,
                       int threads, Epilogue epilogue, const void* context) {
    const int64_t rows = m_end - m_begin;
    // Tiles of one height, a multiple of LANES, rather than a full one and a sliver.
    const int64_t tile_m = divide_up(divide_up(rows, divide_up(rows, TILE_M)), LANES) * LANES;
    const int64_t all = divide_up(rows, tile_m) * divide_up(op.N, TILE_N);
    // Wide tasks, as long as every thread gets several.
    const int64_t wide = smaller(MOST_TILES, all / (4 * threads)), tiles = wide > 1 ? wide : 1;
    const Gemm gemm{op, steps, m_begin, m_end, tile_m, tiles, epilogue, context};
    parallel(divide_up(rows, LANES), threads, 0, unpack_task, &gemm);
    parallel(divide_up(rows, tile_m) * divide_up(op.N, tiles * TILE_N), threads,
             scratch_bytes<GemmScratch>(tiles * tile_m * TILE_N), gemm_task, &gemm);
}

inline void store_tile(const void* context, float* tile, int64_t m0, int64_t rows, int64_t n0,
                       int64_t valid) {
    const GemmW4A4Up& op = *static_cast<const GemmW4A4Up*>(context);
    for (int64_t r = 0; r < rows; ++r)
        from_floats(op.out_dtype, tile + r * TILE_N, valid,
                    const_cast<char*>(at(op.out, op.out_dtype, (m0 + r) * op.N + n0)));
}

inline void gemm_w4a4_up(const GemmW4A4Up& op, int threads) {
    if (op.M == 0 || op.N == 0) return;
    Scratch<Step> steps(divide_up(smaller(op.M, CHUNK), LANES) * (op.K / GROUP));
    for (int64_t m = 0; m < op.M; m += CHUNK)
        gemm_chunk(op, m, smaller(op.M, m + CHUNK), steps.data, threads, store_tile, &op);
}
