// The doors to the kernels of weights that are read as int8.
#pragma once

#include "../../nibble.h"

namespace nibble::cuda {

// A quantizer's struct whose `ascales` are one a token.
void quantize_tokens(const QuantizeDown&, const Target&);

// The product of what `quantize_tokens` left. `rows`: 32, 64 or 128, of a tile.
void linear_w4a8_sm75(const LinearW4A8&, const GemmW4A4Up&, const Target&, int rows);
void linear_w4a8_sm80(const LinearW4A8&, const GemmW4A4Up&, const Target&, int rows);
void linear_w4a8_sm100(const LinearW4A8&, const GemmW4A4Up&, const Target&, int rows);

}  // namespace nibble::cuda
