// The probes' kernels in the emulator: so that their expected results are checked where there is no
// GPU.
#include "emulator.h"
#include "kernels.cuh"

namespace {
template <class Work>
void run(int threads, size_t shared, Work work) {
    emulator::run({1, 1, 1}, threads, shared, work);
}
}  // namespace

extern "C" {

void probe_products(const uint8_t* a, const uint8_t* b, const float* weights, const float* tokens,
                    float* sums, float* outer, int start) {
    run(128, 9216,
        [=] { nibble::cuda::probe::products(a, b, weights, tokens, sums, outer, start); });
}

void probe_integers(const uint8_t* a, const uint8_t* b, int* sums, int start) {
    run(128, 9216, [=] { nibble::cuda::probe::integers(a, b, sums, start); });
}

void probe_copy(const void* base, uint64_t rows, uint64_t row_bytes, uint32_t box_rows,
                uint32_t box_bytes, uint8_t* out, int bytes, int byte, int row) {
    const nibble::TensorMap matrix = nibble::tensor_map(base, rows, row_bytes, box_rows, box_bytes);
    run(128, 33 * 1024, [=] { nibble::cuda::probe::copy(matrix, out, bytes, byte, row); });
}

void probe_multiply(int kind, int is_unsigned, const uint32_t* a, const uint32_t* b, int* sums) {
    using nibble::cuda::probe::multiply;
    void (*kernels[3][2])(const uint32_t*, const uint32_t*, int*) = {
        {multiply<0, false>, multiply<0, true>},
        {multiply<1, false>, multiply<1, true>},
        {multiply<2, false>, multiply<2, true>}};
    run(32, 0, [=] { kernels[kind][is_unsigned](a, b, sums); });
}

void probe_transpose(const uint32_t* in, uint16_t* out) {
    run(32, 512, [=] { nibble::cuda::probe::transpose<4>(in, out); });
}
}
