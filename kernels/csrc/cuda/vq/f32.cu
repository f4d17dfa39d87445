#include "vq.cuh"

namespace nibble::cuda {

void vq_f32(const GemmVQ& a, const Where& where) { vq_of<float>(a, where); }

}  // namespace nibble::cuda
