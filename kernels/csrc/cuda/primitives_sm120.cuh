// The vocabulary of 4-bit floats: what GPUs of compute capability 12.0 and 12.1 speak besides
// primitives.cuh. Other GPUs compile it to nothing and are never asked to run it.
//
//   e2m1   a sign, two digits of exponent and one of fraction: 0 .5 1 1.5 2 3 4 6
//   ue4m3  a scale of 16 of them along k: an 8-bit float (e4m3) whose sign is not read
//
// Fragments of the product (PTX ISA, mma with .kind::mxf4nvf4, .scale_vec::4X) are those of 4-bit
// integers: see primitives.cuh. Scales come in one register for the 64 of k, byte b for k 16b..:
//   A   two lanes of every quad give rows g and g + 8: t = 0, 1 or, as the instruction says, 2, 3
//   B   one lane of every quad gives column g: t = 0, 1, 2 or 3, as the instruction says
#pragma once

#include "primitives.cuh"

#ifdef NIBBLE_EMULATE
#include "emulated_primitives_sm120.h"  // from tests/kernels/emulator
#else

namespace nibble {

// Eight numbers as nibbles, the first in the lowest: to nearest, ties to even, 6 at most; NaN is 6.
NIBBLE_DEVICE uint32_t pack8_e2m1(const float* x) {
    uint32_t y = 0;
#if __CUDA_ARCH__ >= 1200
    asm("{ .reg .b8 b0, b1, b2, b3;\n"
        "cvt.rn.satfinite.e2m1x2.f32 b0, %2, %1;\n"
        "cvt.rn.satfinite.e2m1x2.f32 b1, %4, %3;\n"
        "cvt.rn.satfinite.e2m1x2.f32 b2, %6, %5;\n"
        "cvt.rn.satfinite.e2m1x2.f32 b3, %8, %7;\n"
        "mov.b32 %0, {b0, b1, b2, b3}; }"
        : "=r"(y)
        : "f"(x[0]), "f"(x[1]), "f"(x[2]), "f"(x[3]), "f"(x[4]), "f"(x[5]), "f"(x[6]), "f"(x[7]));
#endif
    return y;
}

// A number as e4m3: to nearest, ties to even, 448 at most; NaN is 0x7F.
NIBBLE_DEVICE uint32_t round_to_e4m3(float x) {
    uint16_t pair = 0;
#if __CUDA_ARCH__ >= 1200
    asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(pair) : "f"(0.f), "f"(x));
#endif
    return pair;
}

// d += A . B, k = 64. Lanes 2 PAIR and 2 PAIR + 1 of each quad give A's scales, lane LANE B's.
template <int PAIR, int LANE>
NIBBLE_DEVICE void mma_nvfp4(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                             uint32_t scales_a, uint32_t scales_b) {
#if __CUDA_ARCH__ >= 1200
    asm("mma.sync.aligned.m16n8k64.row.col.kind::mxf4nvf4.block_scale.scale_vec::4X"
        ".f32.e2m1.e2m1.f32.ue4m3 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3},"
        " {%10}, {%12,%13}, {%11}, {%12,%14};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "r"(scales_a),
          "r"(scales_b), "n"(0), "h"(uint16_t(PAIR)), "h"(uint16_t(LANE)));
#endif
}

}  // namespace nibble
#endif
