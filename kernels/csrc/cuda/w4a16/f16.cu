#include "w4a16.cuh"

namespace nibble::cuda {

void w4a16_f16(const W4A16& a, const Target& target) { w4a16_of<f16>(a, target); }

}  // namespace nibble::cuda
