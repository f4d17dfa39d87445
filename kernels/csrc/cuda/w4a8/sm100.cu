#include "launch.cuh"

namespace nibble::cuda {

void linear_w4a8_sm100(const LinearW4A8& op, const GemmW4A4Up& product, const Target& target,
                       int rows) {
    w4a8::start_dtype<false>(op, product, target, rows);
}

}  // namespace nibble::cuda
