// sums += h . proj_up^T + bias, behind the product: the column's scale is not the low-rank
// branch's, so it cannot be what the sums begin with, as it is for integers.
#pragma once

#include "../gemm_w4a4/lowrank.cuh"

namespace nibble::cuda {

// h is rounded to the parameters' dtype, as the layer's output will be. float16 cannot hold every
// h, so its rows are first divided by a power of two near their largest element, and what the sums
// hold already with them. No power is below 2^-40: numbers of the output's size stay finite.
template <class Tp, class Tile>
NIBBLE_DEVICE void add_low_rank_by_mma(float (&sums)[Tile::MT][Tile::NT][4],
                                       const Share<Tp, Tile>& at) {
    constexpr bool SCALE = same<Tp, f16>;
    const bool even_h = at.h_stride % 2 == 0, even_up = at.R % 2 == 0;
#pragma unroll
    for (int i = 0; i < Tile::MT; i++) {
        float power[2] = {1.f, 1.f};
        if constexpr (SCALE)
#pragma unroll
            for (int half = 0; half < 2; half++) {
                const int row = 2 * i + half;
                power[half] = fmaxf(
                    power_of_row(at.h + row * at.h_stride, at.length_of_row(row), at.t), 0x1p-40f);
#pragma unroll
                for (int j = 0; j < Tile::NT; j++)
#pragma unroll
                    for (int n = 0; n < 2; n++)
                        sums[i][j][2 * half + n] *= inverse_of_power(power[half]);
            }
#pragma unroll 1
        for (int first = 0; first < at.R; first += 16) {
            const int r = first + 2 * at.t;
            uint32_t a[4];
#pragma unroll
            for (int part = 0; part < 4; part++) {  // registers of A: the row's half changes first
                const int row = 2 * i + part % 2;
                const Pair h = pair_of(at.h + row * at.h_stride, r + 8 * (part / 2),
                                       at.length_of_row(row), even_h);
                const float unit = SCALE ? inverse_of_power(power[part % 2]) : 1.f;
                a[part] = pack2<Tp>(h.first * unit, h.second * unit);
            }
#pragma unroll
            for (int j = 0; j < Tile::NT; j++) {
                uint32_t b[2];
#pragma unroll
                for (int half = 0; half < 2; half++)
                    b[half] = bits_of(at.operand + 2 * j * at.R, r + 8 * half,
                                      at.length_of_operand(j), even_up);
                sync_warp();  // lanes part ways at the edges above
                mma_16bit<Tp>(sums[i][j], a, b);
            }
        }
        if constexpr (SCALE)
#pragma unroll
            for (int j = 0; j < Tile::NT; j++)
#pragma unroll
                for (int e = 0; e < 4; e++) sums[i][j][e] *= power[e / 2];
    }
}

// sums = sums * scale + h . proj_up^T + bias for the warp's share; scale: of the lane's first
// column.
template <class Tp, class Tile, class Scale>
NIBBLE_DEVICE void finish_sums(float (&sums)[Tile::MT][Tile::NT][4], const Scale* scale,
                               const Share<Tp, Tile>& at, bool by_mma) {
#pragma unroll
    for (int j = 0; j < Tile::NT; j++)
#pragma unroll
        for (int n = 0; n < 2; n++) {
            const float by = 2 * j + n < at.columns ? to_float(scale[2 * j + n]) : 0.f;
#pragma unroll
            for (int i = 0; i < Tile::MT; i++)
#pragma unroll
                for (int half = 0; half < 2; half++) sums[i][j][2 * half + n] *= by;
        }
    if (by_mma)
        add_low_rank_by_mma<Tp, Tile>(sums, at);
    else
        low_rank_by_fma<Tp, Tile>(sums, at);
    add_bias<Tp, Tile>(sums, at);
}

}  // namespace nibble::cuda
