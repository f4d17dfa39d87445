// Blackwell, and by PTX whatever comes after it: int4 codes as bytes.
#include "launch.cuh"

namespace nibble::cuda {

void gemm_w4a4_up_sm100(const GemmW4A4Up& op, const Where& where, int rows) {
    gemm_w4a4_up_by<Int8>(op, where, rows);
}

void gemm_w4a4_up_gelu_quantize_down_sm100(const GemmW4A4UpGeluQuantizeDown& op, const Where& where,
                                           int rows) {
    gelu_quantize_down_by<Int8>(op, where, rows);
}

}  // namespace nibble::cuda
