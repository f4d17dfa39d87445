// The W4A4 product on Hopper's warpgroups, whose tensor cores know no int4. See gemm_w4a4_sm90.cu.
#pragma once

#include <cstddef>
#include <cstdint>

#include "../nibble.h"

namespace nibble::cuda {

void gemm_w4a4_up_sm90(const GemmW4A4Up& p, const Where& where);
size_t gemm_w4a4_up_sm90_workspace(Codes codes, int64_t M, int64_t N, int64_t K);  // bytes

}  // namespace nibble::cuda
