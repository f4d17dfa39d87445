// kernels/csrc/cuda/primitives_sm120.cuh in plain C++, by tables of values: what a number is, and
// which of all of them is nearest. See emulator.h.
#pragma once

#include "emulated_primitives.h"

namespace emulated {

// e2m1: bit 3 the sign, exponent bias 1, an exponent of 0 for 0 and 0.5.
inline double e2m1(int code) {
    const int exponent = code >> 1 & 3, fraction = code & 1;
    const double size = exponent ? ldexp(1 + fraction / 2.0, exponent - 1) : fraction / 2.0;
    return code & 8 ? -size : size;
}

// ue4m3: exponent bias 7, an exponent of 0 for multiples of 2^-9; no infinities, 0x7F is NaN.
inline double ue4m3(int byte) {
    const int exponent = byte >> 3 & 15, fraction = byte & 7;
    if ((byte & 0x7F) == 0x7F) return NAN;
    return exponent ? ldexp(1 + fraction / 8.0, exponent - 7) : ldexp(fraction, -9);
}

// The code of the number nearest to `size` >= 0 among the first `count`, the even code on a tie.
template <class Number>
int nearest(double size, int count, Number number) {
    int best = 0;
    for (int code = 1; code < count; code++) {
        const double closer = fabs(number(code) - size), known = fabs(number(best) - size);
        if (closer < known || (closer == known && code % 2 == 0)) best = code;
    }
    return best;
}

}  // namespace emulated

namespace nibble {

inline uint32_t pack8_e2m1(const float* x) {
    uint32_t word = 0;
    for (int i = 0; i < 8; i++) {
        const double size = x[i] != x[i] ? 6.0 : fmin(fabs(double(x[i])), 6.0);
        const bool negative = std::signbit(x[i]) && x[i] == x[i];
        word |= uint32_t(emulated::nearest(size, 8, emulated::e2m1) | (negative ? 8 : 0))
                << (4 * i);
    }
    return word;
}

inline uint32_t round_to_e4m3(float x) {
    if (x != x) return 0x7F;
    const double size = fmin(fabs(double(x)), 448.0);
    return uint32_t(emulated::nearest(size, 0x7F, emulated::ue4m3)) | (std::signbit(x) ? 0x80 : 0);
}

// As the manual's tables of fragments say: A's lane 4g + t holds rows g and g + 8, k 8t.. and
// 32 + 8t..; B's column g, the same k; C's rows g and g + 8, columns 2t, 2t + 1.
template <int PAIR, int LANE>
void mma_nvfp4(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], uint32_t scales_a,
               uint32_t scales_b) {
    static_assert(PAIR >= 0 && PAIR < 2 && LANE >= 0 && LANE < 4);
    struct Lane {
        float* d;
        const uint32_t *a, *b;
        uint32_t scales_a, scales_b;
        int pair, lane;
    } mine{d, a, b, scales_a, scales_b, PAIR, LANE};
    emulator::together("mma.mxf4nvf4", mine, [](Lane** lanes) {
        double left[16][64], right[8][64];
        for (int i = 0; i < 32; i++) {
            if (lanes[i]->pair != lanes[0]->pair || lanes[i]->lane != lanes[0]->lane)
                emulator::fail("lanes disagree about who gives the scales");
        }
        for (int k = 0; k < 64; k++) {
            const int half = k / 32, t = k % 32 / 8, nibble = k % 8, block = k / 16;
            const auto scaled = [&](uint32_t codes, uint32_t scales) {
                return emulated::e2m1(codes >> (4 * nibble) & 15) *
                       emulated::ue4m3(scales >> (8 * block) & 0x7F);
            };
            for (int row = 0; row < 16; row++) {
                const int quad = 4 * (row % 8), from = quad + 2 * lanes[0]->pair + row / 8;
                left[row][k] =
                    scaled(lanes[quad + t]->a[row / 8 + 2 * half], lanes[from]->scales_a);
            }
            for (int n = 0; n < 8; n++)
                right[n][k] =
                    scaled(lanes[4 * n + t]->b[half], lanes[4 * n + lanes[0]->lane]->scales_b);
        }
        for (int i = 0; i < 32; i++)
            for (int e = 0; e < 4; e++) {
                const int row = i / 4 + 8 * (e / 2), column = i % 4 * 2 + e % 2;
                double sum = lanes[i]->d[e];
                for (int k = 0; k < 64; k++) sum += left[row][k] * right[column][k];
                lanes[i]->d[e] = float(sum);
            }
    });
}

}  // namespace nibble
