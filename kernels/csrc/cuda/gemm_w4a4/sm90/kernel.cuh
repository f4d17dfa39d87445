// out = (codes . W^T, rescaled per group of 64) + h . proj_up^T + bias on Hopper (sm_90a).
//
// Hopper multiplies no int4. int4 values are exact in e4m3, and its e4m3 product keeps the sum of a
// group (|sum| <= 7680) exact in float32 registers, so what remains is to scale group sums by
// ascales[g, m] * weight_scale[g, n]. On 4096 8-bit multiply-adds a clock come 128 float32 lanes:
// two instructions an element and group (times one scale, fused multiply-add with the other) would
// fill every issue slot, and reading a thread's column scales would fill the shared memory's width
// as well. So the tensor core makes the scales' products too: a product of rank one in tf32 gives
// s[n, m] = weight_scale[g, n] * ascales[g, m] where the sums lie, and one instruction remains:
//
//     d = W_g . X_g^T  (e4m3, 64 columns: 64 clocks a 64 x 64 chunk)    s = ws_g . as_g^T  (tf32:
//     32 clocks)    acc += d * s
//
// Activations of 8 bits do not fit e4m3. Their product is the same on integers (s8, 64 clocks as
// well); its exact sums of 32 bits (|16 sum| <= 1040384) become floats by one instruction more an
// element, which the issue slots just take: 100 instructions a warp in the chunk's 96 clocks.
//
// ascales has 24 significant bits and tf32 has 11, so it comes in three exact terms, in three of
// the eight places along k.
//
// The product is computed transposed: weights are A, whose 4-bit codes each thread decodes straight
// into its registers, and activations are B, which shared memory holds as the copy engine brings
// them. A block has a tile of 128 * Blocks weight rows by Tokens; one warpgroup loads and two
// compute, each with half of the rows. A computing warpgroup has one chunk in flight and then adds
// it; meanwhile the other's chunk runs. Blocks stay on their multiprocessor and take tile after
// tile, so that loading never stops.
#pragma once

#include "finish.cuh"
#include "operand.cuh"
#include "tile.cuh"

namespace nibble::cuda {
namespace sm90 {

// ---- computing ----------------------------------------------------------------------------------

// `always` is not zero. The compiler does not know that, and so does not move the decoding from
// behind that branch to after the wait, where it would not overlap the product.
template <Codes FORMAT, class Shape, int Blocks>
NIBBLE_DEVICE void multiply(Sums<Blocks, Shape::chunks>& acc, const char* shared, Barrier* full,
                            Barrier* empty, Ring& ring, int steps, int row, int always) {
    constexpr int OPERANDS = 2 * Blocks;
    Operand a[2];
    const typename Format<FORMAT>::template Reader<Shape> read(row);
    typename Format<FORMAT>::Sum d[32];
    float s[32];
    barrier_wait(&full[ring.stage], ring.parity);
    read(a[0], shared + ring.stage * Shape::stage, 0, 0);
    for (int step = 0; step < steps; step++) {
        const char* stage = shared + ring.stage * Shape::stage;
        Barrier* free = &empty[ring.stage];
        ring.advance();
#pragma unroll
        for (int i = 0; i < OPERANDS; i++)
#pragma unroll
            for (int chunk = 0; chunk < Shape::chunks; chunk++) {
                const int group = i / Blocks, block = i % Blocks;
                const char* tokens = stage + chunk * CHUNK * STEP + group * GROUP;
                const char* ascales =
                    stage + Shape::ascales_at + (group * Shape::tokens + chunk * CHUNK) * 16;
                product_fence();
                Format<FORMAT>::first(d, a[i % 2].codes[0], product_operand_swizzled(tokens));
                Format<FORMAT>::next(d, a[i % 2].codes[1], product_operand_swizzled(tokens + 32));
                product_tf32(s, a[i % 2].scales, product_operand_repeated(ascales));
                product_commit();
                if (chunk == Shape::chunks - 1) {  // while that runs
                    if (i + 1 < OPERANDS) {
                        if (always) read(a[(i + 1) % 2], stage, (i + 1) / Blocks, (i + 1) % Blocks);
                    } else if (step + 1 < steps) {
                        barrier_wait(&full[ring.stage], ring.parity);
                        read(a[0], shared + ring.stage * Shape::stage, 0, 0);
                    }
                }
                product_wait<0>();
                product_landed(d);
                product_landed(s);
                if (i == OPERANDS - 1 && chunk == Shape::chunks - 1) {
                    sync_warp();
                    if (threadIdx.x % 32 == 0) barrier_arrive(free);
                }
#pragma unroll
                for (int e = 0; e < 32; e++)
                    acc[block][chunk][e] = fmaf(float(d[e]), s[e], acc[block][chunk][e]);
                product_landed(acc[block][chunk]);
            }
    }
}

template <Codes FORMAT, class Shape, int Blocks, class Param>
NIBBLE_DEVICE void compute(char* shared, Barrier* full, Barrier* empty,
                           const Parameters<Param>& p) {
    constexpr int CHUNKS = Shape::chunks;
    const int group = threadIdx.x / WARPGROUP - 1, warp = threadIdx.x % WARPGROUP / 32,
              steps = (p.K / GROUP + 1) / 2;
    char* staging = shared + STAGES * Shape::stage + group * Shape::staging;
    Ring ring;
    for (int tile = blockIdx.x; tile < p.tiles; tile += gridDim.x) {
        const int row0 = tile % p.across * Shape::rows, token = tile / p.across * Shape::tokens;
        const int in_tile = group * Shape::group_rows + 16 * warp, row = row0 + in_tile;
        float acc[Blocks][CHUNKS][32] = {};
        if (steps)
            multiply<FORMAT, Shape, Blocks>(acc, shared, full, empty, ring, steps, in_tile,
                                            p.across);
        if (p.out_dtype == Dtype::f32) {
            add_low_rank_float<Blocks, CHUNKS>(acc, p, row, token);
            add_bias<Blocks, CHUNKS>(acc, p, row);
            write_float<Blocks, CHUNKS>(acc, p, row, token);
        } else {
            add_low_rank<Blocks, CHUNKS>(acc, p, row, token);
            add_bias<Blocks, CHUNKS>(acc, p, row);
            if (p.out_dtype == Dtype::bf16)
                write<bf16, Blocks, CHUNKS>(acc, p, staging, row0 + group * Shape::group_rows,
                                            token);
            else
                write<f16, Blocks, CHUNKS>(acc, p, staging, row0 + group * Shape::group_rows,
                                           token);
        }
    }
}

// Registers: 65536 / 384 threads is 168 at the start; the loading warpgroup leaves most of its own
// to the computing ones, which hold 128 sums, d and s of a chunk (64) and two operands (24). Of the
// smaller tiles they hold 64 sums or 32, so there the loading one keeps more.
template <Codes FORMAT, class Param, int Blocks, int Tokens>
__global__ void __launch_bounds__(THREADS, 1)
    gemm_kernel(const __grid_constant__ TensorMap tokens, const __grid_constant__ TensorMap weights,
                const Parameters<Param> p) {
    using Shape = Tile<Blocks, Tokens>;
    char* shared = dynamic_shared();
    Barrier *full = reinterpret_cast<Barrier*>(shared + Shape::barriers_at), *empty = full + STAGES;
    if (threadIdx.x == 0) {
        for (int i = 0; i < STAGES; i++) {
            barrier_init(&full[i], WARPGROUP);            // every loading thread
            barrier_init(&empty[i], 2 * WARPGROUP / 32);  // every computing warp
        }
        barrier_init_fence();
    }
    sync_block();
    wait_for_previous_kernel();
    if (threadIdx.x < WARPGROUP) {
        registers_release<Blocks == 2 ? 24 : 40>();
        load<Shape, Format<FORMAT>::UNIT>(shared, full, empty, tokens, weights, p);
    } else {
        registers_claim<Blocks == 2 ? 240 : 232>();
        compute<FORMAT, Shape, Blocks>(shared, full, empty, p);
    }
}

// ---- packed codes -------------------------------------------------------------------------------

// 32 columns a thread: packed nibbles -> e4m3 in the order that nibble.h gives. `across`: such
// blocks in a row, of which those before `signed_blocks` hold signed codes.
template <bool Unsigned>
__global__ void widen_kernel(const uint4* packed, uint4* wide, int64_t blocks, int across,
                             int signed_blocks) {
    wait_for_previous_kernel();
    for (int64_t i = blockIdx.x * int64_t(blockDim.x) + threadIdx.x; i < blocks;
         i += int64_t(gridDim.x) * blockDim.x) {
        const uint4 from = packed[i];
        const uint32_t words[4] = {from.x, from.y, from.z, from.w};
        uint32_t low[4], high[4];
#pragma unroll
        for (int w = 0; w < 4; w++) {
            if (Unsigned && i % across >= signed_blocks) {  // the second table is 8..15
                const uint32_t flipped = words[w] ^ 0x88888888;
                low[w] = permute_bytes(0x44403800, 0x4E4C4A48, words[w]) +
                         permute_bytes(0x53525150, 0x57565554, flipped);
                high[w] = permute_bytes(0x44403800, 0x4E4C4A48, words[w] >> 16) +
                          permute_bytes(0x53525150, 0x57565554, flipped >> 16);
            } else {
                Decoder()(words[w], low[w], high[w]);
            }
        }
        wide[2 * i] = {low[0], low[1], low[2], low[3]};
        wide[2 * i + 1] = {high[0], high[1], high[2], high[3]};
    }
}

}  // namespace sm90
}  // namespace nibble::cuda
