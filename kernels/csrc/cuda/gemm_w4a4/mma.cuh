// The three ways to multiply packed int4 fragments. All read the same registers, because a 16x8
// tile's k = 64 group has one layout: the four registers of A are (row g | row g + 8) x (k 8t.. | k
// 32 + 8t..), the two of B (column g) x (k 8t.. | k 32 + 8t..).
//
//   Int4     8.0 8.6 8.9    one m16n8k64, a whole group
//   Turing   7.5            four m8n8k32: each is a quarter of the registers above; no asynchronous
//   copies, no bfloat16 Int8     9.0 and later  the matrix units have no int4. Bytes 16 * code are
//   one shift or mask away: even columns (w << 4), odd columns
//                           w, under 0xF0F0F0F0. That permutes k, but A and B alike, so two
//                           m16n8k32 give 16 * 16 * sum.
//
// product: d = c + UNIT * (A . B) over the group. AT_ONCE: products that share a fragment of A
// while registers hold what is theirs of B.
#pragma once

#include "../primitives.cuh"

namespace nibble::cuda {

struct Int4 {
    static constexpr bool ASYNC = true, BFLOAT16 = true;
    static constexpr int UNIT = 1, AT_ONCE = 4;
    template <bool Unsigned>
    NIBBLE_DEVICE static void product(int (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                                      const int (&c)[4]) {
        mma_s4_k64<Unsigned>(d, a, b, c);
    }
};

struct Turing {
    static constexpr bool ASYNC = false, BFLOAT16 = false;
    static constexpr int UNIT = 1, AT_ONCE = 4;
    template <bool Unsigned>
    NIBBLE_DEVICE static void product(int (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                                      const int (&c)[4]) {
        mma_s4_k32<Unsigned>(d[0], d[1], a[0], b[0], c[0], c[1]);
        mma_s4_k32<Unsigned>(d[2], d[3], a[1], b[0], c[2], c[3]);
        mma_s4_k32<Unsigned>(d[0], d[1], a[2], b[1], d[0], d[1]);
        mma_s4_k32<Unsigned>(d[2], d[3], a[3], b[1], d[2], d[3]);
    }
};

struct Int8 {
    static constexpr bool ASYNC = true, BFLOAT16 = true;
    static constexpr int UNIT = 256, AT_ONCE = 2;
    template <bool Unsigned>
    NIBBLE_DEVICE static void product(int (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                                      const int (&c)[4]) {
        // The compiler widens a fragment once, although every product of it asks.
        const uint32_t even_a[4] = {even(a[0]), even(a[1]), even(a[2]), even(a[3])},
                       even_b[2] = {even(b[0]), even(b[1])};
        const uint32_t odd_a[4] = {odd(a[0]), odd(a[1]), odd(a[2]), odd(a[3])},
                       odd_b[2] = {odd(b[0]), odd(b[1])};
        mma_s8_k32<Unsigned>(d, even_a, even_b, c);
        mma_s8_k32<Unsigned>(d, odd_a, odd_b, d);
    }

private:
    NIBBLE_DEVICE static uint32_t even(uint32_t w) { return (w << 4) & 0xF0F0F0F0; }
    NIBBLE_DEVICE static uint32_t odd(uint32_t w) { return w & 0xF0F0F0F0; }
};

}  // namespace nibble::cuda
