#include "w4a16.cuh"

namespace nibble::cuda {

void w4a16_bf16(const W4A16& a, const Where& where) { w4a16_of<bf16>(a, where); }

static void w4a16(const W4A16& a, const Where& where) {
    if (a.M == 0 || a.N == 0) return;
    switch (a.x_dtype) {
        case Dtype::bf16:
            return w4a16_bf16(a, where);
        case Dtype::f16:
            return w4a16_f16(a, where);
        case Dtype::f32:
            return w4a16_f32(a, where);
    }
}

// Two names, one choice: both ops are right for any number of tokens.
void gemv_w4a16(const W4A16& a, const Where& where) { w4a16(a, where); }
void gemm_w4a16(const W4A16& a, const Where& where) { w4a16(a, where); }

}  // namespace nibble::cuda
