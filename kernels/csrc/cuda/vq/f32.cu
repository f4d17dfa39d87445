#include "vq.cuh"

namespace nibble::cuda {

void vq_f32(const GemmVQ& a, const Target& target) { vq_of<float>(a, target); }

}  // namespace nibble::cuda
