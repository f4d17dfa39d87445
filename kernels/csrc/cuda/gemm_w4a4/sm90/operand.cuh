// How kernel.cuh multiplies a group's codes, for each form in which activations come: the type of
// the sums, the products, and how a lane makes its part of A out of packed weights.
//
// A product's k has a free order, as long as A's registers and B's bytes agree on it. A lane's
// places are 4t..4t + 3 and 16 + 4t..16 + 4t + 3 of the 32.
#pragma once

#include "tile.cuh"

namespace nibble::cuda::sm90 {

// A of one block of 64 rows and one group: two products' worth of bytes, and the rows' scales as
// tf32.
struct Operand {
    uint32_t codes[2][4], scales[4];
};

// Where a lane's scales of a stage are. `row` is the warp's first in the tile.
template <class Shape>
struct ScalesOfRows {
    int at;
    NIBBLE_DEVICE explicit ScalesOfRows(int row)
        : at(Shape::wscales_at + (row + threadIdx.x % 32 / 4) * 4) {}
    NIBBLE_DEVICE void read(uint32_t (&a)[4], const char* stage, int group, int block) const {
        const float* scales =
            reinterpret_cast<const float*>(stage + at) + group * Shape::rows + block * 64;
        a[0] = as_int(scales[0]);
        a[1] = as_int(scales[8]);
        a[2] = a[3] = 0;  // places 4..7 along k, where B repeats places 0..3
    }
};

template <Codes FORMAT>
struct Format;

// ---- activations of 4 bits: 8-bit floats --------------------------------------------------------

// Eight codes -> eight e4m3. A nibble selects a byte of a table of eight, or zero where its bit 3
// is set; so one table serves 0..7 and the other, with bit 3 flipped, -8..-1. The second holds
// halves, as a table's byte must not have its highest bit set: doubled, they get their sign. An
// instruction holds one constant, so each table's first word is a variable.
struct Decoder {
    uint32_t positive = 0x44403800, negative = 0x65666768;
    NIBBLE_DEVICE uint32_t four(uint32_t codes, uint32_t flipped) const {
        uint32_t halves = permute_bytes(negative, 0x5C606264, flipped);
        return permute_bytes(positive, 0x4E4C4A48, codes) + halves + halves;
    }
    NIBBLE_DEVICE void operator()(uint32_t packed, uint32_t& low, uint32_t& high) const {
        const uint32_t flipped = packed ^ 0x88888888;
        low = four(packed, flipped);
        high = four(packed >> 16, flipped >> 16);
    }
};

// One ldmatrix brings a lane eight neighbouring codes of rows g and g + 8 for both halves of a
// group; what a product calls columns 4t.. and 16 + 4t.. are then columns 8t.. and 8t + 4.. of the
// weight, and that is the order in which the activations' bytes are stored (Codes::e4m3).
template <>
struct Format<Codes::e4m3> {
    using Sum = float;
    static constexpr int UNIT = 1;  // A's numbers are codes times this
    NIBBLE_DEVICE static void first(Sum (&d)[32], const uint32_t (&a)[4], uint64_t b) {
        product_e4m3_first(d, a, b);
    }
    NIBBLE_DEVICE static void next(Sum (&d)[32], const uint32_t (&a)[4], uint64_t b) {
        product_e4m3_next(d, a, b);
    }

    template <class Shape>
    class Reader {
    public:
        NIBBLE_DEVICE explicit Reader(int row) : scales_(row) {
            const int lane = threadIdx.x % 32, at = row + lane % 16;
            codes_at_ = Shape::weights_at + at * (STEP / 2) + (lane / 16 ^ at / 2 % 4) * 16;
            // Zero, but the compiler cannot tell: else it keeps the tables in registers that all
            // lanes share and copies them before each use.
            const uint32_t zero = threadIdx.x * (threadIdx.x + 1) & 1;
            decode_.positive += zero;
            decode_.negative += zero;
        }
        NIBBLE_DEVICE void operator()(Operand& a, const char* stage, int group, int block) const {
            uint32_t packed[4];
            load_matrix_x4(packed, stage + (codes_at_ ^ group * 32) + block * 64 * (STEP / 2));
#pragma unroll
            for (int half = 0; half < 2; half++)
#pragma unroll
                for (int i = 0; i < 2; i++)
                    decode_(packed[2 * half + i], a.codes[half][i], a.codes[half][i + 2]);
            scales_.read(a.scales, stage, group, block);
        }

    private:
        Decoder decode_;
        ScalesOfRows<Shape> scales_;
        int codes_at_;
    };
};

// ---- activations of 8 bits: integers
// -------------------------------------------------------------

// Four neighbouring codes -> four bytes of 16 * code: a nibble is a byte's upper half.
NIBBLE_DEVICE uint32_t upper_halves(uint32_t packed) {
    return permute_bytes(packed << 4, packed, 0x5140) & 0xF0F0F0F0;
}

// Activations lie in the order of their columns (Codes::int8), so a lane needs four codes at a
// time, 16 bits: eight loads where ldmatrix would bring eight columns that belong to two lanes. No
// bank is met twice: the eight rows lie in different 16 bytes of 128.
template <>
struct Format<Codes::int8> {
    using Sum = int;
    static constexpr int UNIT = 16;
    NIBBLE_DEVICE static void first(Sum (&d)[32], const uint32_t (&a)[4], uint64_t b) {
        product_s8_first(d, a, b);
    }
    NIBBLE_DEVICE static void next(Sum (&d)[32], const uint32_t (&a)[4], uint64_t b) {
        product_s8_next(d, a, b);
    }

    template <class Shape>
    class Reader {
    public:
        NIBBLE_DEVICE explicit Reader(int row) : scales_(row) {
            const int lane = threadIdx.x % 32, at = row + lane / 4;
            codes_at_ = Shape::weights_at + at * (STEP / 2) + at / 2 % 4 * 16 + lane % 4 * 2;
        }
        NIBBLE_DEVICE void operator()(Operand& a, const char* stage, int group, int block) const {
#pragma unroll
            for (int half = 0; half < 2; half++) {
                const char* codes =
                    stage + (codes_at_ ^ (2 * group + half) * 16) + block * 64 * (STEP / 2);
#pragma unroll
                for (int i = 0; i < 4; i++)  // row g or g + 8, of either 16 columns
                    a.codes[half][i] = upper_halves(*reinterpret_cast<const uint16_t*>(
                        codes + i % 2 * 8 * (STEP / 2) + i / 2 * 8));
            }
            scales_.read(a.scales, stage, group, block);
        }

    private:
        ScalesOfRows<Shape> scales_;
        int codes_at_;
    };
};

}  // namespace nibble::cuda::sm90
