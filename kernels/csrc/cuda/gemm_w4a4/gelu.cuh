// The epilogue between the two linears of an MLP: y = sums, rounded as the first layer's output;
// GELU(y) is smoothed, rotated and quantized for the second layer and multiplied by its proj_down,
// all without leaving the registers. Formulas: reference.quantize_down.
//
// A warp's share is 64 columns wide: one group, of which the four lanes of a row hold 16 columns
// each. What GELU(y) . proj_down sums over the 128 columns of a tile goes to the workspace; a
// second small kernel adds the tiles up, in one order.
#pragma once

#include "kernel.cuh"

namespace nibble::cuda {

// 0.5 x (1 + tanh(u)) = x / (1 + exp(-2u)), u = sqrt(2 / pi) (x + 0.044715 x^3): without the
// cancellation of 1 + tanh where x is negative.
NIBBLE_DEVICE float gelu_tanh(float x) {
    const float u = 0.7978845608f * fmaf(0.044715f * x * x, x, x);
    return x / (1.f + expf(-2.f * u));
}

// One row's 16 values in each of four lanes -> the group's scale and this lane's codes, as floats.
// wide: of 8 bits, which hold both signs; of unsigned ones the shift remains.
NIBBLE_DEVICE float quantize_row(float (&v)[16], const float (&smooth)[16], bool shift, bool rotate,
                                 bool wide, int t) {
    const bool is_unsigned = shift && !wide;
#pragma unroll
    for (int c = 0; c < 16; c++) v[c] = (shift ? v[c] + SHIFT : v[c]) / smooth[c];
    if (rotate) {  // butterflies: four of the column's six bits are the place in the lane, two the
                   // lane
#pragma unroll
        for (int bit = 1; bit < 16; bit *= 2)
#pragma unroll
            for (int c = 0; c < 16; c++)
                if (!(c & bit)) {
                    const float sum = v[c] + v[c | bit], difference = v[c] - v[c | bit];
                    v[c] = sum, v[c | bit] = difference;
                }
#pragma unroll
        for (int bit = 1; bit < 4; bit *= 2)
#pragma unroll
            for (int c = 0; c < 16; c++)
                v[c] = fmaf(t & bit ? -1.f : 1.f, v[c], shuffle_xor(v[c], bit));
#pragma unroll
        for (int c = 0; c < 16; c++) v[c] *= 0.125f;
    }
    float largest = 0;
#pragma unroll
    for (int c = 0; c < 16; c++) largest = max_or_nan(largest, is_unsigned ? v[c] : fabsf(v[c]));
    largest = max_or_nan(largest, shuffle_xor(largest, 1));
    largest = max_or_nan(largest, shuffle_xor(largest, 2));
    const float scale = largest / (wide          ? 127.f
                                   : is_unsigned ? 15.f
                                                 : 7.f),
                divisor = max_or_nan(scale, 0x1p-126f);
#pragma unroll
    for (int c = 0; c < 16; c++) {
        const float code = rintf(v[c] / divisor);
        v[c] = code != code ? 0.f : is_unsigned ? fmaxf(code, 0.f) : code;
    }
    return scale;
}

template <class Mma, class Tp>
struct GeluQuantizeDown {
    GemmW4A4UpGeluQuantizeDown op;  // op.first is the product's own argument

    // For 16 rows of each warp the sums of 64 columns of h.
    static constexpr int H_COLUMNS = 64, H_ROW = H_COLUMNS + 4;
    template <class T>
    static constexpr int shared_bytes() {
        return 2 * 16 * H_ROW * int(sizeof(float));
    }

    template <class T>
    NIBBLE_DEVICE void finish(float (&sums)[T::MT][T::NT][4], const GemmW4A4Up& first,
                              Corner corner, int thread, char* shared) const {
        const int t = thread % 4, g = thread / 4 % 8;
        const int64_t group_column = corner.column + T::first_column(thread),
                      column = group_column + 16 * t;
        const bool present =
            group_column <
            first
                .N;  // N is a multiple of 64: a tile's second half may be missing, and nothing less
        const int64_t tile = corner.column / COLUMNS;
        sync_block();  // everybody is done with the ring, where sums of h pass now
#pragma unroll 1
        for (int i = 0; i < T::MT; i++) {
            float v[2][16];
#pragma unroll
            for (int half = 0; half < 2; half++)
#pragma unroll
                for (int c = 0; c < 16; c++)
                    v[half][c] =
                        gelu_tanh(rounded(sums[0][c / 2][2 * half + c % 2], first.out_dtype));
            const int row = corner.row + T::first_row(thread) + T::row_of(g, 0, 0) +
                            2 * i;  // v[1] is the next one
            if (op.R2)
                multiply_down(v, first, tile, row, column, present, thread,
                              reinterpret_cast<float*>(shared));
            if (present) {  // the same for a whole warp
                float smooth[16];
#pragma unroll
                for (int c = 0; c < 16; c++)
                    smooth[c] = to_float(static_cast<const Tp*>(op.smooth2)[column + c]);
#pragma unroll
                for (int half = 0; half < 2; half++) {
                    const float scale = quantize_row(v[half], smooth, op.act_unsigned2, op.rotate2,
                                                     op.codes2 == Codes::int8, t);
                    if (row + half < first.M) {
                        if (t == 0)
                            op.ascales2[group_column / GROUP * first.M + row + half] = scale;
                        store_codes(v[half], (row + half) * first.N + column);
                    }
                }
            }
            // The next rows take the place of these: the code above exists once, where indexing
            // registers would need it MT times.
#pragma unroll
            for (int next = 1; next < T::MT; next++)
#pragma unroll
                for (int j = 0; j < T::NT; j++)
#pragma unroll
                    for (int e = 0; e < 4; e++) sums[next - 1][j][e] = sums[next][j][e];
        }
    }

private:
    NIBBLE_DEVICE static float rounded(float x, Dtype dtype) {
        return dtype == Dtype::bf16  ? to_float(from_float<bf16>(x))
               : dtype == Dtype::f16 ? to_float(from_float<f16>(x))
                                     : x;
    }

    NIBBLE_DEVICE void store_codes(const float (&codes)[16], int64_t at) const {
        uint32_t words[4] = {0, 0, 0, 0};
        if (op.codes2 == Codes::packed) {
#pragma unroll
            for (int c = 0; c < 16; c++)
                words[c / 8] |= (uint32_t(int(codes[c])) & 15) << (4 * (c % 8));
            *reinterpret_cast<uint2*>(static_cast<uint8_t*>(op.q2) + at / 2) = {words[0], words[1]};
        } else if (op.codes2 == Codes::int8) {
#pragma unroll
            for (int c = 0; c < 16; c++)
                words[c / 4] |= (uint32_t(int(codes[c])) & 255) << (8 * (c % 4));
            *reinterpret_cast<uint4*>(static_cast<uint8_t*>(op.q2) + at) = {words[0], words[1],
                                                                            words[2], words[3]};
        } else {
#pragma unroll
            for (int c = 0; c < 16; c += 2)
                words[c / 4] |= uint32_t(pack2_e4m3(codes[c], codes[c + 1])) << (8 * (c % 4));
            // Of every eight columns the first four go to the lower half of a block of 32 bytes,
            // the last four to the upper (see Codes::e4m3).
            uint8_t* to = static_cast<uint8_t*>(op.q2) + (at & ~int64_t(31)) + (at & 16) / 2;
            *reinterpret_cast<uint2*>(to) = {words[0], words[2]};
            *reinterpret_cast<uint2*>(to + 16) = {words[1], words[3]};
        }
    }

    // workspace[tile, rows, :] = v . proj_down2, for 16 rows of each warp; `row` is the first of
    // the lane's two.
    NIBBLE_DEVICE void multiply_down(const float (&v)[2][16], const GemmW4A4Up& first, int64_t tile,
                                     int row, int64_t column, bool present, int thread,
                                     float* shared) const {
        const int t = thread % 4, g = thread / 4 % 8, R2 = int(op.R2);
        const bool second =
            thread / 32 %
            2;  // the warp of the tile's columns 64..127: its sums are added to the first one's
        const bool both = (tile + 1) * COLUMNS <= first.N;
        float* partial = static_cast<float*>(op.workspace) + tile * first.M * R2;
        float* mine = shared + thread / 64 * 16 * H_ROW + 2 * g * H_ROW;
        // Products of GELU(y) rounded to the parameters' dtype, as a layer of that dtype would have
        // them; else, and for bfloat16 on Turing, fp32 throughout.
        const bool by_mma = first.out_dtype == dtype_of<Tp>() && (Mma::BFLOAT16 || same<Tp, f16>);
#pragma unroll 1
        for (int chunk = 0; chunk < R2; chunk += H_COLUMNS) {
#pragma unroll 1
            for (int r = chunk; r < chunk + H_COLUMNS && r < R2; r += 8) {
                float h[4] = {0, 0, 0, 0};  // rows 0 and 1, columns r + 2t and r + 2t + 1
                if (present && by_mma)
                    by_matrix_unit(h, v, column, r, R2, g);
                else if (present)
                    by_lanes(h, v, column, r, R2, t);
                // The second warp's sums pass shared memory. Each chunk's have places of their own,
                // so one barrier a round is enough.
                if (second)
                    for (int e = 0; e < 4; e++)
                        mine[e / 2 * H_ROW + r - chunk + 2 * t + e % 2] = h[e];
                sync_block();
                for (int e = 0; e < 4; e++) {
                    const int at = r + 2 * t + e % 2;
                    if (!second && row + e / 2 < first.M && at < R2)
                        partial[int64_t(row + e / 2) * R2 + at] =
                            h[e] + (both ? mine[e / 2 * H_ROW + r - chunk + 2 * t + e % 2] : 0.f);
                }
            }
            sync_block();
        }
    }

    // Sums of 64 columns as four products: what a lane holds of v is its part of A, if the columns
    // are taken in the order of lanes.
    NIBBLE_DEVICE void by_matrix_unit(float (&h)[4], const float (&v)[2][16], int64_t column, int r,
                                      int R2, int g) const {
        constexpr bool SCALE = same<Tp, f16>;
        float power[2] = {1, 1};
        if constexpr (SCALE)
#pragma unroll
            for (int half = 0; half < 2; half++) {
                float largest = 0;
#pragma unroll
                for (int c = 0; c < 16; c++) largest = fmaxf(largest, fabsf(v[half][c]));
                largest = fmaxf(largest, shuffle_xor(largest, 1));
                power[half] = power_below(fmaxf(largest, shuffle_xor(largest, 2)));
            }
        const Tp* down = static_cast<const Tp*>(op.proj_down2) + column * R2 + r + g;
        const bool exists = r + g < R2;
#pragma unroll
        for (int s = 0; s < 4; s++) {
            uint32_t a[4], b[2];
#pragma unroll
            for (int part = 0; part < 4; part++) {
                const int half = part % 2, c = 4 * s + part / 2 * 2;
                const float unit = SCALE ? inverse_of_power(power[half]) : 1.f;
                a[part] = pack2<Tp>(v[half][c] * unit, v[half][c + 1] * unit);
            }
#pragma unroll
            for (int k = 0; k < 2; k++) {
                const Tp* two = down + (4 * s + 2 * k) * R2;
                b[k] = exists ? uint32_t(two[0].bits) | uint32_t(two[R2].bits) << 16 : 0;
            }
            sync_warp();  // lanes part ways where columns of h end
            mma_16bit<Tp>(h, a, b);
        }
#pragma unroll
        for (int e = 0; e < 4; e++) h[e] *= power[e / 2];
    }

    NIBBLE_DEVICE void by_lanes(float (&h)[4], const float (&v)[2][16], int64_t column, int r,
                                int R2, int t) const {
#pragma unroll 1
        for (int at = 0; at < 8; at++) {
            float sum[2] = {0, 0};
            const Tp* down = static_cast<const Tp*>(op.proj_down2) + column * R2 +
                             (r + at < R2 ? r + at : R2 - 1);
#pragma unroll
            for (int c = 0; c < 16; c++) {
                const float factor = to_float(down[c * R2]);
                sum[0] = fmaf(v[0][c], factor, sum[0]), sum[1] = fmaf(v[1][c], factor, sum[1]);
            }
#pragma unroll
            for (int half = 0; half < 2; half++) {
                sum[half] += shuffle_xor(sum[half], 1);
                sum[half] += shuffle_xor(sum[half], 2);
                if (at / 2 == t) at % 2 ? h[2 * half + 1] = sum[half] : h[2 * half] = sum[half];
            }
        }
    }
};

// h2 = the tiles' sums, added up in their order.
template <class Mma>
__global__ void __launch_bounds__(256)
    add_tiles(const float* partial, float* h, int64_t count, int tiles) {
    const int64_t at = int64_t(blockIdx.x) * 256 + threadIdx.x;
    if (at >= count) return;
    float sum = 0;
    for (int tile = 0; tile < tiles; tile++) sum += partial[tile * count + at];
    h[at] = sum;
}

}  // namespace nibble::cuda
