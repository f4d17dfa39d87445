// The vocabulary in plain C++, four floats at a time: loops that a compiler turns into whatever
// vectors the machine has.

constexpr int LANES = 4;
struct F {
    float v[LANES];
};
struct I {
    int32_t v[LANES];
};

#define NIBBLE_EACH(type, expression)                         \
    type result;                                              \
    for (int i = 0; i < LANES; ++i) result.v[i] = expression; \
    return result

inline F zero() { return F{}; }
inline F splat(float x) { NIBBLE_EACH(F, x); }
inline F load(const float* p) { NIBBLE_EACH(F, p[i]); }
inline void store(float* p, F x) {
    for (int i = 0; i < LANES; ++i) p[i] = x.v[i];
}
inline F add(F a, F b) { NIBBLE_EACH(F, a.v[i] + b.v[i]); }
inline F sub(F a, F b) { NIBBLE_EACH(F, a.v[i] - b.v[i]); }
inline F mul(F a, F b) { NIBBLE_EACH(F, a.v[i] * b.v[i]); }
inline F div(F a, F b) { NIBBLE_EACH(F, a.v[i] / b.v[i]); }
inline F fma(F a, F b, F c) { NIBBLE_EACH(F, a.v[i] * b.v[i] + c.v[i]); }
// Where one of the two operands is NaN, the second comes out.
inline F maximum(F a, F b) { NIBBLE_EACH(F, a.v[i] > b.v[i] ? a.v[i] : b.v[i]); }
inline F minimum(F a, F b) { NIBBLE_EACH(F, a.v[i] < b.v[i] ? a.v[i] : b.v[i]); }

inline int32_t as_int(float x) {
    int32_t b;
    std::memcpy(&b, &x, 4);
    return b;
}
inline float as_float(int32_t b) {
    float x;
    std::memcpy(&x, &b, 4);
    return x;
}
inline int32_t shifted(uint32_t x) { return static_cast<int32_t>(x); }

inline I splat_int(int x) { NIBBLE_EACH(I, x); }
inline I bits(F x) { NIBBLE_EACH(I, as_int(x.v[i])); }
inline F from_bits(I x) { NIBBLE_EACH(F, as_float(x.v[i])); }
inline I and_(I a, I b) { NIBBLE_EACH(I, a.v[i] & b.v[i]); }
inline I or_(I a, I b) { NIBBLE_EACH(I, a.v[i] | b.v[i]); }
inline I xor_(I a, I b) { NIBBLE_EACH(I, a.v[i] ^ b.v[i]); }
inline I andnot(I not_a, I b) { NIBBLE_EACH(I, ~not_a.v[i] & b.v[i]); }
inline I add_int(I a, I b) {
    NIBBLE_EACH(I, shifted(static_cast<uint32_t>(a.v[i]) + static_cast<uint32_t>(b.v[i])));
}
inline I sub_int(I a, I b) {
    NIBBLE_EACH(I, shifted(static_cast<uint32_t>(a.v[i]) - static_cast<uint32_t>(b.v[i])));
}
inline I max_int(I a, I b) { NIBBLE_EACH(I, a.v[i] > b.v[i] ? a.v[i] : b.v[i]); }
inline I min_int(I a, I b) { NIBBLE_EACH(I, a.v[i] < b.v[i] ? a.v[i] : b.v[i]); }
template <int N>
I shift_left(I x) {
    NIBBLE_EACH(I, shifted(static_cast<uint32_t>(x.v[i]) << N));
}
template <int N>
I shift_right(I x) {
    NIBBLE_EACH(I, shifted(static_cast<uint32_t>(x.v[i]) >> N));
}
template <int N>
I shift_right_signed(I x) {
    NIBBLE_EACH(I, x.v[i] >> N);
}
inline void store_int(void* p, I x) { std::memcpy(p, x.v, sizeof x.v); }
inline I load_int(const void* p) {
    I x;
    std::memcpy(x.v, p, sizeof x.v);
    return x;
}
// LANES signed bytes.
inline I widen_bytes(const int8_t* p) { NIBBLE_EACH(I, p[i]); }
inline F to_float(I x) { NIBBLE_EACH(F, static_cast<float>(x.v[i])); }

// Half to even for |x| < 2^22, and 0 for NaN: adding 1.5 * 2^23 leaves no bits for a fraction.
inline I round_to_int(F x) {
    NIBBLE_EACH(I, x.v[i] == x.v[i] ? as_int(x.v[i] + 12582912.0f) - as_int(12582912.0f) : 0);
}

inline int largest(I x) {
    int m = x.v[0];
    for (int i = 1; i < LANES; ++i) m = x.v[i] > m ? x.v[i] : m;
    return m;
}

inline float total(F x) { return x.v[0] + x.v[2] + (x.v[1] + x.v[3]); }

inline float half_to_float(uint16_t h) {
    const uint32_t sign = static_cast<uint32_t>(h & 0x8000) << 16, rest = h & 0x7FFF;
    if (rest >= 0x7C00) return as_float(shifted(sign | 0x7F800000u | rest << 13));
    // Denormals too: the exponent's bias is corrected by a product, which is exact.
    const float magnitude = as_float(shifted(rest << 13)) * 5.192296858534828e33f;  // 2^112
    return as_float(as_int(magnitude) | shifted(sign));
}

inline uint16_t float_to_half(float x) {
    const uint32_t b = static_cast<uint32_t>(as_int(x)), rest = b & 0x7FFFFFFF;
    const uint32_t sign = b >> 16 & 0x8000;
    if (rest > 0x7F800000) return static_cast<uint16_t>(sign | 0x7E00);
    if (rest >= 0x477FF000)
        return static_cast<uint16_t>(sign | 0x7C00);  // 65520 and more round to infinity
    if (rest < 0x38800000) {  // below 2^-14: half a unit of the last place is 2^-25, which adding
                              // 0.5 shifts to float's last bit
        return static_cast<uint16_t>(
            sign | (static_cast<uint32_t>(as_int(as_float(shifted(rest)) + 0.5f)) - 0x3F000000u));
    }
    return static_cast<uint16_t>(sign | (((rest + 0xFFF + (rest >> 13 & 1)) >> 13) - 0x1C000));
}

inline F load_half(const uint16_t* p) { NIBBLE_EACH(F, half_to_float(p[i])); }
inline F load_bf16(const uint16_t* p) {
    NIBBLE_EACH(F, as_float(shifted(static_cast<uint32_t>(p[i]) << 16)));
}
inline void store_half(uint16_t* p, F x) {
    for (int i = 0; i < LANES; ++i) p[i] = float_to_half(x.v[i]);
}
inline void store_u16(uint16_t* p, I x) {
    for (int i = 0; i < LANES; ++i) p[i] = static_cast<uint16_t>(x.v[i]);
}

// Four bytes, the first one lowest.
inline int32_t dword(const uint8_t* b) {
    const uint32_t low = b[0] | static_cast<uint32_t>(b[1]) << 8,
                   high = b[2] | static_cast<uint32_t>(b[3]) << 8;
    return shifted(low | high << 16);
}

// The 32 bytes (one group of 64 codes) of LANES rows: words[d] holds the 4 bytes at 4 d of every
// row, row by row, first byte lowest. `rows` are `stride` bytes apart; only the first `valid`
// exist, and the last of them stands in for the others.
inline void load_words(const uint8_t* rows, int64_t stride, int valid, I words[8]) {
    for (int r = 0; r < LANES; ++r) {
        const uint8_t* row = rows + (r < valid ? r : valid - 1) * stride;
        for (int d = 0; d < 8; ++d) words[d].v[r] = dword(row + 4 * d);
    }
}

// Weights at columns k .. k + LANES of a row of codewords of D columns; codes are places in the
// codebook.
template <int D>
F codewords(const float* codebook, const uint16_t* codes, int64_t k) {
    F result;
    for (int i = 0; i < LANES; ++i) result.v[i] = codebook[codes[(k + i) / D] + (k + i) % D];
    return result;
}

inline void prefetch(const void*) {}

// Eight numbers of 16 - down bits out of eight bytes, shifted left by `up`: each is in the two
// bytes named by `places`, and its factor moves it to the top of 16 bits.
inline void spread_8(const uint8_t* bytes, const uint8_t places[16], const uint16_t factors[8],
                     int down, int up, uint16_t* numbers) {
    for (int i = 0; i < 8; ++i) {
        const uint32_t low = bytes[places[2 * i]],
                       high = places[2 * i + 1] & 0x80 ? 0 : bytes[places[2 * i + 1]];
        numbers[i] = static_cast<uint16_t>(((low | high << 8) * factors[i] & 0xFFFF) >> down << up);
    }
}

// out[c][r] = in[r][c]
inline void transpose_8x8(const float* in, int64_t in_stride, float* out, int64_t out_stride) {
    for (int r = 0; r < 8; ++r)
        for (int c = 0; c < 8; ++c) out[c * out_stride + r] = in[r * in_stride + c];
}

inline void pack_group(const I codes[16], uint8_t* q) {
    for (int i = 0; i < 16; ++i) {
        q[2 * i] = static_cast<uint8_t>((codes[i].v[0] & 15) | (codes[i].v[1] & 15) << 4);
        q[2 * i + 1] = static_cast<uint8_t>((codes[i].v[2] & 15) | (codes[i].v[3] & 15) << 4);
    }
}

// 64 codes, in order, a byte each.
inline void store_bytes(const I codes[16], uint8_t* q) {
    for (int i = 0; i < GROUP; ++i)
        q[i] = static_cast<uint8_t>(codes[i / LANES].v[i % LANES] & 0xFF);
}

// Butterflies between lanes: (a, b) -> (a + b, a - b) for lanes that differ in one bit of their
// number.
inline F butterflies(F x) {
    const float a = x.v[0] + x.v[1], b = x.v[0] - x.v[1], c = x.v[2] + x.v[3], d = x.v[2] - x.v[3];
    return F{{a + c, b + d, a - c, b - d}};
}

#undef NIBBLE_EACH

// ---- 4-bit weights of a few tokens (w4a16.inl) --------------------------------------------------

#include "few_codes.inl"

// A row's next dwords; here two vectors are a group.
inline I load_dwords(const uint8_t* p) {
    I words;
    for (int i = 0; i < LANES; ++i) words.v[i] = dword(p + 4 * i);
    return words;
}
inline I load_last_dwords(const uint8_t* p) { return load_dwords(p); }
inline F scales_of_vector(const float* scales, int64_t stride, int64_t vector) {
    return splat(scales[vector / 2 * stride]);
}

// ---- the int4 product's inner loop --------------------------------------------------------------

// Tiles of 32 outputs of a task, side by side.
constexpr int MOST_TILES = 1;

constexpr int ROWS = 4;
constexpr int FMA_ROWS = 4;

// Starting values of the sums that make up for weights stored as code + 8.
inline I offset(I first, I second) {
    return sub_int(splat_int(0), shift_left<3>(add_int(first, second)));
}
