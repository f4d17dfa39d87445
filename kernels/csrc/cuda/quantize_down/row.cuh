// One row of one group of 64: smoothing, rotation, scale and codes, by the four lanes that share a
// row.
//
// Lane t of the four holds columns 8c..8c+7 for c = t and c = t + 4, as two 16-byte loads brought
// them: value j of chunk i is column 8 (t + 4i) + j. A matrix product may sum over k in any order,
// so the same registers are fragments of x . proj_down without a move.
//
// Divisions are those of the reference to the last bit, at 2 and 4 instructions instead of ten:
//   x / smooth     x . hi + x . lo with hi + lo = 1 / smooth to 46 bits. smooth has at most 11
//   significant bits, so a quotient lies at
//                  least 2^-12 ulp from the middle between two floats, and an error of 2^-22 ulp
//                  cannot change how it is rounded.
//   v / scale      the same first, which is off by at most 1/2 + 2^-21 ulp; then the remainder,
//   which is exact, corrects it: with
//                  scale = m 2^e and 1 <= m < 2 the error left is m 2^-26 ulp, and a quotient lies
//                  at least 2^-24 / m from a middle.
// That holds where nothing over- or underflows: the largest value of the group 0 or within
// 2^-64..2^64 and smooth within 2^-40..2^40. (Smaller values beside such a one get code 0 either
// way.) Other groups, and those with a NaN, are done again, `careful`ly.
#pragma once

#include "../../nibble.h"
#include "../primitives.cuh"

namespace nibble::cuda {

enum class Form { signed_codes, unsigned_codes, rotated };

// Codes of 8 bits hold both signs: of an unsigned form they keep the shift alone.
template <Form FORM, Codes FORMAT>
constexpr bool UNSIGNED = FORM == Form::unsigned_codes && FORMAT != Codes::int8;
template <Form FORM, Codes FORMAT>
constexpr float STEPS = FORMAT == Codes::int8    ? 127.0f
                        : UNSIGNED<FORM, FORMAT> ? 15.0f
                                                 : 7.0f;

constexpr float SMALLEST_NORMAL = 0x1p-126f;

// Eight neighbours of a row.
template <class X>
struct Chunk {
    uint32_t words[2 * sizeof(X)];
};

template <class X>
NIBBLE_DEVICE void load(Chunk<X>& chunk, const X* from) {
#pragma unroll
    for (int i = 0; i < int(sizeof(X)) / 2; i++) {
        const uint4 four = reinterpret_cast<const uint4*>(from)[i];
        chunk.words[4 * i] = four.x, chunk.words[4 * i + 1] = four.y,
                        chunk.words[4 * i + 2] = four.z, chunk.words[4 * i + 3] = four.w;
    }
}

// Both chunks of a lane, the second 32 columns after the first.
template <class X>
NIBBLE_DEVICE void load_row(Chunk<X> (&x)[2], const char* from) {
#pragma unroll
    for (int i = 0; i < 2; i++) load(x[i], reinterpret_cast<const X*>(from) + 32 * i);
}

template <class X>
NIBBLE_DEVICE float value(const Chunk<X>& chunk, int j) {
    if constexpr (sizeof(X) == 4)
        return as_float(int(chunk.words[j]));
    else
        return j % 2 ? high_half<X>(chunk.words[j / 2]) : low_half<X>(chunk.words[j / 2]);
}

// 1 / smooth in two floats, made once for a column by one lane and read by the warp. A smooth
// factor beyond the fast path's range becomes NaN, which then sends every group that meets it to
// the careful one. The rotation's division by 8 is a power of two and rides along.
struct Reciprocals {
    static constexpr int CHUNK_BYTES =
        80;  // 8 columns of (hi, lo), and 16 bytes so that four lanes read from different banks
    static constexpr int BYTES = 8 * CHUNK_BYTES;

    template <Form FORM>
    NIBBLE_DEVICE static float2 of(float smooth) {
        const float magnitude = fabsf(smooth), factor = FORM == Form::rotated ? 0.125f : 1.0f;
        const float hi = magnitude >= 0x1p-40f && magnitude <= 0x1p40f ? reciprocal_estimate(smooth)
                                                                       : as_float(0x7FC00000);
        return {hi * factor, fmaf(-hi, smooth, 1.0f) * hi * factor};
    }

    // Lane l keeps columns 2l and 2l + 1 of the group, given as a pair of parameters.
    template <class P, Form FORM>
    NIBBLE_DEVICE static void keep(char* shared, uint32_t pair, int lane) {
        const float2 even = of<FORM>(low_half<P>(pair)), odd = of<FORM>(high_half<P>(pair));
        *reinterpret_cast<float4*>(shared + lane / 4 * CHUNK_BYTES + lane % 4 * 16) = {
            even.x, even.y, odd.x, odd.y};
    }
};

// 64-point Hadamard butterflies over the column's six bits: 0-2 are j, 3-4 the lane, 5 the chunk.
NIBBLE_DEVICE void butterflies(float (&v)[16], int t) {
#pragma unroll
    for (int step = 1; step < 16; step *= 2)
#pragma unroll
        for (int j = 0; j < 16; j++)
            if (!(j & step)) {
                const float sum = v[j] + v[j + step], difference = v[j] - v[j + step];
                v[j] = sum, v[j + step] = difference;
            }
#pragma unroll
    for (int step = 1; step < 4; step *= 2) {
        const float sign = t & step ? -1.0f : 1.0f;
#pragma unroll
        for (int j = 0; j < 16; j++) v[j] = fmaf(sign, v[j], shuffle_xor(v[j], step));
    }
}

// The largest magnitude of the group (OF_VALUES: the largest value, at least 0); NaN where the
// group holds one.
template <bool OF_VALUES>
NIBBLE_DEVICE float largest(const float (&v)[16]) {
    float top = OF_VALUES ? 0.0f : fabsf(v[0]);
#pragma unroll
    for (int j = OF_VALUES ? 0 : 1; j < 16; j++)
        top = max_or_nan(top, OF_VALUES ? v[j] : fabsf(v[j]));
    top = max_or_nan(top, shuffle_xor(top, 1));
    return max_or_nan(top, shuffle_xor(top, 2));
}

template <Form FORM>
NIBBLE_DEVICE float shifted(float x) {
    return FORM == Form::unsigned_codes ? x + SHIFT : x;
}

// v / scale rounded as a division rounds it, for a group within the fast path's range.
template <Form FORM, Codes FORMAT>
NIBBLE_DEVICE float quick(float (&v)[16], float top) {
    constexpr float PER_STEP = 1.0f / STEPS<FORM, FORMAT>;
    float scale = top * PER_STEP;
    scale = fmaf(fmaf(-scale, STEPS<FORM, FORMAT>, top), PER_STEP, scale);
    const float hi = 1.0f / scale, lo = fmaf(-hi, scale, 1.0f) * hi;
#pragma unroll
    for (int j = 0; j < 16; j++) {
        const float near = fmaf(v[j], hi, v[j] * lo);
        v[j] = fmaf(fmaf(-near, scale, v[j]), hi, near);
    }
    return scale;
}

// Adding 1.5 * 2^23 rounds half to even and leaves the integer in the lowest bits.
constexpr float ROUNDER = 12582912.0f;

// Eight quotients -> eight nibbles. Signed codes are kept as 8 + code while they are added up, so
// that none borrows from its neighbour.
template <Form FORM>
NIBBLE_DEVICE uint32_t packed(const float* quotients) {
    constexpr bool POSITIVE = FORM == Form::unsigned_codes;
    constexpr uint32_t EXPONENTS = 0x4B400000u * 0x11111111u;  // of the rounder, once a nibble
    uint32_t word = 0;
#pragma unroll
    for (int j = 7; j >= 0; j--)
        word = (word << 4) + uint32_t(as_int((POSITIVE ? fmaxf(quotients[j], 0.0f) : quotients[j]) +
                                             (ROUNDER + (POSITIVE ? 0.0f : 8.0f))));
    return POSITIVE ? word - EXPONENTS : (word - EXPONENTS) ^ 0x88888888u;
}

template <Form FORM>
NIBBLE_DEVICE uint32_t four_e4m3(const float* quotients) {
    float code[4];
#pragma unroll
    for (int j = 0; j < 4; j++)
        code[j] =
            ((FORM == Form::unsigned_codes ? fmaxf(quotients[j], 0.0f) : quotients[j]) + ROUNDER) -
            ROUNDER;
    return pack2_e4m3(code[0], code[1]) | pack2_e4m3(code[2], code[3]) << 16;
}

NIBBLE_DEVICE uint32_t four_int8(const float* quotients) {
    uint32_t code[4];
#pragma unroll
    for (int j = 0; j < 4; j++) code[j] = uint32_t(as_int(quotients[j] + ROUNDER));
    return pick_bytes(pick_bytes(code[0], code[1], 0x0040), pick_bytes(code[2], code[3], 0x0040),
                      0x5410);
}

// A lane's codes of one row: packed, the words of its two chunks; of bytes, two words each.
struct CodeWords {
    uint32_t words[2][2];
};

template <Form FORM, Codes FORMAT>
NIBBLE_DEVICE void encode(CodeWords& codes, const float (&quotients)[16]) {
#pragma unroll
    for (int i = 0; i < 2; i++) {
        if constexpr (FORMAT == Codes::packed)
            codes.words[i][0] = packed<FORM>(quotients + 8 * i);
        else
#pragma unroll
            for (int half = 0; half < 2; half++) {
                const float* four = quotients + 8 * i + 4 * half;
                if constexpr (FORMAT == Codes::int8)
                    codes.words[i][half] = four_int8(four);
                else
                    codes.words[i][half] = four_e4m3<FORM>(four);
            }
    }
}

// One value before its scale, by a real division, from memory.
template <class X, class P, Form FORM>
NIBBLE_DEVICE float value_before_scale(const X* x, const P* smooth, int column) {
    if constexpr (FORM != Form::rotated)
        return shifted<FORM>(to_float(x[column])) / to_float(smooth[column]);
    float sum = 0;
#pragma unroll 1
    for (int k = 0; k < GROUP; k++) {
        int bits = k & column;
        bits ^= bits >> 4, bits ^= bits >> 2, bits ^= bits >> 1;
        const float term = to_float(x[k]) / to_float(smooth[k]) * 0.125f;
        sum += bits & 1 ? -term : term;
    }
    return sum;
}

// The rows whose `bad` is set again, with real divisions and the reference's treatment of NaN and
// infinities. Rare, so it is written to need little code and few registers: values are computed
// twice, one after another.
template <class X, class P, Form FORM, Codes FORMAT>
NIBBLE_DEVICE void careful(CodeWords& codes, float& scale, bool bad, const X* x, const P* smooth,
                           int t) {
    constexpr bool POSITIVE = UNSIGNED<FORM, FORMAT>;
    float top = 0;
    if (bad) {
#pragma unroll 1
        for (int j = 0; j < 16; j++) {
            const float v = value_before_scale<X, P, FORM>(x, smooth, 8 * t + j % 8 + j / 8 * 32);
            top = max_or_nan(top, POSITIVE ? v : fabsf(v));
        }
    }
    top = max_or_nan(top, shuffle_xor(top, 1));
    top = max_or_nan(top, shuffle_xor(top, 2));
    if (!bad) return;
    scale = top / STEPS<FORM, FORMAT>;
    const float divisor = max_or_nan(scale, SMALLEST_NORMAL);
#pragma unroll
    for (int i = 0; i < 2; i++) {
        uint64_t chunk = 0;
#pragma unroll 1
        for (int j = 0; j < 8; j++) {
            float v = value_before_scale<X, P, FORM>(x, smooth, 8 * t + j + i * 32) / divisor;
            if (v != v) v = 0.0f;
            if (POSITIVE) v = fmaxf(v, 0.0f);
            const float rounded = v + ROUNDER;
            if constexpr (FORMAT == Codes::packed)
                chunk = chunk >> 4 | uint64_t(as_int(rounded) & 15) << 28;
            else if constexpr (FORMAT == Codes::int8)
                chunk = chunk >> 8 | uint64_t(as_int(rounded) & 255) << 56;
            else
                chunk = chunk >> 8 | uint64_t(pack2_e4m3(rounded - ROUNDER, 0.0f)) << 56;
        }
        codes.words[i][0] = uint32_t(chunk), codes.words[i][1] = uint32_t(chunk >> 32);
    }
}

// Writes a row's 32 bytes, of which lane t has the words t and t + 4. A sector is written at once:
// two exchanges give it 2t and 2t + 1, which belong at `to`.
NIBBLE_DEVICE void store_sector(char* to, uint32_t low, uint32_t high, bool in_range, int t) {
    const uint32_t other = shuffle_xor(t & 2 ? low : high, 2);
    if (t & 2)
        low = other;
    else
        high = other;  // lane 0: words 0, 2 · 1: 1, 3 · 2: 4, 6 · 3: 5, 7
    const uint32_t neighbour = shuffle_xor(t & 1 ? low : high, 1);
    if (t & 1)
        low = neighbour;
    else
        high = neighbour;
    if (in_range) *reinterpret_cast<uint2*>(to) = {low, high};
}

// A row's codes of one group. Bytes for Hopper's product have an order of their own within 32
// columns, the one in which it reads a weight's nibbles without moving them: of every 8 columns the
// first four lie in the lower 16 bytes, the last four in the upper. Whole numbers of 8 bits lie in
// the order of the columns, and four lanes' eight bytes are a sector.
template <Codes FORMAT>
NIBBLE_DEVICE void store(char* to, const CodeWords& codes, bool in_range, int t) {
    if constexpr (FORMAT == Codes::packed) {
        store_sector(to, codes.words[0][0], codes.words[1][0], in_range, t);
    } else if constexpr (FORMAT == Codes::int8) {
#pragma unroll
        for (int i = 0; i < 2; i++)
            if (in_range)
                *reinterpret_cast<uint2*>(to + 32 * i) = {codes.words[i][0], codes.words[i][1]};
    } else {
#pragma unroll
        for (int i = 0; i < 2; i++)
            store_sector(to + 32 * i, codes.words[i][0], codes.words[i][1], in_range, t);
    }
}

// A row before its scale. x: the lane's part of it. `reciprocals`: its first chunk's.
template <class X, Form FORM>
NIBBLE_DEVICE void smoothed_row(float (&v)[16], const Chunk<X> (&x)[2], const char* reciprocals,
                                int t) {
#pragma unroll
    for (int j = 0; j < 16; j += 2) {
        const float4 two = *reinterpret_cast<const float4*>(
            reciprocals + j / 8 * 4 * Reciprocals::CHUNK_BYTES + j % 8 * 8);
        const float even = shifted<FORM>(value(x[j / 8], j % 8)),
                    odd = shifted<FORM>(value(x[j / 8], j % 8 + 1));
        v[j] = fmaf(even, two.x, even * two.y);
        v[j + 1] = fmaf(odd, two.z, odd * two.w);
    }
    if constexpr (FORM == Form::rotated) butterflies(v, t);
}

// x: the lane's part of the row. `reciprocals`: its first chunk's. `x_lane`: x in memory. `smooth`:
// the group's factors. Returns the scale.
template <class X, class P, Form FORM, Codes FORMAT>
NIBBLE_DEVICE float quantize_row(const Chunk<X> (&x)[2], const char* reciprocals,
                                 const char* x_lane, const P* smooth, char* to, bool in_range,
                                 int t) {
    float v[16];
    smoothed_row<X, FORM>(v, x, reciprocals, t);
    const float top = largest<UNSIGNED<FORM, FORMAT>>(v);
    const bool zero = top == 0.0f, bad = in_range && !zero && !(top >= 0x1p-64f && top <= 0x1p64f);
    float scale = quick<FORM, FORMAT>(v, zero ? 1.0f : top);
    if (zero) scale = 0.0f;
    CodeWords codes;
    encode<FORM, FORMAT>(codes, v);
    // The warp goes together, because lanes exchange values.
    if (any_in_warp(bad))
        careful<X, P, FORM, FORMAT>(codes, scale, bad, reinterpret_cast<const X*>(x_lane) - 8 * t,
                                    smooth, t);
    store<FORMAT>(to, codes, in_range, t);
    return scale;
}

}  // namespace nibble::cuda
