// From an op's struct to the instance of its kernel.
#include "nvfp4.h"

#include "../launch.cuh"
#include "gemm.cuh"
#include "quantize.cuh"

namespace nibble::cuda {
namespace {

template <class X, class P, int EIGHTS, int WARPS, int BLOCKS>
void start_quantizer(const QuantizeNvfp4Down& a, const Target& target) {
    constexpr int PARTIAL = WARPS * 8 * EIGHTS * SUMS_STRIDE * 4, OWN = WARPS * WARP_BYTES<1>;
    const unsigned blocks = unsigned((a.M + 8 * EIGHTS - 1) / (8 * EIGHTS)),
                   columns = unsigned((a.R + DOWN_COLUMNS - 1) / DOWN_COLUMNS);
    launch(quantize_nvfp4_kernel<X, P, EIGHTS, WARPS, BLOCKS>, {blocks, columns ? columns : 1},
           32 * WARPS, OWN > PARTIAL ? OWN : PARTIAL, target, a);
}

template <class X, class P>
void quantizer_of(const QuantizeNvfp4Down& a, const Target& target) {
    // float32 fills the registers with 16 tokens, and where types differ the terms do.
    if constexpr (sizeof(X) == 2 && same<X, P>) {
        // Three quarters of the multiprocessors busy with twice the tokens are as fast, and read
        // proj_down half as often.
        const bool many_tokens = (a.M + 31) / 32 * 4 >= multiprocessors(target.device) * 3;
        if (many_tokens) return start_quantizer<X, P, 4, 6, 2>(a, target);
    }
    start_quantizer<X, P, 2, 12, 1>(a, target);
}

template <class X>
void quantizer_of(const QuantizeNvfp4Down& a, const Target& target) {
    a.param_dtype == Dtype::bf16 ? quantizer_of<X, bf16>(a, target)
                                 : quantizer_of<X, f16>(a, target);
}

template <class Tp, int Rows>
void start_gemm(const GemmNvfp4Up& op, const Target& target) {
    const int64_t blocks = (op.M + Rows - 1) / Rows * ((op.N + COLUMNS - 1) / COLUMNS);
    if (!blocks) return;
    if (blocks > 0x7FFFFFFF) throw std::invalid_argument("gemm_nvfp4_up: more than 2^31 tiles");
    launch(nvfp4::gemm_kernel<Tp, Rows>, {unsigned(blocks)}, THREADS<Rows>,
           sizeof(nvfp4::Shared<Rows>), target, op);
}

template <class Tp>
void gemm_of(const GemmNvfp4Up& op, const Target& target, int rows) {
    if (rows == 256) return start_gemm<Tp, 256>(op, target);
    rows == 128 ? start_gemm<Tp, 128>(op, target) : start_gemm<Tp, 64>(op, target);
}

}  // namespace

void quantize_nvfp4_down_sm120(const QuantizeNvfp4Down& a, const Target& target) {
    if (a.M == 0) return;
    switch (a.x_dtype) {
        case Dtype::bf16:
            return quantizer_of<bf16>(a, target);
        case Dtype::f16:
            return quantizer_of<f16>(a, target);
        case Dtype::f32:
            return quantizer_of<float>(a, target);
    }
}

void gemm_nvfp4_up_sm120(const GemmNvfp4Up& op, const Target& target, int rows) {
    op.param_dtype == Dtype::f16 ? gemm_of<f16>(op, target, rows) : gemm_of<bf16>(op, target, rows);
}

}  // namespace nibble::cuda
