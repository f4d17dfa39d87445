// Blackwell, and by PTX whatever comes after it: int4 codes as bytes.
#include "launch.cuh"

namespace nibble::cuda {

void gemm_w4a4_sm100_image() { find_image(gemm_w4a4<Int8, bf16, 32, false, Store>); }

void gemm_w4a4_up_sm100(const GemmW4A4Up& op, const Target& target, int rows) {
    op.codes == Codes::int8 ? dispatch_rows<Act8>(op, target, rows)
                            : dispatch_rows<Int8>(op, target, rows);
}

void gemm_w4a4_up_gelu_quantize_down_sm100(const GemmW4A4UpGeluQuantizeDown& op,
                                           const Target& target, int rows) {
    op.first.codes == Codes::int8 ? dispatch_gelu_dtype<Act8>(op, target, rows)
                                  : dispatch_gelu_dtype<Int8>(op, target, rows);
}

}  // namespace nibble::cuda
