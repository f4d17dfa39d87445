#include "vq.cuh"

namespace nibble::cuda {

void vq_f16(const GemmVQ& a, const Target& target) { vq_of<f16>(a, target); }

}  // namespace nibble::cuda
