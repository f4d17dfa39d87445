// Ampere and Ada: the matrix units have int4.
#include "launch.cuh"

namespace nibble::cuda {

void gemm_w4a4_sm80_image() { find_image(gemm_w4a4<Int4, bf16, 32, false, Store>); }

void gemm_w4a4_up_sm80(const GemmW4A4Up& op, const Target& target, int rows) {
    op.codes == Codes::int8 ? dispatch_rows<Act8>(op, target, rows)
                            : dispatch_rows<Int4>(op, target, rows);
}

void gemm_w4a4_up_gelu_quantize_down_sm80(const GemmW4A4UpGeluQuantizeDown& op,
                                          const Target& target, int rows) {
    op.first.codes == Codes::int8 ? dispatch_gelu_dtype<Act8>(op, target, rows)
                                  : dispatch_gelu_dtype<Int4>(op, target, rows);
}

}  // namespace nibble::cuda
