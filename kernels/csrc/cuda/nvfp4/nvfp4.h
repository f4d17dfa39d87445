// The doors to the kernels of 4-bit floats.
#pragma once

#include "../../nibble.h"

namespace nibble::cuda {

void quantize_nvfp4_down_sm120(const QuantizeNvfp4Down&, const Target&);
// `rows` is the height of a tile: 64, 128 or 256.
void gemm_nvfp4_up_sm120(const GemmNvfp4Up&, const Target&, int rows);

}  // namespace nibble::cuda
