// Ampere and Ada: the matrix units have int4.
#include "launch.cuh"

namespace nibble::cuda {

void gemm_w4a4_up_sm80(const GemmW4A4Up& op, const Where& where, int rows) {
    gemm_w4a4_up_by<Int4>(op, where, rows);
}

void gemm_w4a4_up_gelu_quantize_down_sm80(const GemmW4A4UpGeluQuantizeDown& op, const Where& where,
                                          int rows) {
    gelu_quantize_down_by<Int4>(op, where, rows);
}

}  // namespace nibble::cuda
