#include "launch.cuh"

namespace nibble::cuda {

void quantize_down_f32(const QuantizeDown& a, const Target& target) {
    quantize_down_of<float, Codes::packed>(a, target);
}

}  // namespace nibble::cuda
