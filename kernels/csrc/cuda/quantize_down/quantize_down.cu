#include "launch.cuh"

namespace nibble::cuda {

void quantize_down_bf16(const QuantizeDown& a, const Target& target) {
    quantize_down_of<bf16, Codes::packed>(a, target);
}

void quantize_down(const QuantizeDown& a, const Target& target) {
    if (a.M == 0) return;
    if (a.codes == Codes::e4m3) return quantize_down_sm90(a, target);
    if (a.codes == Codes::int8) return quantize_down_int8(a, target);
    switch (a.x_dtype) {
        case Dtype::bf16:
            return quantize_down_bf16(a, target);
        case Dtype::f16:
            return quantize_down_f16(a, target);
        case Dtype::f32:
            return quantize_down_f32(a, target);
    }
}

}  // namespace nibble::cuda
