// The plain epilogue: out = sums, rounded. A lane's columns are neighbours, so rows go out in 16
// bytes a lane, 64 or more a row.
#pragma once

#include "kernel.cuh"

namespace nibble::cuda {

struct Store {
    template <class T>
    static constexpr int shared_bytes() {
        return 0;
    }

    template <class T>
    NIBBLE_DEVICE void finish(const float (&sums)[T::MT][T::NT][4], const GemmW4A4Up& op,
                              Corner corner, int thread, char*) const {
        const int g = thread / 4 % 8, row = corner.row + T::first_row(thread);
        const int column = corner.column + T::first_column(thread) + T::column_of(thread % 4, 0, 0);
        if (op.out_dtype == Dtype::bf16)
            write<T, bf16>(sums, op, row, column, g);
        else if (op.out_dtype == Dtype::f16)
            write<T, f16>(sums, op, row, column, g);
        else
            write<T, float>(sums, op, row, column, g);
    }

private:
    template <class T, class Out>
    NIBBLE_DEVICE static void write(const float (&sums)[T::MT][T::NT][4], const GemmW4A4Up& op,
                                    int row, int column, int g) {
        const int64_t N = op.N;
        const bool whole =
            N % (2 * T::NT) ==
            0;  // rows begin where wide stores may, and a lane's columns exist all or not at all
#pragma unroll
        for (int i = 0; i < T::MT; i++)
#pragma unroll
            for (int half = 0; half < 2; half++) {
                const int64_t m = row + T::row_of(g, i, half);
                if (m >= op.M || column >= N) continue;
                Out* out = static_cast<Out*>(op.out) + m * N + column;
                alignas(16) Out values[2 * T::NT];
#pragma unroll
                for (int j = 0; j < T::NT; j++)
#pragma unroll
                    for (int n = 0; n < 2; n++)
                        values[2 * j + n] = from_float<Out>(sums[i][j][2 * half + n]);
                if (whole) {
                    store_wide(out, values);
                } else {
#pragma unroll
                    for (int n = 0; n < 2 * T::NT; n++)
                        if (column + n < N) out[n] = values[n];
                }
            }
    }

    template <class Out, int Count>
    NIBBLE_DEVICE static void store_wide(Out* to, const Out (&values)[Count]) {
#pragma unroll
        for (int w = 0; w < int(sizeof(values) / sizeof(uint4)); w++)
            reinterpret_cast<uint4*>(to)[w] = reinterpret_cast<const uint4*>(values)[w];
    }
};

}  // namespace nibble::cuda
