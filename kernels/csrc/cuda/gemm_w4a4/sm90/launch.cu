// From an op to an instance of Hopper's product: the copy engine's maps, packed codes widened where
// another op gave them, and the tile.
#include <algorithm>

#include "../../launch.cuh"
#include "../../tensor_map.h"
#include "../gemm_w4a4.h"
#include "kernel.cuh"

namespace nibble::cuda {
namespace sm90 {

const void* widen(const GemmW4A4Up& p, const Target& target) {
    const int64_t blocks = p.M * p.K / 32, threads = 256;
    const Grid grid{unsigned(
        std::min<int64_t>((blocks + threads - 1) / threads, 16 * multiprocessors(target.device)))};
    launch(p.act_unsigned ? widen_kernel<true> : widen_kernel<false>, grid, int(threads), 0, target,
           static_cast<const uint4*>(p.q), static_cast<uint4*>(p.workspace), blocks, int(p.K / 32),
           int(p.unsigned_from / 32));
    return p.workspace;
}

// ---- choice -------------------------------------------------------------------------------------

template <Codes FORMAT, class Param, int Blocks, int Tokens>
void start(const GemmW4A4Up& p, const void* codes, const Target& target) {
    using Shape = Tile<Blocks, Tokens>;
    const int across = int((p.N + Shape::rows - 1) / Shape::rows),
              tiles = across * int((p.M + Tokens - 1) / Tokens);
    const bool paired =
        p.R % 2 == 0 && p.h_stride % 2 == 0 && reinterpret_cast<uintptr_t>(p.h) % 8 == 0;
    const Parameters<Param> parameters{int(p.M),
                                       int(p.N),
                                       int(p.K),
                                       int(p.R),
                                       across,
                                       tiles,
                                       p.ascales,
                                       p.h,
                                       p.h_stride,
                                       static_cast<const Param*>(p.weight_scale),
                                       static_cast<const Param*>(p.proj_up),
                                       static_cast<const Param*>(p.bias),
                                       p.out,
                                       p.out_dtype,
                                       paired};
    launch(gemm_kernel<FORMAT, Param, Blocks, Tokens>,
           {unsigned(std::min(tiles, multiprocessors(target.device)))}, THREADS, Shape::shared,
           target, p.K ? tensor_map(codes, p.M, p.K, Tokens, STEP) : TensorMap{},
           p.K ? tensor_map(p.weight, p.N, p.K / 2, Shape::rows, STEP / 2) : TensorMap{},
           parameters);
}

// The tile that needs the least time by count: rounds over all multiprocessors, times a tile's
// size, times what a smaller tile costs more for the bytes that it brings in for each
// multiplication. At full rate they are 22.7, 34 and 45 a clock and multiprocessor, all from the L2
// cache; DeepGEMM's fp8 product gained 17 % when its tile grew from 128 x 128 to 128 x 160 (its
// pull request 73), and the smallest asks a third more than the middle one. An estimate for this
// kernel.
template <Codes FORMAT, class Param>
void choose(const GemmW4A4Up& p, const void* codes, const Target& target) {
    const int64_t processors = multiprocessors(target.device);
    auto cost = [&](int64_t rows, int64_t tokens, int64_t percent) {
        const int64_t tiles = ((p.N + rows - 1) / rows) * ((p.M + tokens - 1) / tokens);
        return (tiles + processors - 1) / processors * rows * tokens * percent;
    };
    const int64_t large = cost(256, 128, 100), middle = cost(128, 128, 120),
                  small = cost(128, 64, 160);
    if (large <= middle && large <= small)
        start<FORMAT, Param, 2, 128>(p, codes, target);
    else if (middle <= small)
        start<FORMAT, Param, 1, 128>(p, codes, target);
    else
        start<FORMAT, Param, 1, 64>(p, codes, target);
}

template <Codes FORMAT>
void choose_dtype(const GemmW4A4Up& p, const void* codes, const Target& target) {
    if (p.param_dtype == Dtype::bf16)
        choose<FORMAT, bf16>(p, codes, target);
    else if (p.param_dtype == Dtype::f16)
        choose<FORMAT, f16>(p, codes, target);
    else
        throw std::invalid_argument("on a GPU parameters are bfloat16 or float16");
}

}  // namespace sm90

void gemm_w4a4_sm90_image() { find_image(sm90::gemm_kernel<Codes::e4m3, bf16, 1, 64>); }

size_t gemm_w4a4_up_sm90_workspace(Codes codes, int64_t M, int64_t, int64_t K) {
    return codes == Codes::packed ? size_t(M) * K : 0;
}

void gemm_w4a4_up_sm90(const GemmW4A4Up& p, const Target& target) {
    if (!p.M || !p.N) return;
    if (p.codes == Codes::int8) return sm90::choose_dtype<Codes::int8>(p, p.q, target);
    const void* codes = p.codes == Codes::packed && p.K ? sm90::widen(p, target) : p.q;
    sm90::choose_dtype<Codes::e4m3>(p, codes, target);
}

}  // namespace nibble::cuda
