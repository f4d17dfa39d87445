// From an op's struct to the kernel's instance.
#pragma once

#include <algorithm>

#include "gemm_w4a4.h"
#include "gelu.cuh"
#include "store.cuh"
#include "../launch.cuh"

namespace nibble::cuda {

template <class Mma, class Tp, int Rows, bool Unsigned, class Epilogue>
void start(const GemmW4A4Up& op, const Where& where, const Epilogue& epilogue) {
    const int64_t blocks = (op.M + Rows - 1) / Rows * ((op.N + COLUMNS - 1) / COLUMNS);
    if (!blocks) return;
    if (blocks > 0x7FFFFFFF) throw std::invalid_argument("gemm_w4a4_up: more than 2^31 tiles");
    const size_t ring = STAGES<Mma, Rows> * STEP<Mma> * sizeof(Group<Tp, Rows>);
    const size_t shared = std::max<size_t>(ring, Epilogue::template shared_bytes<Tile<Rows>>());
    launch(gemm_w4a4<Mma, Tp, Rows, Unsigned, Epilogue>, {unsigned(blocks)}, THREADS, shared, where,
           op, epilogue);
}

inline void check_types(const GemmW4A4Up& op) {
    if (op.codes != Codes::packed)
        throw std::invalid_argument("gemm_w4a4_up: here the codes must be packed");
    if (op.param_dtype == Dtype::f32)
        throw std::invalid_argument(
            "gemm_w4a4_up: on a GPU parameters are float16 or bfloat16, not float32");
}

template <class Mma, class Tp, int Rows, class Epilogue>
void start_signed(const GemmW4A4Up& op, const Where& where, const Epilogue& epilogue) {
    op.act_unsigned ? start<Mma, Tp, Rows, true>(op, where, epilogue)
                    : start<Mma, Tp, Rows, false>(op, where, epilogue);
}

template <class Mma, int Rows>
void gemm_w4a4_up_of(const GemmW4A4Up& op, const Where& where) {
    op.param_dtype == Dtype::f16 ? start_signed<Mma, f16, Rows>(op, where, Store())
                                 : start_signed<Mma, bf16, Rows>(op, where, Store());
}

template <class Mma>
void gemm_w4a4_up_by(const GemmW4A4Up& op, const Where& where, int rows) {
    check_types(op);
    if (rows == 128)
        gemm_w4a4_up_of<Mma, 128>(op, where);
    else if (rows == 64)
        gemm_w4a4_up_of<Mma, 64>(op, where);
    else
        gemm_w4a4_up_of<Mma, 32>(op, where);
}

template <class Mma, class Tp>
void gelu_quantize_down_of(const GemmW4A4UpGeluQuantizeDown& op, const Where& where, int rows) {
    constexpr int TALL =
        Mma::UNIT == 1
            ? 128
            : 64;  // int8 needs more registers for fragments, and this epilogue for itself
    const GeluQuantizeDown<Mma, Tp> epilogue{op};
    rows > 32 ? start_signed<Mma, Tp, TALL>(op.first, where, epilogue)
              : start_signed<Mma, Tp, 32>(op.first, where, epilogue);
}

template <class Mma>
void gelu_quantize_down_by(const GemmW4A4UpGeluQuantizeDown& op, const Where& where, int rows) {
    check_types(op.first);
    if (op.first.param_dtype == Dtype::f16)
        gelu_quantize_down_of<Mma, f16>(op, where, rows);
    else
        gelu_quantize_down_of<Mma, bf16>(op, where, rows);
    const int64_t count = op.first.M * op.R2, tiles = (op.first.N + COLUMNS - 1) / COLUMNS;
    if (!count) return;
    const float* partial = static_cast<const float*>(op.workspace);
    launch(add_tiles<Mma>, {unsigned((count + 255) / 256)}, 256, 0, where, partial, op.h2, count,
           int(tiles));
}

}  // namespace nibble::cuda
