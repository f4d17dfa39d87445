// Small kernels, one for each instruction whose meaning the emulator only assumes: what it says of
// Hopper's products, copy engine and stores, and of the layouts of mma.sync, is held against the
// GPU itself. probes.py has the expected results.
#pragma once

#include "cuda/primitives_sm90.cuh"

namespace nibble::cuda::probe {

// B in shared memory as the copy engine leaves it: 64 rows of 128 bytes.
NIBBLE_DEVICE void place_rows(char* shared, const uint8_t* b) {
    for (int i = threadIdx.x; i < 64 * 128; i += 128)
        shared[i / 128 * 128 + (i % 128 ^ i / 128 % 8 * 16)] = char(b[i]);
}

// A lane's registers of two products of A (64 x 64 bytes).
NIBBLE_DEVICE void read_codes(uint32_t (&codes)[2][4], const uint8_t* a) {
    const int lane = threadIdx.x % 32, first = 16 * (threadIdx.x / 32) + lane / 4;
    for (int half = 0; half < 2; half++)
        for (int i = 0; i < 4; i++)
            codes[half][i] = *reinterpret_cast<const uint32_t*>(
                a + (first + i % 2 * 8) * 64 + half * 32 + i / 2 * 16 + 4 * (lane % 4));
}

// One warpgroup: sums (64 x 64) = a (64 x 64, s8) . b^T, b (64 rows of 128 bytes, s8) read from
// `start` (0 or 64) on.
__global__ void integers(const uint8_t* a, const uint8_t* b, int* sums, int start) {
    char* shared = dynamic_shared();
    place_rows(shared, b);
    product_store_fence();
    sync_block();
    uint32_t codes[2][4];
    read_codes(codes, a);
    int d[32];
    product_fence();
    product_s8_first(d, codes[0], product_operand_swizzled(shared + start));
    product_s8_next(d, codes[1], product_operand_swizzled(shared + start + 32));
    product_commit();
    product_wait<0>();
    product_landed(d);
    const int lane = threadIdx.x % 32, first = 16 * (threadIdx.x / 32) + lane / 4;
    for (int i = 0; i < 32; i++)
        sums[(first + i / 2 % 2 * 8) * 64 + i / 4 * 8 + 2 * (lane % 4) + i % 2] = d[i];
}

// One warpgroup: sums (64 x 64) = a (64 x 64, e4m3) . b^T, b (64 rows of 128 bytes, e4m3) read from
// `start` (0 or 64) on; outer (64 x 64) = weights (64) * tokens (64) as the Hopper product makes
// them: a rank-one product in tf32, each token's scale in three parts.
__global__ void products(const uint8_t* a, const uint8_t* b, const float* weights,
                         const float* tokens, float* sums, float* outer, int start) {
    char* shared = dynamic_shared();
    float4* parts = reinterpret_cast<float4*>(shared + 64 * 128);
    const int thread = threadIdx.x, lane = thread % 32, g = lane / 4, t = lane % 4;
    const int first = 16 * (thread / 32) + g;
    place_rows(shared, b);
    if (thread < 64) {
        const int kept = int(0xFFFFE000);
        const float whole = tokens[thread], high = as_float(as_int(whole) & kept);
        const float rest = whole - high, middle = as_float(as_int(rest) & kept);
        product_store(&parts[thread], {high, middle, rest - middle, 0.f});
    }
    product_store_fence();
    sync_block();

    uint32_t codes[2][4];
    read_codes(codes, a);
    const uint32_t scales[4] = {uint32_t(as_int(weights[first])),
                                uint32_t(as_int(weights[first + 8])), 0, 0};
    float d[32], s[32];
    product_fence();
    product_e4m3_first(d, codes[0], product_operand_swizzled(shared + start));
    product_e4m3_next(d, codes[1], product_operand_swizzled(shared + start + 32));
    product_tf32(s, scales, product_operand_repeated(parts));
    product_commit();
    product_wait<0>();
    product_landed(d);
    product_landed(s);
    for (int i = 0; i < 32; i++) {
        const int row = first + i / 2 % 2 * 8, column = i / 4 * 8 + 2 * t + i % 2;
        sums[row * 64 + column] = d[i];
        outer[row * 64 + column] = s[i];
    }
}

// What the copy engine leaves of a tile in shared memory, byte for byte.
__global__ void copy(const __grid_constant__ TensorMap matrix, uint8_t* out, int bytes, int byte,
                     int row) {
    char* shared = dynamic_shared();
    Barrier* barrier = reinterpret_cast<Barrier*>(shared + 32768);
    if (threadIdx.x == 0) {
        barrier_init(barrier, 1);
        barrier_init_fence();
    }
    sync_block();
    if (threadIdx.x == 0) {
        barrier_expect(barrier, uint32_t(bytes));
        copy_tile(shared, matrix, byte, row, barrier);
        barrier_arrive(barrier);
    }
    barrier_wait(barrier, 0);
    for (int i = threadIdx.x; i < bytes; i += blockDim.x) out[i] = uint8_t(shared[i]);
}

// One warp's product with sums that begin at 7. Kind 0: int4 m16n8k64; 1: four times int4 m8n8k32,
// in the order in which Turing's path uses them; 2: int8 m16n8k32.
template <int Kind, bool Unsigned>
__global__ void multiply(const uint32_t* a, const uint32_t* b, int* sums) {
    const int lane = threadIdx.x;
    const uint32_t x[4] = {a[lane * 4], a[lane * 4 + 1], a[lane * 4 + 2], a[lane * 4 + 3]};
    const uint32_t y[2] = {b[lane * 2], b[lane * 2 + 1]};
    const int c[4] = {7, 7, 7, 7};
    int d[4];
    if constexpr (Kind == 0) {
        mma_s4_k64<Unsigned>(d, x, y, c);
    } else if constexpr (Kind == 1) {
        mma_s4_k32<Unsigned>(d[0], d[1], x[0], y[0], c[0], c[1]);
        mma_s4_k32<Unsigned>(d[2], d[3], x[1], y[0], c[2], c[3]);
        mma_s4_k32<Unsigned>(d[0], d[1], x[2], y[1], d[0], d[1]);
        mma_s4_k32<Unsigned>(d[2], d[3], x[3], y[1], d[2], d[3]);
    } else {
        mma_s8_k32<Unsigned>(d, x, y, c);
    }
    for (int i = 0; i < 4; i++) sums[lane * 4 + i] = d[i];
}

// Four 8 x 8 matrices of 16-bit numbers, a register of each a lane, stored transposed.
template <int Matrices>
__global__ void transpose(const uint32_t* in, uint16_t* out) {
    static_assert(Matrices == 4);
    char* shared = dynamic_shared();
    const int lane = threadIdx.x;
    const uint32_t r[4] = {in[lane * 4], in[lane * 4 + 1], in[lane * 4 + 2], in[lane * 4 + 3]};
    store_matrix_x4_transposed(shared + lane * 16, r);
    sync_warp();
    for (int i = lane; i < 256; i += 32) out[i] = reinterpret_cast<uint16_t*>(shared)[i];
}

}  // namespace nibble::cuda::probe
