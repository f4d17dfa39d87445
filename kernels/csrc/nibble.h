// The contract between the bindings and the backends: one struct an op, raw pointers and sizes,
// nothing of torch.
//
// Letters: M tokens, K in, N out, R rank, G = 64 columns of K that share one scale. Every tensor is
// dense and row-major in the natural layout of the file, so a weight is computed with as it lies on
// disk: nothing is repacked, nothing is kept. The formulas are those of kernels/reference; a
// backend that differs from them is wrong.
//
// What the bindings have checked before a backend is called: sizes are not negative, K % 64 == 0
// (and N % 64 == 0 where N is quantized), pointers are not null where a size is not 0 and are
// aligned to 16 bytes, dtypes are among those listed.
#pragma once

#include <cstddef>
#include <cstdint>

#ifndef __CUDACC_RTC__
#include <stdexcept>
#include <string>
#endif

namespace nibble {

constexpr int ABI = 8;  // of calls and structs; kernels/backends/native.py names the one it needs
constexpr int GROUP = 64;
constexpr float SHIFT = 0.171875f;  // added before unsigned codes: a GELU's minimum is -0.17

enum class Op : int {
    quantize_down,
    gemm_w4a4_up,
    gemm_w4a4_up_gelu_quantize_down,
    gemv_w4a16,
    gemm_w4a16,
    gemm_vq,
    linear_w4a8,
    quantize_nvfp4_down,
    gemm_nvfp4_up
};

#ifndef __CUDACC_RTC__  // the host's part

// The names that Python knows, in the order of Op.
constexpr const char* OP_NAMES[] = {
    "quantize_down", "gemm_w4a4_up",        "gemm_w4a4_up_gelu_quantize_down",
    "gemv_w4a16",    "gemm_w4a16",          "gemm_vq",
    "linear_w4a8",   "quantize_nvfp4_down", "gemm_nvfp4_up"};

inline const char* name_of(Op op) { return OP_NAMES[static_cast<int>(op)]; }

inline Op op_named(const std::string& name) {
    int index = 0;
    for (const char* known : OP_NAMES) {
        if (name == known) return static_cast<Op>(index);
        ++index;
    }
    throw std::invalid_argument("unknown op '" + name + "'");
}

#endif

enum class Dtype : int { f32 = 0, f16 = 1, bf16 = 2 };

// How activation codes are stored between quantize_down and the product.
//   packed  (M, K/2) bytes, low nibble = even column; signed -7..7 in two's complement, unsigned
//   0..15: the public format
//
//   int8    (M, K) bytes, codes -127..127: activations of 8 bits, whatever their signs; what is
//   unsigned in 4 bits has its shift alone
//
//   e4m3    (M, K) bytes, each the code as an 8-bit float (exact for -8..15): what Hopper's matrix
//   unit reads; native to native only. In every 32 columns byte 4t + i holds column 8t + i and byte
//   16 + 4t + i column 8t + 4 + i (t, i = 0..3): the order in which decoded weights lie in
//   registers.
enum class Codes : int { packed = 0, e4m3 = 1, int8 = 2 };

// The CPU's instruction sets. One binary holds all three; the best that the CPU has is chosen when
// a call comes in.
enum class Isa : int { best = 0, portable = 1, avx2 = 2, avx512_vnni = 3 };

// Where an op runs. `stream` is a cudaStream_t; `capability` is 10 * major + minor, and 0 on the
// CPU.
struct Target {
    int device = -1;  // CUDA device index, -1 for the CPU
    void* stream = nullptr;
    int capability = 0;
    int threads = 1;      // CPU: how many may work; results do not depend on it
    Isa isa = Isa::best;  // CPU: a test may name one; an unsupported one throws
    // GPU: the op reads what the kernel before it on the stream writes, waits for that itself, and
    // may be started while it runs.
    bool waits = false;
};

// x -> codes, ascales, h:   codes = round(rotate?((x + shift?) / smooth) / ascales),  h = x .
// proj_down (raw x, fp32 sums)
struct QuantizeDown {
    int64_t M, K, R;
    const void* x;  // (M, K) x_dtype, rows x_stride elements apart
    int64_t x_stride;
    Dtype x_dtype;
    const void* smooth;     // (K,)   param_dtype
    const void* proj_down;  // (K, R) param_dtype
    Dtype param_dtype;
    bool act_unsigned, rotate;  // never both
    int64_t
        unsigned_from;  // with act_unsigned the column from which on codes are unsigned (0: all),
                        // a multiple of G: a linear that reads attention and a GELU side by side
    Codes codes;
    void* q;         // out: (M, K/2) int8, or (M, K) e4m3 or int8
    float* ascales;  // out: (K/G, M)
    float* h;        // out: (M, R)
};

// out = (codes . W^T, rescaled per group) + h . proj_up^T + bias
struct GemmW4A4Up {
    int64_t M, N, K, R;
    Codes codes;
    const void* q;  // (M, K/2) int8, or (M, K) e4m3 or int8
    bool act_unsigned;
    int64_t unsigned_from;  // as in QuantizeDown
    const float* ascales;   // (K/G, M)
    const float* h;  // (M, R), rows h_stride floats apart (a slice of a wider h: grouped q/k/v)
    int64_t h_stride;
    const void* weight;        // (N, K/2) int8: codes -8..7, low nibble = even column
    const void* weight_scale;  // (K/G, N) param_dtype; may be negative
    const void* proj_up;       // (N, R)   param_dtype
    const void* bias;          // (N,)     param_dtype, or null
    Dtype param_dtype;
    void* out;  // (M, N)   out_dtype
    Dtype out_dtype;
    void*
        workspace;  // workspace_bytes(...) of scratch given by the caller, or null where that is 0
};

// out = quantize_down(gelu_tanh(gemm_w4a4_up(...))): the first layer of an MLP straight into the
// second one's input. y is never stored. h sums over N in a fixed order, through `workspace`.
struct GemmW4A4UpGeluQuantizeDown {
    GemmW4A4Up first;  // first.out is null; first.out_dtype is the dtype that y is rounded to
                       // before the GELU, as the layer's output would be
    int64_t R2;
    const void* smooth2;     // (N,)    param_dtype
    const void* proj_down2;  // (N, R2) param_dtype
    bool act_unsigned2, rotate2;
    Codes codes2;
    void* q2;         // out: (M, N/2) int8, or (M, N) e4m3 or int8
    float* ascales2;  // out: (N/G, M)
    float* h2;        // out: (M, R2)
    void* workspace;  // workspace_bytes(...) of scratch: on a GPU nothing is allocated inside an op
};

// out = x . ((W - 8) * weight_scale + weight_zeros)^T + bias, codes 0..15. One or a few tokens
// (gemv) or some hundred (gemm).
struct W4A16 {
    int64_t M, N, K;
    const void* x;  // (M, K) x_dtype; out has the same dtype
    Dtype x_dtype;
    const void* weight;        // (N, K/2) int8
    const void* weight_scale;  // (K/G, N) param_dtype; may be negative
    const void* weight_zeros;  // (K/G, N) param_dtype, or null: symmetric
    const void* bias;          // (N,)     param_dtype, or null
    Dtype param_dtype;
    void* out;  // (M, N)
};

// out = (x . codebook[index]^T) * scale + bias + addend. A row's indices have `bits` bits each and
// follow one another without gaps: index i occupies the bits i * bits to (i + 1) * bits, bit 0
// being the lowest of byte 0.
struct GemmVQ {
    int64_t M, N, K;   // K a multiple of 8 and of `vector`; a row of indices fills whole bytes
    int bits, vector;  // C = 2^bits codewords of `vector` columns each
    const void* x;     // (M, K) x_dtype
    Dtype x_dtype;
    const void* indices;   // (N, K / vector * bits / 8) bytes
    const void* codebook;  // (C, vector) codebook_dtype; float16 on a GPU
    Dtype codebook_dtype;
    const void* scale;  // (N,) param_dtype, or null: ones
    const void* bias;   // (N,) param_dtype, or null
    Dtype param_dtype;
    const void* addend;  // (M, N) addend_dtype, or null: a low-rank branch
    Dtype addend_dtype;
    void* out;  // (M, N) out_dtype
    Dtype out_dtype;
};

// out = (codes . W8^T) * ascale * channel_scale + (x . proj_down) . proj_up^T + bias, with
// W8 = (table[code] * weight_scale + 64) >> 7 in int8 and codes -127..127 of rotate?(x / smooth), a
// scale a token: integers over all of K.
struct LinearW4A8 {
    int64_t M, N, K, R;
    int64_t group;  // columns that share a weight_scale: 16, 32 or 64
    const void* x;  // (M, K) x_dtype, rows x_stride elements apart; out has the same dtype
    int64_t x_stride;
    Dtype x_dtype;
    const void* smooth;          // (K,)   param_dtype
    const void* proj_down;       // (K, R) param_dtype
    const void* weight;          // (N, K/2) int8: codes 0..15, low nibble = even column
    const void* weight_scale;    // (K/group, N) int8, -127..127
    const float* channel_scale;  // (N,)
    const void* table;           // (16,)  int8, -127..127
    const void* proj_up;         // (N, R) param_dtype
    const void* bias;            // (N,)   param_dtype, or null
    Dtype param_dtype;
    bool rotate;
    void* out;      // (M, N) x_dtype
    void* scratch;  // workspace_bytes(...) given by the caller, or null where that is 0
};

// x -> codes, ascales, h:   v = x / smooth,  s = e4m3(min(max |v| of 16 columns / 6, 448)),
// codes = e2m1(v / s),  h = x . proj_down. GPUs of compute capability 12.0 and 12.1.
struct QuantizeNvfp4Down {
    int64_t M, K, R;
    const void* x;  // as in QuantizeDown
    int64_t x_stride;
    Dtype x_dtype;
    const void* smooth;     // (K,)   param_dtype
    const void* proj_down;  // (K, R) param_dtype
    Dtype param_dtype;
    bool rounded;   // codes by the scale that is stored; else by that before its rounding
    void* q;        // out: (M, K/2) bytes of two e2m1 codes, low nibble = even column
    void* ascales;  // out: (M, K/16) e4m3
    float* h;       // out: (M, R)
};

// out = (codes . W^T, scaled per 16 columns) * weight_scale_2 + h . proj_up^T + bias
struct GemmNvfp4Up {
    int64_t M, N, K, R;
    const void* q;                // (M, K/2)
    const void* ascales;          // (M, K/16) e4m3
    const float* h;               // (M, R)
    const void* weight;           // (N, K/2) as q
    const void* weight_scale;     // (N, K/16) e4m3
    const float* weight_scale_2;  // (N,)
    const void* proj_up;          // (N, R) param_dtype
    const void* bias;             // (N,)   param_dtype, or null
    Dtype param_dtype;
    void* out;  // (M, N) out_dtype
    Dtype out_dtype;
};

#ifndef __CUDACC_RTC__  // the host's part

// What runs an op, in words for people: {"sm80: int4 m16n8k64, tile 128x128", "native int4 ... "}.
struct Route {
    std::string path, reason;
};

namespace cpu {
void quantize_down(const QuantizeDown&, const Target&);
void gemm_w4a4_up(const GemmW4A4Up&, const Target&);
void gemm_w4a4_up_gelu_quantize_down(const GemmW4A4UpGeluQuantizeDown&, const Target&);
void gemv_w4a16(const W4A16&, const Target&);
void gemm_w4a16(const W4A16&, const Target&);
void gemm_vq(const GemmVQ&, const Target&);
void linear_w4a8(const LinearW4A8&, const Target&);
Route route(Op op, int64_t M, int64_t N, int64_t K);
// What the caller must give, for this form of the codes that the op reads; 0 where it needs none.
size_t workspace_bytes(Op op, Codes codes, int64_t M, int64_t N, int64_t K, int64_t R);
}  // namespace cpu

#ifdef NIBBLE_CUDA
namespace cuda {
void quantize_down(const QuantizeDown&, const Target&);
void gemm_w4a4_up(const GemmW4A4Up&, const Target&);
void gemm_w4a4_up_gelu_quantize_down(const GemmW4A4UpGeluQuantizeDown&, const Target&);
void gemv_w4a16(const W4A16&, const Target&);
void gemm_w4a16(const W4A16&, const Target&);
void gemm_vq(const GemmVQ&, const Target&);
void linear_w4a8(const LinearW4A8&, const Target&);
void quantize_nvfp4_down(const QuantizeNvfp4Down&, const Target&);
void gemm_nvfp4_up(const GemmNvfp4Up&, const Target&);
Route route(Op op, int capability, int64_t M, int64_t N, int64_t K);
size_t workspace_bytes(Op op, Codes codes, int capability, int64_t M, int64_t N, int64_t K,
                       int64_t R);
int capability(int device);   // 10 * major + minor; throws std::runtime_error with CUDA's own words
Codes codes(int capability);  // the activation format that this GPU's product reads fastest
}  // namespace cuda
#endif

#endif  // __CUDACC_RTC__

}  // namespace nibble
