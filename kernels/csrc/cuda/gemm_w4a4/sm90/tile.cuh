// What the warpgroups of kernel.cuh share: the tile, the ring of stages, and the warpgroup
// that fills it.
#pragma once

#include "../../../nibble.h"
#include "../../primitives_sm90.cuh"

namespace nibble::cuda::sm90 {

constexpr int STEP = 128;  // columns of K that a stage holds: two groups; of an odd number of
                           // groups the last is zeros
constexpr int STAGES = 4;
constexpr int CHUNK = 64;  // tokens of one product
constexpr int WARPGROUP = 128;
constexpr int THREADS = 3 * WARPGROUP;

template <int Blocks, int Tokens>
struct Tile {
    static constexpr int rows = 2 * 64 * Blocks, group_rows = 64 * Blocks, tokens = Tokens,
                         chunks = Tokens / CHUNK;
    // One stage: activations (Tokens rows of 128 bytes), weights (rows of 64 bytes), both as the
    // copy engine swizzles them, ascales of two groups in tf32 terms (16 bytes a token),
    // weight_scale of two groups in float32.
    static constexpr int weights_at = Tokens * STEP, ascales_at = weights_at + rows * STEP / 2,
                         wscales_at = ascales_at + 2 * Tokens * 16;
    static constexpr int stage = wscales_at + 2 * rows * 4, copied = ascales_at;
    static constexpr int staging =
        CHUNK * group_rows * 2;  // a warpgroup's chunk of 16-bit results on the way out
    static constexpr int barriers_at = STAGES * stage + 2 * staging,
                         shared = barriers_at + 2 * STAGES * int(sizeof(Barrier));
    static_assert(stage % 1024 == 0 && staging % 1024 == 0 && shared <= 227 * 1024);
};

template <class Param>
struct Parameters {
    int M, N, K, R;
    int across, tiles;  // along N, and all; they follow one another along N, so that blocks that
                        // run together share activations in L2
    const float* ascales;
    const float* h;
    int64_t h_stride;
    const Param *weight_scale, *proj_up, *bias;
    void* out;
    Dtype out_dtype;
    bool paired;  // rows of h and proj_up may be read two neighbours at a time
};

struct Ring {
    int stage = 0;
    uint32_t parity = 0;
    NIBBLE_DEVICE void advance() {
        if (++stage == STAGES) stage = 0, parity ^= 1;
    }
};

// x = {first, second, third, 0}, each with at most 11 significant bits and first + second + third
// == x exactly.
NIBBLE_DEVICE float4 tf32_terms(float x) {
    constexpr int KEPT = int(0xFFFFE000);
    float first = as_float(as_int(x) & KEPT), rest = x - first,
          second = as_float(as_int(rest) & KEPT);
    return {first, second, rest - second, 0.0f};
}

// ---- loading ------------------------------------------------------------------------------------

// A loading thread's scales of one step, as they lie in memory.
template <class Shape, class Param>
class ScaleReader {
    static constexpr int ASCALES = 2 * Shape::tokens / WARPGROUP,
                         WSCALES = 2 * Shape::rows / WARPGROUP;

public:
    // Scales of step `step` of the tile at (row0, token0); zeros where there are none.
    NIBBLE_DEVICE void read(const Parameters<Param>& p, int step, int row0, int token0) {
        const int thread = threadIdx.x % WARPGROUP, groups = p.K / GROUP;
        const float* ascales_from = p.ascales + int64_t(2 * step) * p.M + token0;
        const Param* wscales_from = p.weight_scale + int64_t(2 * step) * p.N + row0;
#pragma unroll
        for (int i = 0; i < ASCALES; i++) {
            const int at = thread + i * WARPGROUP, group = at / Shape::tokens,
                      token = at % Shape::tokens;
            ascale_[i] = 2 * step + group < groups && token < p.M - token0
                             ? (ascales_from + group * int64_t(p.M))[token]
                             : 0.0f;
        }
#pragma unroll
        for (int i = 0; i < WSCALES; i++) {
            const int at = thread + i * WARPGROUP, group = at / Shape::rows, row = at % Shape::rows;
            wscale_[i] = 2 * step + group < groups && row < p.N - row0
                             ? (wscales_from + group * int64_t(p.N))[row]
                             : Param{0};
        }
    }
    // Codes of weights are multiplied as Unit * code.
    template <int Unit>
    NIBBLE_DEVICE void store(char* stage) const {
        const int thread = threadIdx.x % WARPGROUP;
        float4* ascales = reinterpret_cast<float4*>(stage + Shape::ascales_at);
        float* wscales = reinterpret_cast<float*>(stage + Shape::wscales_at);
#pragma unroll
        for (int i = 0; i < ASCALES; i++)
            product_store(&ascales[thread + i * WARPGROUP], tf32_terms(ascale_[i]));
#pragma unroll
        for (int i = 0; i < WSCALES; i++)
            wscales[thread + i * WARPGROUP] = to_float(wscale_[i]) * (1.0f / Unit);
    }

private:
    float ascale_[ASCALES];
    Param wscale_[WSCALES];
};

template <class Shape, int Unit, class Param>
NIBBLE_DEVICE void load(char* shared, Barrier* full, Barrier* empty, const TensorMap& tokens,
                        const TensorMap& weights, const Parameters<Param>& p) {
    // A step of the smaller tiles is computed in less time than scales are on their way, so there
    // the next step's are asked for before these are waited for.
    constexpr bool AHEAD = Shape::rows == 128;
    const int steps = (p.K / GROUP + 1) / 2;
    Ring ring;
    for (int tile = blockIdx.x; tile < p.tiles; tile += gridDim.x) {
        const int row0 = tile % p.across * Shape::rows, token0 = tile / p.across * Shape::tokens;
        ScaleReader<Shape, Param> scales;
        if (AHEAD && steps) scales.read(p, 0, row0, token0);
        for (int step = 0; step < steps; step++, ring.advance()) {
            // Before the stage is free, so that the way to memory overlaps the wait.
            if (!AHEAD) scales.read(p, step, row0, token0);
            char* stage = shared + ring.stage * Shape::stage;
            barrier_wait(&empty[ring.stage], ring.parity ^ 1);
            // The copy engine first: the scales may still be on their way.
            if (threadIdx.x == 0) {
                barrier_expect(&full[ring.stage], Shape::copied);
                copy_tile(stage, tokens, step * STEP, token0, &full[ring.stage]);
                copy_tile(stage + Shape::weights_at, weights, step * (STEP / 2), row0,
                          &full[ring.stage]);
            }
            const ScaleReader<Shape, Param> here = scales;
            if (AHEAD && step + 1 < steps) scales.read(p, step + 1, row0, token0);
            here.template store<Unit>(stage);
            product_store_fence();
            barrier_arrive(&full[ring.stage]);
        }
    }
}

}  // namespace nibble::cuda::sm90
