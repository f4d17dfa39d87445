// Hopper's words, beside those of primitives.cuh: products of whole warpgroups, barriers in shared
// memory, tiles copied by the copy engine.
//
// A warpgroup is four warps whose first is divisible by four. Its product takes A from registers
// (each warp its own 16 of 64 rows, laid out as mma.sync's A) and B from shared memory through a
// descriptor; the sums, laid out as mma.sync's sums, are n / 8 quadruples a thread. It runs on its
// own: what it reads and writes may not be touched until `product_wait` says that it has finished.
#pragma once

#include "primitives.cuh"

#ifdef NIBBLE_EMULATE
#include "emulated_primitives_sm90.h"  // from tests/kernels/emulator
#else
namespace nibble {

using Barrier = uint64_t;  // in shared memory, 8-byte aligned

// ---- tiles of a matrix of bytes, copied by the copy engine --------------------------------------

// What the driver makes of a matrix (cuTensorMapEncodeTiled), opaque: see tensor_map.h. Tiles are
// swizzled; what lies outside of the matrix arrives as zeros.
struct alignas(64) TensorMap {
    uint64_t opaque[16];
};

// The tile whose first element is (row, byte), into `to`; `barrier` is told the tile's size in
// bytes. One thread calls this.
NIBBLE_DEVICE void copy_tile(void* to, const TensorMap& map, int byte, int row, Barrier* barrier) {
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, "
        "{%3, %4}], [%2];" ::"r"(shared_address(to)),
        "l"(&map), "r"(shared_address(barrier)), "r"(byte), "r"(row)
        : "memory");
}

// ---- barriers -----------------------------------------------------------------------------------

// A phase ends when `count` threads have arrived and all bytes that were expected have come. Phases
// count 0, 1, 0, 1 ...
NIBBLE_DEVICE void barrier_init(Barrier* barrier, uint32_t count) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)),
                 "r"(count)
                 : "memory");
}
// After the inits, before anyone else (the copy engine too) uses the barriers; sync_block follows.
NIBBLE_DEVICE void barrier_init_fence() {
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}
NIBBLE_DEVICE void barrier_expect(Barrier* barrier, uint32_t bytes) {
    asm volatile(
        "mbarrier.expect_tx.relaxed.cta.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)),
        "r"(bytes)
        : "memory");
}
NIBBLE_DEVICE void barrier_arrive(Barrier* barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier))
                 : "memory");
}
// Returns once the phase with this parity has ended. Before the first phase, parity 1 counts as
// ended.
NIBBLE_DEVICE void barrier_wait(Barrier* barrier, uint32_t parity) {
    uint32_t done;
    do {
        asm volatile(
            "{ .reg .pred p; mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2; selp.u32 %0, 1, "
            "0, p; }"
            : "=r"(done)
            : "r"(shared_address(barrier)), "r"(parity)
            : "memory");
    } while (!done);
}

// One of the block's 16 numbered barriers, for `threads` of its threads (whole warps).
NIBBLE_DEVICE void sync_named(int id, int threads) {
    asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// Registers that a warpgroup gives back, or claims once others gave them back.
template <int Count>
NIBBLE_DEVICE void registers_release() {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(Count));
}
template <int Count>
NIBBLE_DEVICE void registers_claim() {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(Count));
}

// ---- products of a warpgroup --------------------------------------------------------------------

// A store whose reader is the tensor core, which sees it once this thread has called
// product_store_fence and arrived at a barrier.
NIBBLE_DEVICE void product_store(float4* to, float4 value) { *to = value; }
NIBBLE_DEVICE void product_store_fence() {
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

// B, n rows along k. Swizzled: 128-byte rows, 8 of them 1024 bytes from the next 8, 16-byte units
// exchanged by the row (address bits 4-6 ^= bits 7-9), as copy_tile leaves them. `start` may
// advance by 32 bytes along k inside of the rows.
NIBBLE_DEVICE uint64_t product_operand_swizzled(const void* start) {
    return uint64_t(1) << 62 | uint64_t(1024 >> 4) << 32 | uint64_t(1) << 16 |
           uint64_t((shared_address(start) & 0x3FFFF) >> 4);
}
// Not swizzled: 16-byte rows, dense; the second 16 bytes along k are the first ones again (leading
// offset 0).
NIBBLE_DEVICE uint64_t product_operand_repeated(const void* start) {
    return uint64_t(128 >> 4) << 32 | uint64_t((shared_address(start) & 0x3FFFF) >> 4);
}

// Before a product whose registers (sums or A) other instructions have touched.
NIBBLE_DEVICE void product_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
NIBBLE_DEVICE void product_commit() {
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}
// Waits until at most N committed groups run.
template <int N>
NIBBLE_DEVICE void product_wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(N) : "memory");
}
// Keeps the compiler from moving reads of the sums above the wait before it.
NIBBLE_DEVICE void product_landed(float (&d)[32]) {
#pragma unroll
    for (int i = 0; i < 32; i++) asm volatile("" : "+f"(d[i])::"memory");
}
NIBBLE_DEVICE void product_landed(int (&d)[32]) {
#pragma unroll
    for (int i = 0; i < 32; i++) asm volatile("" : "+r"(d[i])::"memory");
}

#define NIBBLE_SUMS(constraint)                                                                   \
    constraint(d[0]), constraint(d[1]), constraint(d[2]), constraint(d[3]), constraint(d[4]),     \
        constraint(d[5]), constraint(d[6]), constraint(d[7]), constraint(d[8]), constraint(d[9]), \
        constraint(d[10]), constraint(d[11]), constraint(d[12]), constraint(d[13]),               \
        constraint(d[14]), constraint(d[15]), constraint(d[16]), constraint(d[17]),               \
        constraint(d[18]), constraint(d[19]), constraint(d[20]), constraint(d[21]),               \
        constraint(d[22]), constraint(d[23]), constraint(d[24]), constraint(d[25]),               \
        constraint(d[26]), constraint(d[27]), constraint(d[28]), constraint(d[29]),               \
        constraint(d[30]), constraint(d[31])
#define NIBBLE_PRODUCT(kind, accumulate, more)                                                     \
    "{ .reg .pred p; setp.ne.b32 p, " accumulate ", 0; wgmma.mma_async.sync.aligned." kind         \
    " {%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24," \
    "%25,%26,%27,%28,%29,%30,%31},"                                                                \
    " {%32,%33,%34,%35}, %36, p" more "; }"

// d (64 x 64) = or += A (64 x 32 bytes, e4m3) . B. Hopper aligns the products and the sum to the
// largest exponent and keeps 13 bits below it: integers are exact as long as nothing reaches 2^14.
NIBBLE_DEVICE void product_e4m3_first(float (&d)[32], const uint32_t (&a)[4], uint64_t b) {
    asm volatile(NIBBLE_PRODUCT("m64n64k32.f32.e4m3.e4m3", "0", ", 1, 1")
                 : NIBBLE_SUMS("+f")
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b)
                 : "memory");
}
NIBBLE_DEVICE void product_e4m3_next(float (&d)[32], const uint32_t (&a)[4], uint64_t b) {
    asm volatile(NIBBLE_PRODUCT("m64n64k32.f32.e4m3.e4m3", "1", ", 1, 1")
                 : NIBBLE_SUMS("+f")
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b)
                 : "memory");
}
// The same of s8, in 32-bit integers.
NIBBLE_DEVICE void product_s8_first(int (&d)[32], const uint32_t (&a)[4], uint64_t b) {
    asm volatile(NIBBLE_PRODUCT("m64n64k32.s32.s8.s8", "0", "")
                 : NIBBLE_SUMS("+r")
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b)
                 : "memory");
}
NIBBLE_DEVICE void product_s8_next(int (&d)[32], const uint32_t (&a)[4], uint64_t b) {
    asm volatile(NIBBLE_PRODUCT("m64n64k32.s32.s8.s8", "1", "")
                 : NIBBLE_SUMS("+r")
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b)
                 : "memory");
}
// d (64 x 64) = A (64 x 8 tf32: a0 row g, k t; a1 row g + 8; a2, a3 the same with k t + 4) . B.
NIBBLE_DEVICE void product_tf32(float (&d)[32], const uint32_t (&a)[4], uint64_t b) {
    asm volatile(NIBBLE_PRODUCT("m64n64k8.f32.tf32.tf32", "0", ", 1, 1")
                 : NIBBLE_SUMS("+f")
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b)
                 : "memory");
}
#undef NIBBLE_SUMS
#undef NIBBLE_PRODUCT

// ---- products of a warp -------------------------------------------------------------------------

// The nearest number with tf32's 11 significant bits, halves away from zero.
NIBBLE_DEVICE uint32_t round_to_tf32(float x) {
    uint32_t y;
    asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(y) : "f"(x));
    return y;
}
// tf32 m16n8k8, fp32 sums. A: a0 (row g, k t) a1 (row g + 8) a2 (row g, k t + 4) a3 (row g + 8,
// k t + 4); B: b0 (k t, column g) b1 (k t + 4).
NIBBLE_DEVICE void mma_tf32(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, "
        "{%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// ---- bytes --------------------------------------------------------------------------------------

// Byte i of the result is byte (nibble i of `selectors`) % 8 of {low, high}; where the nibble's bit
// 3 is set, eight times that byte's highest bit.
NIBBLE_DEVICE uint32_t permute_bytes(uint32_t low, uint32_t high, uint32_t selectors) {
    uint32_t y;
    asm("prmt.b32 %0, %1, %2, %3;" : "=r"(y) : "r"(low), "r"(high), "r"(selectors));
    return y;
}

// Four 8 x 8 matrices of 16-bit numbers, each transposed: register j holds rows 2t, 2t+1 of column
// g of matrix j; lane l gives the address of row l % 8 (16 bytes) of matrix l / 8.
NIBBLE_DEVICE void store_matrix_x4_transposed(void* row, const uint32_t (&r)[4]) {
    asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1,%2,%3,%4};" ::"r"(
                     shared_address(row)),
                 "r"(r[0]), "r"(r[1]), "r"(r[2]), "r"(r[3])
                 : "memory");
}

}  // namespace nibble
#endif
