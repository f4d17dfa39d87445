// From an op's struct to the kernel's instance.
#pragma once

#include <algorithm>

#include "gemm_w4a4.h"
#include "gelu.cuh"
#include "store.cuh"
#include "../launch.cuh"

namespace nibble::cuda {

template <class Mma, class Tp, int Rows, bool Unsigned, class Epilogue>
void launch_kernel(const GemmW4A4Up& op, const Target& target, const Epilogue& epilogue) {
    const int64_t blocks = (op.M + Rows - 1) / Rows * ((op.N + COLUMNS - 1) / COLUMNS);
    if (!blocks) return;
    if (blocks > 0x7FFFFFFF) throw std::invalid_argument("gemm_w4a4_up: more than 2^31 tiles");
    const size_t ring = STAGES<Mma, Rows> * STEP<Mma, Rows> * sizeof(Group<Mma, Tp, Rows>);
    const size_t shared = std::max<size_t>(ring, Epilogue::template shared_bytes<Tile<Rows>>());
    launch(gemm_w4a4<Mma, Tp, Rows, Unsigned, Epilogue>, {unsigned(blocks)}, THREADS<Rows>, shared,
           target, op, epilogue);
}

inline void check_types(const GemmW4A4Up& op) {
    if (op.codes == Codes::e4m3)
        throw std::invalid_argument("gemm_w4a4_up: here the codes must be packed or int8");
    if (op.param_dtype == Dtype::f32)
        throw std::invalid_argument(
            "gemm_w4a4_up: on a GPU parameters are float16 or bfloat16, not float32");
}

template <class Mma, class Tp, int Rows, class Epilogue>
void dispatch_sign(const GemmW4A4Up& op, const Target& target, const Epilogue& epilogue) {
    if constexpr (!WIDE<Mma>)  // codes of 8 bits have both signs
        if (op.act_unsigned) return launch_kernel<Mma, Tp, Rows, true>(op, target, epilogue);
    launch_kernel<Mma, Tp, Rows, false>(op, target, epilogue);
}

template <class Mma, int Rows>
void dispatch_dtype(const GemmW4A4Up& op, const Target& target) {
    op.param_dtype == Dtype::f16 ? dispatch_sign<Mma, f16, Rows>(op, target, Store())
                                 : dispatch_sign<Mma, bf16, Rows>(op, target, Store());
}

template <class Mma>
void dispatch_rows(const GemmW4A4Up& op, const Target& target, int rows) {
    check_types(op);
    if constexpr (same<Mma, Int4>)
        if (rows == 256) return dispatch_dtype<Mma, 256>(op, target);
    if (rows == 128)
        dispatch_dtype<Mma, 128>(op, target);
    else if (rows == 64)
        dispatch_dtype<Mma, 64>(op, target);
    else
        dispatch_dtype<Mma, 32>(op, target);
}

template <class Mma, class Tp>
void dispatch_gelu_rows(const GemmW4A4UpGeluQuantizeDown& op, const Target& target, int rows) {
    constexpr int TALL =
        Mma::UNIT == 1
            ? 128
            : 64;  // int8 needs more registers for fragments, and this epilogue for itself
    const GeluQuantizeDown<Mma, Tp> epilogue{op};
    rows > 32 ? dispatch_sign<Mma, Tp, TALL>(op.first, target, epilogue)
              : dispatch_sign<Mma, Tp, 32>(op.first, target, epilogue);
}

template <class Mma>
void dispatch_gelu_dtype(const GemmW4A4UpGeluQuantizeDown& op, const Target& target, int rows) {
    check_types(op.first);
    if (op.first.param_dtype == Dtype::f16)
        dispatch_gelu_rows<Mma, f16>(op, target, rows);
    else
        dispatch_gelu_rows<Mma, bf16>(op, target, rows);
    const int64_t count = op.first.M * op.R2, tiles = (op.first.N + COLUMNS - 1) / COLUMNS;
    if (!count) return;
    const float* partial = static_cast<const float*>(op.workspace);
    launch(add_tiles<Mma>, {unsigned((count + 255) / 256)}, 256, 0, target, partial, op.h2, count,
           int(tiles));
}

}  // namespace nibble::cuda
