#include "vq.cuh"

namespace nibble::cuda {

void vq_f16(const GemmVQ& a, const Where& where) { vq_of<f16>(a, where); }

}  // namespace nibble::cuda
