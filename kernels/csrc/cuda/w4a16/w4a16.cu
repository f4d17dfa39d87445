#include "w4a16.cuh"

namespace nibble::cuda {

void w4a16_bf16(const W4A16& a, const Target& target) { w4a16_of<bf16>(a, target); }

static void w4a16(const W4A16& a, const Target& target) {
    if (a.M == 0 || a.N == 0) return;
    switch (a.x_dtype) {
        case Dtype::bf16:
            return w4a16_bf16(a, target);
        case Dtype::f16:
            return w4a16_f16(a, target);
        case Dtype::f32:
            return w4a16_f32(a, target);
    }
}

// Two names, one choice: both ops are right for any number of tokens.
void gemv_w4a16(const W4A16& a, const Target& target) { w4a16(a, target); }
void gemm_w4a16(const W4A16& a, const Target& target) { w4a16(a, target); }

}  // namespace nibble::cuda
