// Turing: int4 in quarters, and every copy passes registers.
#include "launch.cuh"

namespace nibble::cuda {

void gemm_w4a4_up_sm75(const GemmW4A4Up& op, const Where& where, int rows) {
    gemm_w4a4_up_by<Turing>(op, where, rows);
}

void gemm_w4a4_up_gelu_quantize_down_sm75(const GemmW4A4UpGeluQuantizeDown& op, const Where& where,
                                          int rows) {
    gelu_quantize_down_by<Turing>(op, where, rows);
}

}  // namespace nibble::cuda
