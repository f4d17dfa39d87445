#include "launch.cuh"

namespace nibble::cuda {

void quantize_down_f16(const QuantizeDown& a, const Target& target) {
    quantize_down_of<f16, Codes::packed>(a, target);
}

}  // namespace nibble::cuda
