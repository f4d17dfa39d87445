// Codes as 8-bit floats, for Hopper alone: 14 MB instead of 7 for FLUX's 4608 x 3072, which its
// product reads without widening them.
#include "launch.cuh"

namespace nibble::cuda {

void quantize_down_sm90(const QuantizeDown& a, const Target& target) {
    if (target.capability / 10 != 9)
        throw std::invalid_argument(
            "quantize_down makes 8-bit float codes on GPUs of compute capability 9.0 only");
    switch (a.x_dtype) {
        case Dtype::bf16:
            return quantize_down_of<bf16, Codes::e4m3>(a, target);
        case Dtype::f16:
            return quantize_down_of<f16, Codes::e4m3>(a, target);
        case Dtype::f32:
            return quantize_down_of<float, Codes::e4m3>(a, target);
    }
}

}  // namespace nibble::cuda
