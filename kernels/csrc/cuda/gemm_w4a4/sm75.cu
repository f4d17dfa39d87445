// Turing: int4 in quarters, and every copy passes registers.
#include "launch.cuh"

namespace nibble::cuda {

void gemm_w4a4_sm75_image() { find_image(gemm_w4a4<Turing, bf16, 32, false, Store>); }

void gemm_w4a4_up_sm75(const GemmW4A4Up& op, const Target& target, int rows) {
    op.codes == Codes::int8 ? dispatch_rows<TuringAct8>(op, target, rows)
                            : dispatch_rows<Turing>(op, target, rows);
}

void gemm_w4a4_up_gelu_quantize_down_sm75(const GemmW4A4UpGeluQuantizeDown& op,
                                          const Target& target, int rows) {
    op.first.codes == Codes::int8 ? dispatch_gelu_dtype<TuringAct8>(op, target, rows)
                                  : dispatch_gelu_dtype<Turing>(op, target, rows);
}

}  // namespace nibble::cuda
