// From a quantizer's struct to the kernel's instance, and where things lie in scratch memory.
#include "quantize.cuh"

#include "../quantize_down/launch.cuh"
#include "w4a8.h"

namespace nibble::cuda {
namespace {

template <class X, class P, Form FORM, int EIGHTS, int WARPS, int BLOCKS>
void start_tokens(const QuantizeDown& a, const Target& target) {
    constexpr int PARTIAL = WARPS * 8 * EIGHTS * SUMS_STRIDE * 4, OWN = WARPS * WARP_BYTES<1>;
    const unsigned blocks = unsigned((a.M + 8 * EIGHTS - 1) / (8 * EIGHTS)),
                   columns = unsigned((a.R + DOWN_COLUMNS - 1) / DOWN_COLUMNS);
    launch(w4a8::quantize_tokens_kernel<X, P, FORM, EIGHTS, WARPS, BLOCKS>,
           {blocks, columns ? columns : 1}, 32 * WARPS, OWN > PARTIAL ? OWN : PARTIAL, target, a);
}

template <class X, class P, Form FORM>
void tokens_of(const QuantizeDown& a, const Target& target) {
    // As in quantize_nvfp4_down.
    if constexpr (sizeof(X) == 2 && same<X, P>) {
        const bool many_tokens = (a.M + 31) / 32 * 4 >= multiprocessors(target.device) * 3;
        if (many_tokens) return start_tokens<X, P, FORM, 4, 6, 2>(a, target);
    }
    start_tokens<X, P, FORM, 2, 12, 1>(a, target);
}

template <class X, class P>
void tokens_of(const QuantizeDown& a, const Target& target) {
    QuantizeDown here = a;
    // Turing multiplies float16 alone.
    if (target.capability < 80 && !Terms<X, P>::HALVES && a.R) {
        const unsigned blocks = unsigned((a.M + 31) / 32),
                       columns = unsigned((a.R + DOWN_COLUMNS - 1) / DOWN_COLUMNS);
        launch(down_kernel<X, P>, {blocks, columns}, 256, (32 * 68 + GROUP * 32) * 4, target, a);
        here.R = 0;
    }
    a.rotate ? tokens_of<X, P, Form::rotated>(here, target)
             : tokens_of<X, P, Form::signed_codes>(here, target);
}

template <class X>
void tokens_of(const QuantizeDown& a, const Target& target) {
    a.param_dtype == Dtype::bf16 ? tokens_of<X, bf16>(a, target) : tokens_of<X, f16>(a, target);
}

}  // namespace

void quantize_tokens(const QuantizeDown& a, const Target& target) {
    if (a.M == 0) return;
    switch (a.x_dtype) {
        case Dtype::bf16:
            return tokens_of<bf16>(a, target);
        case Dtype::f16:
            return tokens_of<f16>(a, target);
        case Dtype::f32:
            return tokens_of<float>(a, target);
    }
}

}  // namespace nibble::cuda
