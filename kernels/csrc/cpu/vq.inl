// y = (x . codebook[index]^T) * scale + bias + addend. Three ways, chosen by cost:
//   rows     one or two tokens: a row's codewords go from the cache straight into its sum, and the
//   weights are read once, at 2 or 3 bits tables   a sub-vector of x meets only C codewords, so its
//   C dot products are made once and every output looks its own up: one addition
//            instead of D multiply-adds. LANES tokens lie side by side in a table's entry, so a
//            lookup is one vector load.
//   panels   weights are decoded to floats once and used by all tokens of a tile, as in w4a16
// Tables win where there are many more outputs than codewords and a table lies in L1. A table costs
// C D multiply-adds for each token and sub-vector, a lookup about as much as 1.3 vector
// multiply-adds (measured on Zen 3), the panels' way D of them and the decoding.

constexpr int64_t VQ_COLUMNS = 256;   // columns of K that the tables' way takes at a time
constexpr int64_t VQ_OUTPUTS = 4096;  // outputs of a task at most: their sums stay in L2
constexpr int64_t VQ_BLOCKS =
    8;  // of LANES tokens: a task's at most, which share its unpacked indices
constexpr int64_t VQ_TABLES = 32768;  // bytes of tables read together

// The codebook as floats, where rows lie, and how eight indices of up to 8 bits are taken out of
// eight bytes: each from two bytes.
struct Vq {
    const GemmVQ& op;
    const float* codebook;  // (C, D)
    int64_t row_bytes;
    const uint8_t* end;   // of all indices
    uint8_t places[16];   // the two bytes of each index; 0x80: none
    uint16_t factors[8];  // move it to the top of 16 bits
    Vq(const GemmVQ& op, const float* codebook)
        : op(op), codebook(codebook), row_bytes(op.K / op.vector * op.bits / 8) {
        end = static_cast<const uint8_t*>(op.indices) + op.N * row_bytes;
        for (int i = 0; i < 8 && op.bits <= 8; ++i) {
            const int first = i * op.bits, shift = first % 8;
            places[2 * i] = static_cast<uint8_t>(first / 8);
            places[2 * i + 1] = static_cast<uint8_t>(shift + op.bits > 8 ? first / 8 + 1 : 0x80);
            factors[i] = static_cast<uint16_t>(1 << (16 - op.bits - shift));
        }
    }
};

inline int64_t vq_codewords(const GemmVQ& op) { return int64_t(1) << op.bits; }

// `count` indices of a row, of which `from` is the first one's byte, each shifted left by `up`.
NIBBLE_NOINLINE void unpack_indices(const Vq& vq, const uint8_t* from, int64_t count, int up,
                                    uint16_t* result) {
    const int bits = vq.op.bits;
    const uint32_t mask = (1u << bits) - 1;
    int64_t i = 0;
    for (; bits <= 8 && i + 8 <= count && vq.end - (from + i * bits / 8) >= 8; i += 8)
        spread_8(from + i * bits / 8, vq.places, vq.factors, 16 - bits, up, result + i);
    for (; i < count; ++i) {
        const int64_t first = i * bits / 8, last = (i * bits + bits - 1) / 8;
        uint32_t word = 0;
        for (int64_t byte = last; byte >= first; --byte) word = word << 8 | from[byte];
        result[i] = static_cast<uint16_t>((word >> i * bits % 8 & mask) << up);
    }
}

constexpr int log2_of(int64_t x) { return x <= 1 ? 0 : 1 + log2_of(x / 2); }

// One token's outputs n0 .. n0 + count, as floats before the scale -> their place.
inline void store_vq(const GemmVQ& op, int64_t m, int64_t n0, int64_t count, const float* scale,
                     const float* bias, float* y) {
    float addend[64];
    for (int64_t n = 0; n < count; n += 64) {
        const int64_t some = smaller(64, count - n);
        if (op.addend)
            to_floats(op.addend_dtype, at(op.addend, op.addend_dtype, m * op.N + n0 + n), some,
                      addend);
        for (int64_t i = 0; i < some; ++i)
            y[n + i] =
                y[n + i] * scale[n + i] + (op.addend ? bias[n + i] + addend[i] : bias[n + i]);
    }
    from_floats(op.out_dtype, y, count, const_cast<char*>(at(op.out, op.out_dtype, m * op.N + n0)));
}

inline void vq_parameters(const GemmVQ& op, int64_t n0, int64_t count, float* scale, float* bias) {
    for (int64_t i = 0; i < count; ++i) scale[i] = 1.0f, bias[i] = 0.0f;
    if (op.scale) to_floats(op.param_dtype, at(op.scale, op.param_dtype, n0), count, scale);
    if (op.bias) to_floats(op.param_dtype, at(op.bias, op.param_dtype, n0), count, bias);
}

#include "vq_rows.inl"

// ---- tables -------------------------------------------------------------------------------------

struct Lookup {
    const Vq& vq;
    int64_t outputs, tiles;  // of a task; tasks that share their tokens
    int64_t blocks;          // of LANES tokens: a task's, which share its unpacked indices
};

struct LookupScratch {
    float *x, *rows, *tables, *part, *total;
    uint16_t* codes;
    LookupScratch(Carver& carver, int64_t outputs, int64_t blocks, int64_t table_floats,
                  int64_t vector)
        : x(carver.take<float>(VQ_COLUMNS * LANES)),
          rows(carver.take<float>(VQ_COLUMNS)),
          tables(carver.take<float>(table_floats)),
          part(carver.take<float>(outputs * LANES)),
          total(carver.take<float>(blocks * outputs * LANES)),
          codes(carver.take<uint16_t>(outputs * (VQ_COLUMNS / vector))) {}
};

// How many tables are read together.
inline int vq_together(const GemmVQ& op) {
    const int64_t table = vq_codewords(op) * LANES * 4;
    if (8 * table <= VQ_TABLES / 2) return 8;
    return 4 * table <= VQ_TABLES ? 4 : 2;
}

// (C, LANES): each codeword's product with the tokens' sub-vectors.
template <int D>
NIBBLE_NOINLINE void make_table(const float* codebook, int64_t codewords, const float* x,
                                float* table) {
    F value[D];
    for (int e = 0; e < D; ++e) value[e] = load(x + e * LANES);
    for (int64_t c = 0; c < codewords; ++c) {
        F sum = mul(splat(codebook[c * D]), value[0]);
        for (int e = 1; e < D; ++e) sum = fma(splat(codebook[c * D + e]), value[e], sum);
        store(table + c * LANES, sum);
    }
}

// Looks J sub-vectors up for all outputs, and begins their sums or adds to them.
template <int J>
NIBBLE_NOINLINE void look_up(const uint16_t* codes, const float* tables, int64_t outputs,
                             bool begin, float* part) {
    for (int64_t n = 0; n < outputs; ++n, codes += J) {
        F sum[2] = {load(tables + codes[0]), load(tables + codes[1])};
        for (int j = 2; j < J; ++j) sum[j % 2] = add(sum[j % 2], load(tables + codes[j]));
        const F all = add(sum[0], sum[1]);
        store(part + n * LANES, begin ? all : add(load(part + n * LANES), all));
    }
}

// Indices of a stretch as places in J tables one after another: (sub-vectors / J, outputs, J), in
// the order of the lookups.
template <int J>
void arrange_codes(const Vq& vq, int64_t n0, int64_t outputs, int64_t first, int64_t count,
                   uint16_t* codes) {
    constexpr int64_t SOME = 16;  // rows at a time: a run of stores to one place, instead of a
                                  // store each to places that share a cache set
    const int up = log2_of(LANES);
    uint16_t rows[SOME][VQ_COLUMNS / 2] = {}, table[J];
    for (int j = 0; j < J; ++j) table[j] = static_cast<uint16_t>(j << (vq.op.bits + up));
    for (int64_t n = 0; n < outputs; n += SOME) {
        const int64_t some = smaller(SOME, outputs - n);
        for (int64_t r = 0; r < some; ++r) {
            const uint8_t* from = static_cast<const uint8_t*>(vq.op.indices) +
                                  (n0 + n + r) * vq.row_bytes + first * vq.op.bits / 8;
            for (int64_t byte = 0; byte < count * vq.op.bits / 8 + 63; byte += 64)
                prefetch(from + SOME * vq.row_bytes + byte);
            unpack_indices(vq, from, count, up, rows[r]);
        }
        for (int64_t j = 0; j < count; j += J)
            for (int64_t r = 0; r < some; ++r)
                for (int i = 0; i < J; ++i)
                    codes[j * outputs + (n + r) * J + i] =
                        static_cast<uint16_t>(rows[r][j + i] + table[i]);
    }
}

// part = the stretch's sums for LANES tokens.
template <int D, int J>
void look_up_stretch(const Vq& vq, const LookupScratch& scratch, int64_t outputs, int64_t count) {
    const int64_t codewords = vq_codewords(vq.op);
    for (int64_t j = 0; j < count; j += J) {
        for (int i = 0; i < J; ++i) {
            float* table = scratch.tables + i * codewords * LANES;
            // Beyond the last sub-vector codes are any, and tables are of zeros.
            if (j + i < count)
                make_table<D>(vq.codebook, codewords, scratch.x + (j + i) * D * LANES, table);
            else
                std::memset(table, 0, static_cast<size_t>(codewords) * LANES * 4);
        }
        look_up<J>(scratch.codes + j * outputs, scratch.tables, outputs, j == 0, scratch.part);
    }
}

// Tokens m0 .. m0 + LANES side by side, zeros beyond the last one.
inline void gather_tokens(const GemmVQ& op, int64_t m0, int64_t k0, int64_t columns, float* row,
                          float* x) {
    for (int lane = 0; lane < LANES; ++lane) {
        if (m0 + lane < op.M)
            to_floats(op.x_dtype, at(op.x, op.x_dtype, (m0 + lane) * op.K + k0), columns, row);
        else
            std::memset(row, 0, static_cast<size_t>(columns) * 4);
        for (int64_t k = 0; k < columns; ++k) x[k * LANES + lane] = row[k];
    }
}

inline void add_to_total(const float* part, int64_t count, bool begin, float* total) {
    for (int64_t i = 0; i < count; i += LANES)
        store(total + i, begin ? load(part + i) : add(load(total + i), load(part + i)));
}

template <int D, int J>
void lookup_sums(const Lookup& lookup, const LookupScratch& scratch, int64_t m0, int64_t n0,
                 int64_t outputs) {
    const GemmVQ& op = lookup.vq.op;
    for (int64_t k0 = 0; k0 < op.K; k0 += VQ_COLUMNS) {
        const int64_t columns = smaller(VQ_COLUMNS, op.K - k0);
        arrange_codes<J>(lookup.vq, n0, outputs, k0 / D, columns / D, scratch.codes);
        for (int64_t block = 0; block < lookup.blocks && m0 + block * LANES < op.M; ++block) {
            gather_tokens(op, m0 + block * LANES, k0, columns, scratch.rows, scratch.x);
            look_up_stretch<D, J>(lookup.vq, scratch, outputs, columns / D);
            add_to_total(scratch.part, outputs * LANES, k0 == 0,
                         scratch.total + block * outputs * LANES);
        }
    }
    if (op.K == 0)
        std::memset(scratch.total, 0, static_cast<size_t>(lookup.blocks * outputs * LANES) * 4);
}

template <int D>
void lookup_sums(const Lookup& lookup, const LookupScratch& scratch, int64_t m0, int64_t n0,
                 int64_t outputs) {
    const int together = vq_together(lookup.vq.op);
    if (together == 8)
        lookup_sums<D, 8>(lookup, scratch, m0, n0, outputs);
    else if (together == 4)
        lookup_sums<D, 4>(lookup, scratch, m0, n0, outputs);
    else
        lookup_sums<D, 2>(lookup, scratch, m0, n0, outputs);
}

inline void lookup_task(const void* context, int64_t index, void* memory) {
    const Lookup& lookup = *static_cast<const Lookup*>(context);
    const GemmVQ& op = lookup.vq.op;
    Carver carver{static_cast<char*>(memory)};
    const LookupScratch scratch(carver, lookup.outputs, lookup.blocks,
                                vq_together(op) * vq_codewords(op) * LANES, op.vector);
    const int64_t m0 = index / lookup.tiles * lookup.blocks * LANES,
                  n0 = index % lookup.tiles * lookup.outputs;
    const int64_t outputs = smaller(lookup.outputs, op.N - n0),
                  tokens = smaller(lookup.blocks * LANES, op.M - m0);
    if (op.vector == 2)
        lookup_sums<2>(lookup, scratch, m0, n0, outputs);
    else if (op.vector == 4)
        lookup_sums<4>(lookup, scratch, m0, n0, outputs);
    else
        lookup_sums<8>(lookup, scratch, m0, n0, outputs);

    constexpr int64_t SOME = 64;
    float y[SOME], scale[SOME], bias[SOME];
    for (int64_t n = 0; n < outputs; n += SOME) {
        const int64_t some = smaller(SOME, outputs - n);
        vq_parameters(op, n0 + n, some, scale, bias);
        for (int64_t m = 0; m < tokens; ++m) {
            const float* sums = scratch.total + (m / LANES * outputs + n) * LANES + m % LANES;
            for (int64_t i = 0; i < some; ++i) y[i] = sums[i * LANES];
            store_vq(op, m0 + m, n0 + n, some, scale, bias, y);
        }
    }
}

// How the work is cut into tasks depends on the number of threads; the order of a sum does not.
inline void by_tables(const Vq& vq, int threads) {
    const GemmVQ& op = vq.op;
    const int64_t blocks = divide_up(op.M, LANES), wide = divide_up(op.N, VQ_OUTPUTS);
    const int64_t shared = smaller(VQ_BLOCKS, divide_up(blocks * wide, threads)),
                  rows = divide_up(blocks, shared);
    // With fewer tasks than threads outputs are divided too, as long as tables still pay.
    const int64_t tiles = rows * wide >= threads ? wide
                                                 : smaller(divide_up(threads, rows),
                                                           divide_up(op.N, 4 * vq_codewords(op)));
    const int64_t most = tiles > wide ? tiles : wide;
    const Lookup lookup{vq, divide_up(op.N, most), most, shared};
    const size_t bytes = scratch_bytes<LookupScratch>(
        lookup.outputs, shared, vq_together(op) * vq_codewords(op) * LANES, int64_t(op.vector));
    parallel(rows * most, threads, bytes, lookup_task, &lookup);
}

// ---- panels -------------------------------------------------------------------------------------

struct VqMany {
    const Vq& vq;
    float* x;  // (K in blocks, tokens, BLOCK)
    int64_t m_begin, tokens;
};

inline void vq_convert_task(const void* context, int64_t token, void*) {
    const VqMany& many = *static_cast<const VqMany*>(context);
    const GemmVQ& op = many.vq.op;
    for (int64_t k = 0; k < op.K; k += BLOCK) {
        const char* x = at(op.x, op.x_dtype, (many.m_begin + token) * op.K + k);
        to_floats(op.x_dtype, x, smaller(BLOCK, op.K - k),
                  many.x + k * many.tokens + token * BLOCK);
    }
}

// `columns` columns, a multiple of 8, of PANEL outputs -> (columns, PANEL) floats. Outputs that do
// not exist repeat the last one.
template <int D>
void decode_vq_panel(const Vq& vq, int64_t n0, int64_t valid, int64_t k0, int64_t columns,
                     float* panel) {
    for (int64_t n = 0; n < PANEL; n += 8) {
        uint16_t codes[8][BLOCK];
        for (int64_t r = 0; r < 8; ++r) {
            const int64_t row = n0 + smaller(n + r, valid - 1);
            const uint8_t* from = static_cast<const uint8_t*>(vq.op.indices) + row * vq.row_bytes +
                                  k0 / D * vq.op.bits / 8;
            unpack_indices(vq, from, columns / D, log2_of(D), codes[r]);
        }
        for (int64_t k = 0; k < columns; k += 8) {
            float block[8][8];
            for (int r = 0; r < 8; ++r)
                for (int i = 0; i < 8; i += D)
                    std::memcpy(block[r] + i, vq.codebook + codes[r][(k + i) / D],
                                D * sizeof(float));
            transpose_8x8(block[0], 8, panel + k * PANEL + n, PANEL);
        }
    }
}

inline void vq_many_task(const void* context, int64_t index, void* memory) {
    const VqMany& many = *static_cast<const VqMany*>(context);
    const GemmVQ& op = many.vq.op;
    Carver carver{static_cast<char*>(memory)};
    const ManyScratch scratch(carver, many.tokens);
    const int64_t n0 = index * PANEL, valid = smaller(PANEL, op.N - n0);
    std::memset(scratch.tile, 0, static_cast<size_t>(many.tokens * PANEL) * 4);
    for (int64_t k0 = 0; k0 < op.K; k0 += BLOCK) {
        const int64_t columns = smaller(BLOCK, op.K - k0);
        if (op.vector == 1)
            decode_vq_panel<1>(many.vq, n0, valid, k0, columns, scratch.panel);
        else if (op.vector == 2)
            decode_vq_panel<2>(many.vq, n0, valid, k0, columns, scratch.panel);
        else if (op.vector == 4)
            decode_vq_panel<4>(many.vq, n0, valid, k0, columns, scratch.panel);
        else
            decode_vq_panel<8>(many.vq, n0, valid, k0, columns, scratch.panel);
        // As in w4a16: tokens in full precision are added up in short pieces.
        const int64_t piece = op.x_dtype == Dtype::f32 ? 16 : columns;
        for (int64_t k = 0; k < columns; k += piece)
            fma_rows(many.tokens, many.x + k0 * many.tokens + k, BLOCK, scratch.panel + k * PANEL,
                     smaller(piece, columns - k), scratch.tile, PANEL);
    }
    float scale[PANEL], bias[PANEL];
    vq_parameters(op, n0, valid, scale, bias);
    for (int64_t m = 0; m < many.tokens; ++m)
        store_vq(op, many.m_begin + m, n0, valid, scale, bias, scratch.tile + m * PANEL);
}

inline void by_panels(const Vq& vq, int threads) {
    const GemmVQ& op = vq.op;
    Scratch<float> x(smaller(op.M, MANY_CHUNK) * divide_up(op.K, BLOCK) * BLOCK);
    for (int64_t m = 0; m < op.M; m += MANY_CHUNK) {
        const VqMany many{vq, x.data, m, smaller(MANY_CHUNK, op.M - m)};
        parallel(many.tokens, threads, 0, vq_convert_task, &many);
        parallel(divide_up(op.N, PANEL), threads, scratch_bytes<ManyScratch>(many.tokens),
                 vq_many_task, &many);
    }
}

inline void gemm_vq(const GemmVQ& op, int threads) {
    if (op.M == 0 || op.N == 0) return;
    Scratch<float> codebook(vq_codewords(op) * op.vector);
    to_floats(op.codebook_dtype, op.codebook, vq_codewords(op) * op.vector, codebook.data);
    const Vq vq(op, codebook.data);
    if (vq_by_rows(op.M, op.vector))
        by_rows(vq, threads);
    else if (vq_by_tables(op.N, op.bits, op.vector))
        by_tables(vq, threads);
    else
        by_panels(vq, threads);
}
