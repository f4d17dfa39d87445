// The GPU's vocabulary: one short function for each instruction that the kernels speak, and nothing
// else.
//
// Kernels contain no inline PTX of their own. So the same source runs in two worlds: compiled by
// nvcc with the instructions below, and compiled by an ordinary C++ compiler with
// tests/kernels/emulator, which gives every function here the meaning that the PTX manual gives its
// instruction (lane by lane; asynchronous copies land when they are waited for). Kernel logic is
// tested on any machine that way.
//
// Fragment layouts (PTX ISA, "Matrix Fragments"), g = lane / 4, t = lane % 4:
//   16-bit m16n8k16   A: a0 (row g, k 2t..2t+1) a1 (row g+8) a2 (row g, k+8) a3 (row g+8, k+8) · B:
//   b0 (k 2t..2t+1, column g) b1 (k+8)
//    8-bit m16n8k32   the same with four bytes a register: k 4t..4t+3, second half k+16
//    8-bit m8n8k16    A: row g, k 4t..4t+3 · B: k 4t..4t+3, column g
//    4-bit m16n8k64   the same with eight nibbles a register: k 8t..8t+7, second half k+32
//    4-bit m8n8k32    A: row g, k 8t..8t+7 · B: k 8t..8t+7, column g: the upper left quarter of the
//    one above
//   sums (all)        c0, c1 (row g, columns 2t, 2t+1) c2, c3 (row g+8, the same columns)
#pragma once

#include <cstdint>

namespace nibble {

// What <type_traits> has: the compiler that torch brings (NVRTC) has no standard library.
template <bool Condition, class A, class B>
struct Pick {
    using type = A;
};
template <class A, class B>
struct Pick<false, A, B> {
    using type = B;
};
template <bool Condition, class A, class B>
using pick = typename Pick<Condition, A, B>::type;
template <class A, class B>
inline constexpr bool same = false;
template <class A>
inline constexpr bool same<A, A> = true;

}  // namespace nibble

#ifdef NIBBLE_EMULATE
#include "emulated_primitives.h"  // from tests/kernels/emulator
#else
#ifndef __CUDACC_RTC__
#include <cuda_runtime.h>
#endif

namespace nibble {

#define NIBBLE_DEVICE __device__ __forceinline__

// ---- 16-bit floats, as bits: the toolkit's types do not compile everywhere outside of nvcc -----

struct bf16 {
    uint16_t bits;
};
struct f16 {
    uint16_t bits;
};

NIBBLE_DEVICE float to_float(float x) { return x; }
NIBBLE_DEVICE float to_float(bf16 x) { return __uint_as_float(uint32_t(x.bits) << 16); }
NIBBLE_DEVICE float to_float(f16 x) {
    float y;
    asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x.bits));
    return y;
}

template <class T>
NIBBLE_DEVICE T from_float(float x);
template <>
NIBBLE_DEVICE float from_float<float>(float x) {
    return x;
}
template <>
NIBBLE_DEVICE f16 from_float<f16>(float x) {
    f16 y;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(y.bits) : "f"(x));
    return y;
}
template <>
NIBBLE_DEVICE bf16 from_float<bf16>(float x) {
#if __CUDA_ARCH__ >= 800
    bf16 y;
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(y.bits) : "f"(x));
    return y;
#else  // Turing has no such instruction: round to nearest even by hand, NaN stays NaN
    uint32_t u = __float_as_uint(x);
    uint32_t rounded = (u + 0x7FFF + ((u >> 16) & 1)) >> 16;
    return {uint16_t(x != x ? 0x7FFF : rounded)};
#endif
}

// Two neighbours in one register, the first in the low half.
template <class T>
NIBBLE_DEVICE uint32_t pack2(float low, float high) {
    return uint32_t(from_float<T>(low).bits) | uint32_t(from_float<T>(high).bits) << 16;
}

// The same register, taken apart.
template <class T>
NIBBLE_DEVICE float low_half(uint32_t packed) {
    return to_float(T{uint16_t(packed)});
}
template <class T>
NIBBLE_DEVICE float high_half(uint32_t packed) {
    return to_float(T{uint16_t(packed >> 16)});
}

NIBBLE_DEVICE float as_float(int x) { return __int_as_float(x); }
NIBBLE_DEVICE int as_int(float x) { return __float_as_int(x); }

// The same number, of unknown origin to the compiler: what is computed from it stays where it is
// written, instead of being computed before a loop and held in registers throughout.
NIBBLE_DEVICE int recomputed(int x) {
    asm volatile("" : "+r"(x));
    return x;
}

// ---- threads ------------------------------------------------------------------------------------

NIBBLE_DEVICE char* dynamic_shared() {
    extern __shared__ __align__(1024) char shared[];
    return shared;
}
NIBBLE_DEVICE void sync_block() { __syncthreads(); }
NIBBLE_DEVICE void sync_warp() { __syncwarp(); }
template <class T>
NIBBLE_DEVICE T shuffle_xor(T x, int mask) {
    return __shfl_xor_sync(0xFFFFFFFF, x, mask);
}
template <class T>
NIBBLE_DEVICE T shuffle(T x, int lane) {
    return __shfl_sync(0xFFFFFFFF, x, lane);
}

// Two kernels that follow one another on a stream (programmatic dependent launch, 9.0 and later).
// The second may be started while the first runs, once each block of that has allowed it or ended;
// what the first wrote may be read, and what it read be written, after the wait alone, which is for
// the whole first kernel. Without such a launch neither does anything.
NIBBLE_DEVICE void allow_next_kernel() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}
NIBBLE_DEVICE void wait_for_previous_kernel() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// ---- memory -------------------------------------------------------------------------------------

NIBBLE_DEVICE uint32_t shared_address(const void* p) {
    return uint32_t(__cvta_generic_to_shared(p));
}

// Global -> shared without passing registers. `valid` false writes zeros and reads nothing. Turing
// has only the detour.
NIBBLE_DEVICE void copy_async16(void* to, const void* from, bool valid) {
#if __CUDA_ARCH__ >= 800
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)),
                 "l"(from), "r"(valid ? 16 : 0)
                 : "memory");
#else
    *reinterpret_cast<uint4*>(to) =
        valid ? *reinterpret_cast<const uint4*>(from) : uint4{0, 0, 0, 0};
#endif
}
NIBBLE_DEVICE void copy_async4(void* to, const void* from, bool valid) {
#if __CUDA_ARCH__ >= 800
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(shared_address(to)),
                 "l"(from), "r"(valid ? 4 : 0)
                 : "memory");
#else
    *reinterpret_cast<uint32_t*>(to) = valid ? *reinterpret_cast<const uint32_t*>(from) : 0;
#endif
}
NIBBLE_DEVICE void copy_async_commit() {
#if __CUDA_ARCH__ >= 800
    asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}
// Waits until at most N of this thread's committed groups are under way. Other threads see the data
// after a barrier.
template <int N>
NIBBLE_DEVICE void copy_async_wait() {
#if __CUDA_ARCH__ >= 800
    asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
#endif
}

// Four (two) 8 x 16-byte matrices; lane l gives the address of row l % 8 of matrix l / 8, register
// j holds matrix j: row g, bytes 4t..4t+3.
NIBBLE_DEVICE void load_matrix_x4(uint32_t (&r)[4], const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(shared_address(row))
                 : "memory");
}
NIBBLE_DEVICE void load_matrix_x2(uint32_t (&r)[2], const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0,%1}, [%2];"
                 : "=r"(r[0]), "=r"(r[1])
                 : "r"(shared_address(row))
                 : "memory");
}
// The same, each 8 x 8 matrix of 16-bit numbers transposed: register j holds matrix j: rows 2t,
// 2t+1 of column g.
NIBBLE_DEVICE void load_matrix_x4_transposed(uint32_t (&r)[4], const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(shared_address(row))
                 : "memory");
}

// ---- numbers ------------------------------------------------------------------------------------

NIBBLE_DEVICE bool any_in_warp(bool x) { return __any_sync(0xFFFFFFFF, x); }

// The larger one, and NaN where either is NaN (fmaxf drops it).
NIBBLE_DEVICE float max_or_nan(float x, float y) {
#if __CUDA_ARCH__ >= 800
    float z;
    asm("max.NaN.f32 %0, %1, %2;" : "=f"(z) : "f"(x), "f"(y));
    return z;
#else
    return x > y || x != x ? x : y;
#endif
}

// 1 / x, one unit in the last place wrong at most; subnormal numbers count as 0.
NIBBLE_DEVICE float reciprocal_estimate(float x) {
    float y;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// (x & mask) | bits in one instruction; written in C it becomes two where both are constants.
NIBBLE_DEVICE uint32_t and_or(uint32_t x, uint32_t mask, uint32_t bits) {
    uint32_t y;
    asm("lop3.b32 %0, %1, %2, %3, 0xEA;" : "=r"(y) : "r"(x), "r"(mask), "r"(bits));
    return y;
}

// Four bytes of the eight in {y, x}, chosen by the four digits of `selector`: 0 is x's lowest byte,
// 7 is y's highest.
NIBBLE_DEVICE uint32_t pick_bytes(uint32_t x, uint32_t y, uint32_t selector) {
    return __byte_perm(x, y, selector);
}

// Two integers in -8..15 as 8-bit floats (e4m3), the first in the low byte.
NIBBLE_DEVICE uint32_t pack2_e4m3(float low, float high) {
#if __CUDA_ARCH__ >= 890
    uint16_t packed;
    asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(packed) : "f"(high), "f"(low));
    return packed;
#else  // drop 120 from the exponent and all but three digits of the fraction: exact for them
    auto byte = [](float x) {
        uint32_t bits = __float_as_uint(x), magnitude = bits & 0x7FFFFFFF;
        return magnitude ? (bits >> 24 & 0x80) | ((magnitude >> 20) - (120 << 3)) : 0u;
    };
    return byte(low) | byte(high) << 8;
#endif
}

// ---- products: d = c + A . B; d may be c --------------------------------------------------------

// d and c apart, so that a constant c stays in its registers and costs no move each time.
#define NIBBLE_INTEGER_MMA(shape, types)                                                          \
    asm("mma.sync.aligned." shape ".row.col.s32." types                                           \
        ".s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%10,%11,%12,%13};"                          \
        : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3])                                          \
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "r"(c[0]), "r"(c[1]), \
          "r"(c[2]), "r"(c[3]))

// int4, k = 64: one group. Native on 8.x only (elsewhere emulated and slow, so those use mma_s8).
template <bool UnsignedA>
NIBBLE_DEVICE void mma_s4_k64(int (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                              const int (&c)[4]) {
    if constexpr (UnsignedA)
        NIBBLE_INTEGER_MMA("m16n8k64", "u4.s4");
    else
        NIBBLE_INTEGER_MMA("m16n8k64", "s4.s4");
}

// int8, k = 32 (8.0 and later).
template <bool UnsignedA>
NIBBLE_DEVICE void mma_s8_k32(int (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                              const int (&c)[4]) {
    if constexpr (UnsignedA)
        NIBBLE_INTEGER_MMA("m16n8k32", "u8.s8");
    else
        NIBBLE_INTEGER_MMA("m16n8k32", "s8.s8");
}
#undef NIBBLE_INTEGER_MMA

// int8, 8 x 8, k = 16: Turing's.
NIBBLE_DEVICE void mma_s8_k16(int& d0, int& d1, uint32_t a, uint32_t b, int c0, int c1) {
    asm("mma.sync.aligned.m8n8k16.row.col.s32.s8.s8.s32 {%0,%1}, {%2}, {%3}, {%4,%5};"
        : "=r"(d0), "=r"(d1)
        : "r"(a), "r"(b), "r"(c0), "r"(c1));
}

// int4, 8 x 8, k = 32: Turing's only int4 product.
template <bool UnsignedA>
NIBBLE_DEVICE void mma_s4_k32(int& d0, int& d1, uint32_t a, uint32_t b, int c0, int c1) {
    if constexpr (UnsignedA)
        asm("mma.sync.aligned.m8n8k32.row.col.s32.u4.s4.s32 {%0,%1}, {%2}, {%3}, {%4,%5};"
            : "=r"(d0), "=r"(d1)
            : "r"(a), "r"(b), "r"(c0), "r"(c1));
    else
        asm("mma.sync.aligned.m8n8k32.row.col.s32.s4.s4.s32 {%0,%1}, {%2}, {%3}, {%4,%5};"
            : "=r"(d0), "=r"(d1)
            : "r"(a), "r"(b), "r"(c0), "r"(c1));
}

// 16-bit floats, k = 16, fp32 sums. Turing computes float16 in two halves and has no bfloat16:
// callers give it float16.
template <class T>
NIBBLE_DEVICE void mma_16bit(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]);
template <>
NIBBLE_DEVICE void mma_16bit<f16>(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
#if __CUDA_ARCH__ >= 800
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
        "{%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#else
#pragma unroll
    for (int half = 0; half < 2; half++)
        asm("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5}, {%6}, "
            "{%0,%1,%2,%3};"
            : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
            : "r"(a[2 * half]), "r"(a[2 * half + 1]), "r"(b[half]));
#endif
}
template <>
NIBBLE_DEVICE void mma_16bit<bf16>(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
#if __CUDA_ARCH__ >= 800
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, "
        "{%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#endif
}

}  // namespace nibble
#endif
