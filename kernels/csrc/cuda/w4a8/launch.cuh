// From an op's struct to the instance of its product.
#pragma once

#include "../launch.cuh"
#include "gemm.cuh"
#include "w4a8.h"

namespace nibble::cuda::w4a8 {

template <bool TURING, class Tp, int Rows>
void start(const LinearW4A8& op, const GemmW4A4Up& product, const Target& target) {
    const int64_t blocks = (op.M + Rows - 1) / Rows * ((op.N + COLUMNS - 1) / COLUMNS);
    if (!blocks) return;
    if (blocks > 0x7FFFFFFF) throw std::invalid_argument("linear_w4a8: more than 2^31 tiles");
    const Levels levels{op.channel_scale, op.table, op.group};
    launch(w4a8_gemm_kernel<TURING, Tp, Rows>, {unsigned(blocks)}, THREADS<Rows>,
           STAGES<TURING, Rows> * sizeof(Stage<Rows>), target, product, levels);
}

template <bool TURING, class Tp>
void start_rows(const LinearW4A8& op, const GemmW4A4Up& product, const Target& target, int rows) {
    if (rows == 128) return start<TURING, Tp, 128>(op, product, target);
    rows == 64 ? start<TURING, Tp, 64>(op, product, target)
               : start<TURING, Tp, 32>(op, product, target);
}

template <bool TURING>
void start_dtype(const LinearW4A8& op, const GemmW4A4Up& product, const Target& target, int rows) {
    op.param_dtype == Dtype::f16 ? start_rows<TURING, f16>(op, product, target, rows)
                                 : start_rows<TURING, bf16>(op, product, target, rows);
}

}  // namespace nibble::cuda::w4a8
