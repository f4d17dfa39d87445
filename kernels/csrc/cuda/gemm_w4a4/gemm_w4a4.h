// The doors to the products: one sibling an architecture. router.cu chooses.
#pragma once

#include "../../nibble.h"

namespace nibble::cuda {

// mma.sync. `rows` is the height of a tile: 32, 64 or 128, and for sm80 256.
void gemm_w4a4_up_sm75(const GemmW4A4Up&, const Target&, int rows);
void gemm_w4a4_up_sm80(const GemmW4A4Up&, const Target&, int rows);
void gemm_w4a4_up_sm100(const GemmW4A4Up&, const Target&,
                        int rows);  // int8: anything from 8.0 on runs it

// The same with the epilogue that quantizes for the next layer; `rows` is 32 or 128 (which is 64
// where codes are widened).
void gemm_w4a4_up_gelu_quantize_down_sm75(const GemmW4A4UpGeluQuantizeDown&, const Target&,
                                          int rows);
void gemm_w4a4_up_gelu_quantize_down_sm80(const GemmW4A4UpGeluQuantizeDown&, const Target&,
                                          int rows);
void gemm_w4a4_up_gelu_quantize_down_sm100(const GemmW4A4UpGeluQuantizeDown&, const Target&,
                                           int rows);

// wgmma, Hopper only; every form of codes.
void gemm_w4a4_up_sm90(const GemmW4A4Up&, const Target&);
size_t gemm_w4a4_up_sm90_workspace(Codes, int64_t M, int64_t N, int64_t K);  // bytes

// Throw where the module has no code of that path for the current GPU.
void gemm_w4a4_sm75_image();
void gemm_w4a4_sm80_image();
void gemm_w4a4_sm90_image();
void gemm_w4a4_sm100_image();

}  // namespace nibble::cuda
