// The three ways to multiply packed int4 fragments. These read the same registers, because a 16x8
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
// And two for activations of 8 bits, which a row of A has twice the bytes of: the weight's codes
// are widened as in Int8, and a lane's eight columns 8t.. and 32 + 8t.. are parted into even and
// odd ones, a byte permutation a register, where Int8 has a mask and a shift.
//   Act8         8.0 and later     two m16n8k32; codes of A are whole numbers, so 16 * sum
//   TuringAct8   7.5               each m16n8k32 as four m8n8k16
//
// product: d = c + UNIT * (A . B) over the group. AT_ONCE: products that share a fragment of A
// while registers hold what is theirs of B. ROW_BYTES: of one row of A in a group, and FRAGMENT the
// registers of 16 rows; `load` reads them.
#pragma once

#include "../primitives.cuh"

namespace nibble::cuda {

// Where a row's 16-byte chunk lies in a group's operand of 32-byte rows. ldmatrix reads one chunk
// of eight neighbouring rows at once; with every second four rows' chunks exchanged these lie in
// the eight different 16-byte columns of the banks.
struct PackedRows {
    static constexpr int ROW_BYTES = 32, FRAGMENT = 4;
    NIBBLE_DEVICE static int offset(int place, int chunk) {
        return place * 32 + ((chunk ^ (place >> 2 & 1)) << 4);
    }
    NIBBLE_DEVICE static void load(uint32_t (&a)[4], const uint8_t* rows, int lane) {
        load_matrix_x4(a, rows + offset(lane % 16, lane / 16));
    }
};

// Rows of 64 bytes. A lane reads eight neighbours of rows g and g + 8, of either half; with every
// second two rows' halves exchanged, four rows' 32 bytes lie in different banks.
struct WideRows {
    static constexpr int ROW_BYTES = 64, FRAGMENT = 8;
    NIBBLE_DEVICE static int offset(int place, int chunk) {
        return place * 64 + ((chunk ^ (place & 2)) << 4);
    }
    // Registers 0..3 are the fragment of the even columns, 4..7 that of the odd ones.
    NIBBLE_DEVICE static void load(uint32_t (&a)[8], const uint8_t* rows, int lane) {
        const int g = lane / 4, t = lane % 4;
#pragma unroll
        for (int part = 0; part < 4; part++) {
            const int chunk = part / 2 * 2 + t / 2;
            const uint2 eight =
                *reinterpret_cast<const uint2*>(rows + offset(g + part % 2 * 8, chunk) + t % 2 * 8);
            a[part] = pick_bytes(eight.x, eight.y, 0x6420);
            a[part + 4] = pick_bytes(eight.x, eight.y, 0x7531);
        }
    }
};

NIBBLE_DEVICE uint32_t even_codes(uint32_t w) { return (w << 4) & 0xF0F0F0F0; }
NIBBLE_DEVICE uint32_t odd_codes(uint32_t w) { return w & 0xF0F0F0F0; }

struct Int4 : PackedRows {
    static constexpr bool ASYNC = true, BFLOAT16 = true;
    static constexpr int UNIT = 1, AT_ONCE = 4;
    template <bool Unsigned>
    NIBBLE_DEVICE static void product(int (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                                      const int (&c)[4]) {
        mma_s4_k64<Unsigned>(d, a, b, c);
    }
};

struct Turing : PackedRows {
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

struct Int8 : PackedRows {
    static constexpr bool ASYNC = true, BFLOAT16 = true;
    static constexpr int UNIT = 256, AT_ONCE = 2;
    template <bool Unsigned>
    NIBBLE_DEVICE static void product(int (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                                      const int (&c)[4]) {
        // The compiler widens a fragment once, although every product of it asks.
        const uint32_t even_a[4] = {even_codes(a[0]), even_codes(a[1]), even_codes(a[2]),
                                    even_codes(a[3])},
                       even_b[2] = {even_codes(b[0]), even_codes(b[1])};
        const uint32_t odd_a[4] = {odd_codes(a[0]), odd_codes(a[1]), odd_codes(a[2]),
                                   odd_codes(a[3])},
                       odd_b[2] = {odd_codes(b[0]), odd_codes(b[1])};
        mma_s8_k32<Unsigned>(d, even_a, even_b, c);
        mma_s8_k32<Unsigned>(d, odd_a, odd_b, d);
    }
};

struct Act8 : WideRows {
    static constexpr bool ASYNC = true, BFLOAT16 = true;
    static constexpr int UNIT = 16, AT_ONCE = 2;
    template <bool Unsigned>
    NIBBLE_DEVICE static void product(int (&d)[4], const uint32_t (&a)[8], const uint32_t (&b)[2],
                                      const int (&c)[4]) {
        static_assert(!Unsigned, "codes of 8 bits have both signs");
        const uint32_t even_a[4] = {a[0], a[1], a[2], a[3]}, odd_a[4] = {a[4], a[5], a[6], a[7]};
        const uint32_t even_b[2] = {even_codes(b[0]), even_codes(b[1])},
                       odd_b[2] = {odd_codes(b[0]), odd_codes(b[1])};
        mma_s8_k32<false>(d, even_a, even_b, c);
        mma_s8_k32<false>(d, odd_a, odd_b, d);
    }
};

struct TuringAct8 : WideRows {
    static constexpr bool ASYNC = false, BFLOAT16 = false;
    static constexpr int UNIT = 16, AT_ONCE = 2;
    template <bool Unsigned>
    NIBBLE_DEVICE static void product(int (&d)[4], const uint32_t (&a)[8], const uint32_t (&b)[2],
                                      const int (&c)[4]) {
        static_assert(!Unsigned, "codes of 8 bits have both signs");
#pragma unroll
        for (int e = 0; e < 4; e++) d[e] = c[e];
#pragma unroll
        for (int odd = 0; odd < 2; odd++)
#pragma unroll
            for (int half = 0; half < 2; half++) {
                const uint32_t codes = odd ? odd_codes(b[half]) : even_codes(b[half]);
                const uint32_t* rows = a + 4 * odd + 2 * half;
                mma_s8_k16(d[0], d[1], rows[0], codes, d[0], d[1]);
                mma_s8_k16(d[2], d[3], rows[1], codes, d[2], d[3]);
            }
    }
};

}  // namespace nibble::cuda
