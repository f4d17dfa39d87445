// Which kernel runs an op on which GPU. Every choice is a named boolean with its reason; what no
// GPU has confirmed yet says so.
#include <string>

#include "gemm_w4a4/gemm_w4a4.h"
#include "launch.cuh"
#include "nvfp4/nvfp4.h"
#include "w4a8/w4a8.h"

namespace nibble::cuda {
namespace {

std::string in_words(int capability) {
    return std::to_string(capability / 10) + "." + std::to_string(capability % 10);
}

// The families of GPUs that differ in how they multiply 4-bit numbers.
struct Family {
    bool turing;     // int4 in 8x8 tiles, no asynchronous copies, no bfloat16
    bool ampere;     // 8.0 8.6 8.7 8.9: int4 in 16x8 tiles
    bool hopper;     // wgmma on 8-bit floats or integers; int8 by mma.sync is the second way
    bool blackwell;  // 10.0 and later: no int4 in the matrix units, int8 instead
};

Family family(int capability) {
    // 7.2 is an embedded Volta; the first int4 product came with 7.5.
    if (capability < 75) {
        throw std::runtime_error("GPUs of compute capability " + in_words(capability) +
                                 " have no 4-bit product; 7.5 (Turing) or later is needed");
    }
    return {capability < 80, capability >= 80 && capability < 90,
            capability >= 90 && capability < 100, capability >= 100};
}

int64_t tiles(int64_t M, int64_t N, int rows) { return (M + rows - 1) / rows * ((N + 127) / 128); }

// Whether tiles of 256 tokens beat those of 128 with int4. They ask 13.2 bytes a clock and
// multiprocessor of the L2 cache at full rate, those of 128 17.5, which counts for a tenth; and
// they come in larger pieces, of which the busiest multiprocessor may get more.
bool tallest_pays(int64_t M, int64_t N, int multiprocessors) {
    auto cost = [&](int rows, int percent) {
        return (tiles(M, N, rows) + multiprocessors - 1) / multiprocessors * rows * percent;
    };
    return cost(256, 100) < cost(128, 110);
}

// The height of a tile. Not yet measured: the reasons are arithmetic.
int tile_rows(int64_t M, int64_t N, int multiprocessors, bool int4) {
    // One tile of rows already holds every token; a taller one multiplies zeros.
    const bool few_tokens = M <= 32, one_tile = M <= 64;
    // Two blocks live on a multiprocessor. A tall tile reads the weight half as often, which pays
    // only where all multiprocessors have work.
    const bool fills_the_gpu = tiles(M, N, 128) >= 2 * int64_t(multiprocessors);
    if (few_tokens) return 32;
    if (one_tile || !fills_the_gpu) return 64;
    return int4 && tallest_pays(M, N, multiprocessors) ? 256 : 128;
}

std::string tile_in_words(Op op, const Family& gpu, int64_t M, int64_t N) {
    if (M <= 32) return "32x128";
    if (op != Op::gemm_w4a4_up) return gpu.turing || gpu.ampere ? "128x128" : "64x128";
    if (M <= 64) return "64x128";
    const int64_t largest = tiles(M, N, 128) / 2;  // multiprocessors that tiles of 128 rows fill
    const char* tall = gpu.ampere ? "256x128 or 128x128" : "128x128";
    return std::string(tall) + " on up to " + std::to_string(largest) +
           " multiprocessors, 64x128 on more";
}

const char* vq_kernel_in_words(const Family& gpu, int64_t M) {
    if (M == 1) return "no matrix unit, one token";
    if (M <= 16) return "tile 16x64";
    return gpu.turing ? "tile 64x128" : "tile 64x128 or 128x128";
}

// 4-bit floats are multiplied by mma.sync on 12.0 and 12.1; 10.0 and 11.0 have other instructions.
void check_nvfp4(const char* op, int capability) {
    if (capability / 10 != 12) {
        throw std::invalid_argument(std::string(op) +
                                    " runs on GPUs of compute capability 12.0 and 12.1 only");
    }
}

}  // namespace

void quantize_nvfp4_down(const QuantizeNvfp4Down& op, const Target& target) {
    check_nvfp4("quantize_nvfp4_down", target.capability);
    quantize_nvfp4_down_sm120(op, target);
}

// No tile is lower than 64 tokens: with so few the weight's bytes are what counts.
void gemm_nvfp4_up(const GemmNvfp4Up& op, const Target& target) {
    check_nvfp4("gemm_nvfp4_up", target.capability);
    gemm_nvfp4_up_sm120(op, target, tile_rows(op.M, op.N, multiprocessors(target.device), true));
}

void gemm_w4a4_up(const GemmW4A4Up& op, const Target& target) {
    const Family gpu = family(target.capability);
    // Only wgmma reaches the full rate of that matrix unit; the kernel takes every form of codes.
    if (gpu.hopper) return gemm_w4a4_up_sm90(op, target);
    const bool wide = op.codes == Codes::int8;
    const int rows = tile_rows(op.M, op.N, multiprocessors(target.device), gpu.ampere && !wide);
    if (gpu.turing) return gemm_w4a4_up_sm75(op, target, rows);
    if (gpu.ampere) return gemm_w4a4_up_sm80(op, target, rows);
    gemm_w4a4_up_sm100(op, target, rows);
}

void gemm_w4a4_up_gelu_quantize_down(const GemmW4A4UpGeluQuantizeDown& op, const Target& target) {
    const Family gpu = family(target.capability);
    const int rows =
        op.first.M <= 32 ? 32 : 128;  // such layers are wide: tall tiles fill every GPU
    if (gpu.turing) return gemm_w4a4_up_gelu_quantize_down_sm75(op, target, rows);
    if (gpu.ampere) return gemm_w4a4_up_gelu_quantize_down_sm80(op, target, rows);
    gemm_w4a4_up_gelu_quantize_down_sm100(
        op, target, rows);  // Hopper too: the wgmma product has no such epilogue
}

namespace {

// What lies in the scratch memory of linear_w4a8: offsets in bytes, each a multiple of 256. The
// codes lie at the beginning.
struct TokensScratch {
    size_t ascales, h, bytes;
    TokensScratch(int64_t M, int64_t K, int64_t R) {
        const auto aligned = [](size_t size) { return (size + 255) & ~size_t(255); };
        ascales = aligned(size_t(M) * size_t(K));
        h = ascales + aligned(size_t(M) * sizeof(float));
        bytes = h + aligned(size_t(M) * size_t(R) * sizeof(float));
    }
};

}  // namespace

void linear_w4a8(const LinearW4A8& op, const Target& target) {
    const Family gpu = family(target.capability);
    if (op.param_dtype == Dtype::f32) {
        throw std::invalid_argument(
            "linear_w4a8: on a GPU parameters are float16 or bfloat16, not float32");
    }
    if (op.M == 0 || op.N == 0) return;
    const TokensScratch layout(op.M, op.K, op.R);
    char* scratch = static_cast<char*>(op.scratch);
    QuantizeDown first{};
    first.M = op.M, first.K = op.K, first.R = op.R;
    first.x = op.x, first.x_stride = op.x_stride, first.x_dtype = op.x_dtype;
    first.smooth = op.smooth, first.proj_down = op.proj_down, first.param_dtype = op.param_dtype;
    first.rotate = op.rotate, first.codes = Codes::int8, first.q = scratch;
    first.ascales = reinterpret_cast<float*>(scratch + layout.ascales);
    first.h = reinterpret_cast<float*>(scratch + layout.h);
    quantize_tokens(first, target);
    GemmW4A4Up second{};
    second.M = op.M, second.N = op.N, second.K = op.K, second.R = op.R;
    second.codes = Codes::int8, second.q = first.q, second.ascales = first.ascales;
    second.h = first.h, second.h_stride = op.R;
    second.weight = op.weight, second.weight_scale = op.weight_scale;
    second.proj_up = op.proj_up, second.bias = op.bias, second.param_dtype = op.param_dtype;
    second.out = op.out, second.out_dtype = op.x_dtype;
    Target next = target;
    next.waits = true;
    const int rows = tile_rows(op.M, op.N, multiprocessors(target.device), false);
    if (gpu.turing) return linear_w4a8_sm75(op, second, next, rows);
    if (gpu.ampere) return linear_w4a8_sm80(op, second, next, rows);
    linear_w4a8_sm100(op, second, next, rows);  // Hopper too: its wgmma has no reader of codes
}

// e4m3 holds -8..15 exactly and is what the wgmma product multiplies. Elsewhere the public format.
Codes codes(int capability) { return family(capability).hopper ? Codes::e4m3 : Codes::packed; }

size_t workspace_bytes(Op op, Codes codes, int capability, int64_t M, int64_t N, int64_t K,
                       int64_t R) {
    // A product that is given 8-bit floats may need less: it does not widen them first.
    if (family(capability).hopper && op == Op::gemm_w4a4_up)
        return gemm_w4a4_up_sm90_workspace(codes, M, N, K);
    if (op == Op::linear_w4a8) return TokensScratch(M, K, R).bytes;
    // One h of (M, R2) for each tile of 128 columns. This op reads no 8-bit floats.
    if (op == Op::gemm_w4a4_up_gelu_quantize_down && codes != Codes::e4m3)
        return size_t(M) * size_t(R) * size_t((N + 127) / 128) * sizeof(float);
    return 0;
}

Route route(Op op, int capability, int64_t M, int64_t N, int64_t) {
    const Family gpu = family(capability);
    const std::string on = " on compute capability " + in_words(capability);
    if (op == Op::gemm_w4a4_up && gpu.hopper)
        return {"sm90: wgmma on 8-bit floats (integers for activations of 8 bits)",
                "wgmma is the fast path" + on};
    if (op == Op::gemm_w4a4_up || op == Op::gemm_w4a4_up_gelu_quantize_down) {
        const char* path = "sm100: int8 m16n8k32 on widened codes";
        const char* why = "no int4 in the matrix units";
        if (gpu.turing) {
            path = "sm75: int4 m8n8k32";
            why = "the first int4 product";
        } else if (gpu.ampere) {
            path = "sm80: int4 m16n8k64";
            why = "a whole group an instruction";
        }
        const std::string tile = tile_in_words(op, gpu, M, N);
        return {std::string(path) + ", tile " + tile, why + on + "; tiles not yet measured"};
    }
    if (op == Op::gemm_nvfp4_up)
        return {"sm120: e2m1 m16n8k64 with block scales",
                "4-bit floats" + on + "; not yet measured"};
    if (op == Op::linear_w4a8) {
        const std::string path = gpu.turing ? "int8 m8n8k16" : "int8 m16n8k32";
        return {"cuda: " + path + " on weights that are read as int8", "not yet measured"};
    }
    if (op == Op::gemm_vq) {
        return {
            "cuda: 16-bit mma on looked-up codewords, " + std::string(vq_kernel_in_words(gpu, M)),
            "decoded where they are multiplied; not yet measured"};
    }
    return {"cuda: " + std::string(name_of(op)), "one kernel for every GPU from 7.5 on"};
}

#ifdef NIBBLE_EMULATE
int capability(int) { return 80; }
#else
int capability(int device) {
    int major = 0, minor = 0;
    check(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device),
          "asking for the GPU's compute capability");
    check(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device),
          "asking for the GPU's compute capability");
    const int found = 10 * major + minor;
    if (found >= 75) {
        OnDevice on(device);
        const Family gpu = family(found);
        if (gpu.turing) gemm_w4a4_sm75_image();
        if (gpu.ampere) gemm_w4a4_sm80_image();
        if (gpu.hopper) gemm_w4a4_sm90_image();
        if (gpu.blackwell) gemm_w4a4_sm100_image();
    }
    return found;
}
#endif

}  // namespace nibble::cuda
