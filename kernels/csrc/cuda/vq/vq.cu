#include "vq.cuh"

namespace nibble::cuda {

void vq_bf16(const GemmVQ& a, const Target& target) { vq_of<bf16>(a, target); }

void gemm_vq(const GemmVQ& a, const Target& target) {
    if (a.codebook_dtype != Dtype::f16)
        throw std::invalid_argument("gemm_vq on a GPU takes a codebook in float16");
    if (a.K % GROUP) throw std::invalid_argument("gemm_vq on a GPU takes K in whole groups of 64");
    if (a.out_dtype != a.x_dtype || (a.addend && a.addend_dtype != a.x_dtype))
        throw std::invalid_argument("gemm_vq on a GPU gives and adds numbers of x's dtype");
    if (a.M == 0 || a.N == 0) return;
    switch (a.x_dtype) {
        case Dtype::bf16:
            return vq_bf16(a, target);
        case Dtype::f16:
            return vq_f16(a, target);
        case Dtype::f32:
            return vq_f32(a, target);
    }
}

}  // namespace nibble::cuda
