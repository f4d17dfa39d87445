// What a GPU can do at most, where no library shows it: reads from the second-level cache, and
// 8-bit products by mma.sync.
#pragma once

#include "cuda/primitives.cuh"

namespace nibble::cuda::ceilings {

// Reads `count` units of 16 bytes `rounds` times, past the first-level cache: each round every
// thread reads what another one read before.
template <int Threads>
__global__ void __launch_bounds__(Threads)
    read(const uint4* from, long long count, int rounds, uint32_t* out) {
    uint32_t seen = 0;
    const long long all = (long long)gridDim.x * Threads;
    for (int round = 0; round < rounds; round++) {
        const long long begin = (blockIdx.x + 37LL * round) % gridDim.x * Threads + threadIdx.x;
#pragma unroll 8
        for (long long i = begin; i < count; i += all) {
            const uint4 unit = __ldcg(from + i);
            seen ^= unit.x ^ unit.y ^ unit.z ^ unit.w;
        }
    }
    if (seen == 0x12345678) *out = seen;  // so that nothing is left out
}

// Every warp multiplies `rounds` times eight m16n8k32 products, which wait for none of each other.
template <int Threads>
__global__ void __launch_bounds__(Threads) multiply(int rounds, int* out) {
    const uint32_t seed = threadIdx.x * 2654435761u;
    const uint32_t a[4] = {seed, seed ^ 0x9E3779B9, seed ^ 0x85EBCA6B, seed ^ 0xC2B2AE35};
    const uint32_t b[2] = {seed ^ 0x27D4EB2F, seed ^ 0x165667B1};
    int d[8][4] = {};
    for (int round = 0; round < rounds; round++) {
#pragma unroll
        for (int i = 0; i < 8; i++) mma_s8_k32<false>(d[i], a, b, d[i]);
    }
    int sum = 0;
#pragma unroll
    for (int i = 0; i < 8; i++) sum += d[i][0] + d[i][1] + d[i][2] + d[i][3];
    if (sum == 0x12345678) *out = sum;
}

}  // namespace nibble::cuda::ceilings
