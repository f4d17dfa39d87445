// kernels/csrc/cuda/primitives.cuh in plain C++: each function means what the PTX manual says of
// its instruction. See emulator.h.
#pragma once

#include <math.h>  // the C names, which device code uses
#include <cstdint>
#include <cstring>

#include "emulator.h"

#define NIBBLE_DEVICE inline

struct alignas(16) uint4 {
    uint32_t x, y, z, w;
};
struct alignas(8) uint2 {
    uint32_t x, y;
};
struct alignas(16) float4 {
    float x, y, z, w;
};
struct alignas(8) float2 {
    float x, y;
};

namespace nibble {

// ---- 16-bit floats ------------------------------------------------------------------------------

struct bf16 {
    uint16_t bits;
};
struct f16 {
    uint16_t bits;
};

template <class To, class From>
To bit_cast(From from) {
    static_assert(sizeof(To) == sizeof(From));
    To to;
    std::memcpy(&to, &from, sizeof to);
    return to;
}
inline float as_float(int x) { return bit_cast<float>(x); }
inline int as_int(float x) { return bit_cast<int>(x); }

inline float to_float(float x) { return x; }
inline float to_float(bf16 x) { return bit_cast<float>(uint32_t(x.bits) << 16); }
inline float to_float(f16 x) { return float(bit_cast<_Float16>(x.bits)); }

template <class T>
T from_float(float x);
template <>
inline float from_float<float>(float x) {
    return x;
}
template <>
inline f16 from_float<f16>(float x) {
    return {bit_cast<uint16_t>(_Float16(x))};
}
template <>
inline bf16 from_float<bf16>(float x) {
    uint32_t u = bit_cast<uint32_t>(x);
    return {uint16_t(x != x ? 0x7FFF : (u + 0x7FFF + ((u >> 16) & 1)) >> 16)};
}
template <class T>
float low_half(uint32_t packed) {
    return to_float(T{uint16_t(packed)});
}
template <class T>
float high_half(uint32_t packed) {
    return to_float(T{uint16_t(packed >> 16)});
}
template <class T>
uint32_t pack2(float low, float high) {
    return uint32_t(from_float<T>(low).bits) | uint32_t(from_float<T>(high).bits) << 16;
}

inline int recomputed(int x) { return x; }

// ---- threads ------------------------------------------------------------------------------------

inline char* dynamic_shared() { return emulator::block().shared; }
inline void sync_block() { emulator::barrier(0, emulator::block().threads); }
// The emulator runs one kernel after the other.
inline void allow_next_kernel() {}
inline void wait_for_previous_kernel() {}
inline void sync_warp() {
    int nothing = 0;
    emulator::together("syncwarp", nothing, [](int**) {});
}
template <class T>
T shuffle(T x, int lane) {
    struct Lane {
        T x;
        int from;
        T result;
    } mine{x, lane, x};
    emulator::together("shuffle", mine, [](Lane** lanes) {
        for (int i = 0; i < 32; i++) lanes[i]->result = lanes[lanes[i]->from & 31]->x;
    });
    return mine.result;
}
template <class T>
T shuffle_xor(T x, int mask) {
    return shuffle(x, emulator::self().lane() ^ mask);
}

// ---- memory -------------------------------------------------------------------------------------

inline uint32_t shared_address(const void* p) {
    return uint32_t(static_cast<const char*>(p) - emulator::block().shared);
}

inline void copy_async(void* to, const void* from, size_t bytes, bool valid) {
    emulator::check_shared(to, bytes, bytes, "the destination of an asynchronous copy");
    if (valid && reinterpret_cast<uintptr_t>(from) % bytes)
        emulator::fail("the source of an asynchronous copy is not aligned");
    std::memset(to, 0xAB, bytes);  // nobody may count on what was there
    emulator::self().open.push_back({to, from, bytes, valid});
}
inline void copy_async16(void* to, const void* from, bool valid) {
    copy_async(to, from, 16, valid);
}
inline void copy_async4(void* to, const void* from, bool valid) { copy_async(to, from, 4, valid); }
inline void copy_async_commit() {
    emulator::self().committed.push_back(std::move(emulator::self().open));
    emulator::self().open.clear();
}
template <int N>
void copy_async_wait() {
    auto& groups = emulator::self().committed;
    while (groups.size() > N) {
        for (const emulator::Copy& copy : groups.front()) {
            if (copy.valid)
                std::memcpy(copy.to, copy.from, copy.bytes);
            else
                std::memset(copy.to, 0, copy.bytes);
        }
        groups.erase(groups.begin());
    }
}

template <int Matrices, bool Transposed>
void load_matrix(uint32_t (&r)[Matrices], const void* row, const char* name) {
    struct Lane {
        const void* row;
        uint32_t* r;
    } mine{row, r};
    if (emulator::self().lane() < 8 * Matrices)
        emulator::check_shared(row, 16, 16, "a row of ldmatrix");
    emulator::together(name, mine, [](Lane** lanes) {
        for (int lane = 0; lane < 32; lane++)
            for (int j = 0; j < Matrices; j++)
                for (int half = 0; half < 2; half++) {
                    int r = Transposed ? 2 * (lane % 4) + half : lane / 4,
                        c = Transposed ? lane / 4 : 2 * (lane % 4) + half;
                    uint16_t bits;
                    std::memcpy(&bits, static_cast<const char*>(lanes[8 * j + r]->row) + 2 * c, 2);
                    lanes[lane]->r[j] =
                        half ? (lanes[lane]->r[j] & 0xFFFF) | uint32_t(bits) << 16 : bits;
                }
    });
}
inline void load_matrix_x4(uint32_t (&r)[4], const void* row) {
    load_matrix<4, false>(r, row, "ldmatrix.x4");
}
inline void load_matrix_x2(uint32_t (&r)[2], const void* row) {
    load_matrix<2, false>(r, row, "ldmatrix.x2");
}
inline void load_matrix_x4_transposed(uint32_t (&r)[4], const void* row) {
    load_matrix<4, true>(r, row, "ldmatrix.x4.trans");
}

// ---- numbers ------------------------------------------------------------------------------------

inline bool any_in_warp(bool x) {
    struct Lane {
        bool x, any;
    } mine{x, false};
    emulator::together("vote", mine, [](Lane** lanes) {
        bool any = false;
        for (int i = 0; i < 32; i++) any |= lanes[i]->x;
        for (int i = 0; i < 32; i++) lanes[i]->any = any;
    });
    return mine.any;
}

inline float max_or_nan(float x, float y) { return x > y || x != x ? x : y; }

// As wrong as the manual allows.
inline float reciprocal_estimate(float x) {
    if (fabsf(x) < 0x1p-126f) return copysignf(INFINITY, x);
    float y = 1.0f / x;
    return fabsf(y) < 0x1p-126f ? copysignf(0.0f, y) : nextafterf(y, INFINITY);
}

inline uint32_t and_or(uint32_t x, uint32_t mask, uint32_t bits) { return (x & mask) | bits; }

inline uint32_t pick_bytes(uint32_t x, uint32_t y, uint32_t selector) {
    uint64_t bytes = uint64_t(y) << 32 | x;
    uint32_t result = 0;
    for (int i = 0; i < 4; i++)
        result |= uint32_t(bytes >> (8 * (selector >> (4 * i) & 7)) & 0xFF) << (8 * i);
    return result;
}

inline uint32_t pack2_e4m3(float low, float high) {
    auto byte = [](float x) {
        uint32_t bits = bit_cast<uint32_t>(x), magnitude = bits & 0x7FFFFFFF;
        return magnitude ? (bits >> 24 & 0x80) | ((magnitude >> 20) - (120 << 3)) : bits >> 24;
    };
    return byte(low) | byte(high) << 8;
}

// ---- products -----------------------------------------------------------------------------------

inline int element(uint32_t packed, int i, int bits, bool is_unsigned) {
    uint32_t u = packed >> (bits * i) & ((1u << bits) - 1);
    return is_unsigned || !(u >> (bits - 1)) ? int(u) : int(u) - (1 << bits);
}

// d (8 or 16 rows x 8) = c + A . B of integers of `Bits` bits, a register holding 32 / Bits
// neighbours along k; AR registers of A, BR of B.
template <int Bits, int AR, int BR, bool UnsignedA>
void mma_integers(int* d, const uint32_t* a, const uint32_t* b, const int* c, const char* name) {
    constexpr int PER = 32 / Bits, ROWS = AR > 1 ? 16 : 8, K = BR * 4 * PER;
    struct Lane {
        int* d;
        const uint32_t *a, *b;
        const int* c;
    } mine{d, a, b, c};
    emulator::together(name, mine, [](Lane** lanes) {
        int8_t left[ROWS][K];  // 0..255 of an unsigned byte is taken as -128..127 and corrected by
                               // the mask below
        int8_t right[8][K];
        for (int lane = 0; lane < 32; lane++)
            for (int half = 0; half < BR; half++)
                for (int i = 0; i < PER; i++) {
                    int k = half * 4 * PER + lane % 4 * PER + i, g = lane / 4;
                    right[g][k] = int8_t(element(lanes[lane]->b[half], i, Bits, false));
                    for (int r = 0; r < ROWS / 8; r++)
                        left[g + 8 * r][k] = int8_t(
                            element(lanes[lane]->a[ROWS / 8 * half + r], i, Bits, UnsignedA));
                }
        constexpr int MASK = UnsignedA ? 0xFF : -1;
        int sums[ROWS][8];
        for (int m = 0; m < ROWS; m++)
            for (int n = 0; n < 8; n++) {
                int sum = 0;
                for (int k = 0; k < K; k++) sum += (left[m][k] & MASK) * right[n][k];
                sums[m][n] = sum;
            }
        for (int lane = 0; lane < 32; lane++)
            for (int r = 0; r < ROWS / 4; r++)
                lanes[lane]->d[r] =
                    lanes[lane]->c[r] + sums[lane / 4 + 8 * (r / 2)][2 * (lane % 4) + r % 2];
    });
}
template <bool UnsignedA>
void mma_s4_k64(int (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], const int (&c)[4]) {
    mma_integers<4, 4, 2, UnsignedA>(d, a, b, c, "mma.m16n8k64");
}
template <bool UnsignedA>
void mma_s8_k32(int (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], const int (&c)[4]) {
    mma_integers<8, 4, 2, UnsignedA>(d, a, b, c, "mma.m16n8k32");
}
inline void mma_s8_k16(int& d0, int& d1, uint32_t a, uint32_t b, int c0, int c1) {
    int d[2], c[2] = {c0, c1};
    mma_integers<8, 1, 1, false>(d, &a, &b, c, "mma.m8n8k16");
    d0 = d[0], d1 = d[1];
}
template <bool UnsignedA>
void mma_s4_k32(int& d0, int& d1, uint32_t a, uint32_t b, int c0, int c1) {
    int d[2], c[2] = {c0, c1};
    mma_integers<4, 1, 1, UnsignedA>(d, &a, &b, c, "mma.m8n8k32");
    d0 = d[0], d1 = d[1];
}

template <class T>
void mma_16bit(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    struct Lane {
        float* c;
        const uint32_t *a, *b;
    } mine{c, a, b};
    emulator::together("mma.m16n8k16", mine, [](Lane** lanes) {
        double left[16][16], right[8][16];  // products of 16-bit floats are exact in double
        for (int lane = 0; lane < 32; lane++)
            for (int half = 0; half < 2; half++)
                for (int i = 0; i < 2; i++) {
                    int k = 8 * half + lane % 4 * 2 + i, g = lane / 4;
                    right[g][k] = to_float(T{uint16_t(lanes[lane]->b[half] >> (16 * i))});
                    for (int r = 0; r < 2; r++)
                        left[g + 8 * r][k] =
                            to_float(T{uint16_t(lanes[lane]->a[2 * half + r] >> (16 * i))});
                }
        for (int lane = 0; lane < 32; lane++)
            for (int r = 0; r < 4; r++) {
                int row = lane / 4 + 8 * (r / 2), column = 2 * (lane % 4) + r % 2;
                double sum = lanes[lane]->c[r];
                for (int k = 0; k < 16; k++) sum += left[row][k] * right[column][k];
                lanes[lane]->c[r] = float(sum);
            }
    });
}

}  // namespace nibble
