// Every processor: no flags, no intrinsics.
#include "isa.h"

#include <cstring>

#include "threads.h"

#define NIBBLE_DOT "simd/dot_portable.inl"
#define NIBBLE_DOT_WHOLE "simd/whole_portable.inl"

namespace nibble::cpu {
namespace {
#include "simd/portable.h"
#include "kernels.inl"
}  // namespace

const Ops ops_portable{quantize_down, gemm_w4a4_up, gemm_w4a4_up_gelu_quantize_down, w4a16, w4a16,
                       gemm_vq,       linear_w4a8};

}  // namespace nibble::cpu
