// Activations of 8 bits: codes -127..127 as bytes, on every GPU.
#include "launch.cuh"

namespace nibble::cuda {

void quantize_down_int8(const QuantizeDown& a, const Target& target) {
    switch (a.x_dtype) {
        case Dtype::bf16:
            return quantize_down_of<bf16, Codes::int8>(a, target);
        case Dtype::f16:
            return quantize_down_of<f16, Codes::int8>(a, target);
        case Dtype::f32:
            return quantize_down_of<float, Codes::int8>(a, target);
    }
}

}  // namespace nibble::cuda
