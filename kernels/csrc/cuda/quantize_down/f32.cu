#include "kernel.cuh"

namespace nibble::cuda {

void quantize_down_f32(const QuantizeDown& a, const Where& where) {
    quantize_down_of<float, Codes::packed>(a, where);
}

}  // namespace nibble::cuda
