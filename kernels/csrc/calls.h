// An op as it comes through a door: one struct of bytes with where it runs, its arguments, and the
// size of its workspace; checked here, then run. Both doors lead here: the Python module
// (module.cpp) and the C library (library.cpp). Python lays the same structs out in
// kernels/backends/compiled.py.
#pragma once

#include <cstring>
#include <memory>

#include "check.h"
#include "nibble.h"
#include "target.h"

namespace nibble {

// A whole linear: quantize_down and gemm_w4a4_up, with what goes between them in scratch memory. On
// the CPU `scratch` may be null, and the call then allocates its own.
struct LinearW4A4 {
    int64_t M, N, K, R;
    const void* x;  // as in QuantizeDown; out has the same dtype
    int64_t x_stride;
    Dtype x_dtype;
    const void *smooth, *proj_down;                      // as in QuantizeDown
    const void *weight, *weight_scale, *proj_up, *bias;  // as in GemmW4A4Up
    Dtype param_dtype;
    bool act_unsigned, rotate;
    int64_t unsigned_from;
    Codes codes;
    void* out;      // (M, N) x_dtype
    void* scratch;  // linear_w4a4_bytes(...)
};

// workspace_size: bytes at the op's `workspace` or `scratch`; 0 for an op that has none.
template <typename Op>
struct Call {
    Target place;  // its capability is asked of the device, whatever the caller says
    Op op;
    int64_t workspace_size;
};

// A copy, so that the bytes may lie anywhere.
template <typename Op>
Call<Op> received(const char* op, const void* bytes, size_t size) {
    Call<Op> call{};
    if (size != sizeof call)
        check::refuse(op, "a call of " + std::to_string(size) + " bytes, and this build's has " +
                              std::to_string(sizeof call));
    std::memcpy(&call, bytes, size);
    return call;
}

namespace calls {

// ---- what every op of a kind refuses ------------------------------------------------------------

inline void pointer(const char* op, const char* name, const void* at, int64_t elements) {
    check::pointer(op, name, reinterpret_cast<Address>(at), elements);
}

inline void workspace(const char* op, const void* at, int64_t given, size_t needed) {
    check::workspace(op, reinterpret_cast<Address>(at), given, needed);
}

inline void dtype(const char* op, const char* name, Dtype given) {
    check::dtype(op, name, int(given));
}

inline void check_quantizer(const char* op, const QuantizeDown& a) {
    check::sizes(op, {{"M", a.M}, {"K", a.K}, {"R", a.R}});
    check::whole_groups(op, {"K", a.K});
    check::flags(op, a.act_unsigned, a.rotate);
    check::unsigned_from(op, a.act_unsigned, a.unsigned_from, a.K);
    check::stride(op, a.x_stride, a.K);
    check::codes(op, "codes", int(a.codes));
    const int64_t mk = check::product(op, "x", {"M", a.M}, {"K", a.K});
    check::product(op, "x", {"M", a.M}, {"x_stride", a.x_stride});
    pointer(op, "x", a.x, mk);
    pointer(op, "smooth", a.smooth, a.K);
    pointer(op, "proj_down", a.proj_down, check::product(op, "proj_down", {"K", a.K}, {"R", a.R}));
    pointer(op, "q", a.q, mk);
    pointer(op, "ascales", a.ascales, mk / GROUP);
    pointer(op, "h", a.h, check::product(op, "h", {"M", a.M}, {"R", a.R}));
    dtype(op, "x_dtype", a.x_dtype);
    dtype(op, "param_dtype", a.param_dtype);
}

// Everything of a product but where its result goes: the plain op and the fused one share it.
inline void check_product(const char* op, const GemmW4A4Up& a) {
    check::sizes(op, {{"M", a.M}, {"N", a.N}, {"K", a.K}, {"R", a.R}, {"h_stride", a.h_stride}});
    check::whole_groups(op, {"K", a.K});
    check::unsigned_from(op, a.act_unsigned, a.unsigned_from, a.K);
    if (a.h_stride < a.R)
        check::refuse(
            op, check::shape({{"h_stride", a.h_stride}, {"R", a.R}}) + ": rows of h would overlap");
    const int64_t mk = check::product(op, "q", {"M", a.M}, {"K", a.K}),
                  nk = check::product(op, "weight", {"N", a.N}, {"K", a.K});
    check::product(op, "out", {"M", a.M}, {"N", a.N});
    check::product(op, "h", {"M", a.M}, {"h_stride", a.h_stride});
    pointer(op, "q", a.q, mk);
    pointer(op, "ascales", a.ascales, mk / GROUP);
    pointer(op, "h", a.h, a.M * a.R);
    pointer(op, "weight", a.weight, nk);
    pointer(op, "weight_scale", a.weight_scale, nk / GROUP);
    pointer(op, "proj_up", a.proj_up, check::product(op, "proj_up", {"N", a.N}, {"R", a.R}));
    pointer(op, "bias", a.bias, 0);
    check::codes(op, "codes", int(a.codes));
    dtype(op, "param_dtype", a.param_dtype);
}

inline void check_w4a16(const char* op, const W4A16& a) {
    check::sizes(op, {{"M", a.M}, {"N", a.N}, {"K", a.K}});
    check::whole_groups(op, {"K", a.K});
    const int64_t nk = check::product(op, "weight", {"N", a.N}, {"K", a.K});
    pointer(op, "x", a.x, check::product(op, "x", {"M", a.M}, {"K", a.K}));
    pointer(op, "weight", a.weight, nk);
    pointer(op, "weight_scale", a.weight_scale, nk / GROUP);
    pointer(op, "weight_zeros", a.weight_zeros, 0);
    pointer(op, "bias", a.bias, 0);
    pointer(op, "out", a.out, check::product(op, "out", {"M", a.M}, {"N", a.N}));
    dtype(op, "x_dtype", a.x_dtype);
    dtype(op, "param_dtype", a.param_dtype);
}

// ---- the ops ------------------------------------------------------------------------------------

inline void quantize_down(const Call<QuantizeDown>& call) {
    constexpr const char* op = "quantize_down";
    const Target place = placed(op, call.place);
    check_quantizer(op, call.op);
    NIBBLE_RUN(quantize_down, call.op, place);
}

inline void gemm_w4a4_up(const Call<GemmW4A4Up>& call) {
    constexpr const char* op = "gemm_w4a4_up";
    const Target place = placed(op, call.place);
    const GemmW4A4Up& a = call.op;
    check_product(op, a);
    pointer(op, "out", a.out, a.M * a.N);
    workspace(op, a.workspace, call.workspace_size,
              workspace_of(Op::gemm_w4a4_up, a.codes, place.capability, a.M, a.N, a.K, a.R));
    dtype(op, "out_dtype", a.out_dtype);
    NIBBLE_RUN(gemm_w4a4_up, a, place);
}

inline void gemm_w4a4_up_gelu_quantize_down(const Call<GemmW4A4UpGeluQuantizeDown>& call) {
    constexpr const char* op = "gemm_w4a4_up_gelu_quantize_down";
    const Target place = placed(op, call.place);
    const GemmW4A4UpGeluQuantizeDown& a = call.op;
    const int64_t M = a.first.M, N = a.first.N;
    check_product(op, a.first);
    check::sizes(op, {{"R2", a.R2}});
    check::whole_groups(op, {"N", N});
    check::flags(op, a.act_unsigned2, a.rotate2);
    pointer(op, "smooth2", a.smooth2, N);
    pointer(op, "proj_down2", a.proj_down2,
            check::product(op, "proj_down2", {"N", N}, {"R2", a.R2}));
    pointer(op, "q2", a.q2, M * N);
    pointer(op, "ascales2", a.ascales2, M * N / GROUP);
    pointer(op, "h2", a.h2, check::product(op, "h2", {"M", M}, {"R2", a.R2}));
    workspace(op, a.workspace, call.workspace_size,
              workspace_of(Op::gemm_w4a4_up_gelu_quantize_down, a.first.codes, place.capability, M,
                           N, a.first.K, a.R2));
    dtype(op, "mid_dtype", a.first.out_dtype);
    check::codes(op, "codes2", int(a.codes2));
    NIBBLE_RUN(gemm_w4a4_up_gelu_quantize_down, a, place);
}

// What lies in the scratch memory of a whole linear: offsets in bytes, each a multiple of 256. The
// codes lie at the beginning.
struct LinearScratch {
    size_t ascales, h, workspace, bytes;
};

inline LinearScratch linear_scratch(int capability, Codes codes, int64_t M, int64_t N, int64_t K,
                                    int64_t R) {
    const auto aligned = [](size_t bytes) { return (bytes + 255) & ~size_t(255); };
    const char* op = "linear_w4a4";
    const size_t mk = check::product(op, "x", {"M", M}, {"K", K});
    const size_t mr = check::product(op, "h", {"M", M}, {"R", R});
    LinearScratch layout{};
    layout.ascales = aligned(codes == Codes::packed ? mk / 2 : mk);
    layout.h = layout.ascales + aligned(mk / GROUP * sizeof(float));
    layout.workspace = layout.h + aligned(mr * sizeof(float));
    layout.bytes =
        layout.workspace + aligned(workspace_of(Op::gemm_w4a4_up, codes, capability, M, N, K, R));
    return layout;
}

inline void linear_w4a4(const Call<LinearW4A4>& call) {
    constexpr const char* op = "linear_w4a4";
    const Target place = placed(op, call.place);
    const LinearW4A4& a = call.op;
    check::sizes(op, {{"M", a.M}, {"N", a.N}, {"K", a.K}, {"R", a.R}});
    check::codes(op, "codes", int(a.codes));
    const LinearScratch layout = linear_scratch(place.capability, a.codes, a.M, a.N, a.K, a.R);
    std::unique_ptr<char[]> own;
    Address scratch = reinterpret_cast<Address>(a.scratch);
    if (!scratch && on_cpu(place)) {
        own.reset(new char[layout.bytes + 255]);
        scratch = (reinterpret_cast<Address>(own.get()) + 255) & ~Address(255);
    } else {
        check::workspace(op, scratch, call.workspace_size, layout.bytes);
    }
    float* ascales = static_cast<float*>(at(scratch + layout.ascales));
    float* h = static_cast<float*>(at(scratch + layout.h));
    const QuantizeDown first{a.M,           a.K,
                             a.R,           a.x,
                             a.x_stride,    a.x_dtype,
                             a.smooth,      a.proj_down,
                             a.param_dtype, a.act_unsigned,
                             a.rotate,      a.unsigned_from,
                             a.codes,       at(scratch),
                             ascales,       h};
    const GemmW4A4Up second{a.M,
                            a.N,
                            a.K,
                            a.R,
                            a.codes,
                            at(scratch),
                            a.act_unsigned,
                            a.unsigned_from,
                            ascales,
                            h,
                            a.R,
                            a.weight,
                            a.weight_scale,
                            a.proj_up,
                            a.bias,
                            a.param_dtype,
                            a.out,
                            a.x_dtype,
                            at(scratch + layout.workspace)};
    check_quantizer(op, first);
    check_product(op, second);
    pointer(op, "out", a.out, a.M * a.N);
    NIBBLE_RUN(quantize_down, first, place);
    Target next = place;
    next.waits = true;
    NIBBLE_RUN(gemm_w4a4_up, second, next);
}

inline void gemv_w4a16(const Call<W4A16>& call) {
    const Target place = placed("gemv_w4a16", call.place);
    check_w4a16("gemv_w4a16", call.op);
    NIBBLE_RUN(gemv_w4a16, call.op, place);
}

inline void gemm_w4a16(const Call<W4A16>& call) {
    const Target place = placed("gemm_w4a16", call.place);
    check_w4a16("gemm_w4a16", call.op);
    NIBBLE_RUN(gemm_w4a16, call.op, place);
}

inline void gemm_vq(const Call<GemmVQ>& call) {
    constexpr const char* op = "gemm_vq";
    const Target place = placed(op, call.place);
    const GemmVQ& a = call.op;
    check::sizes(op, {{"M", a.M}, {"N", a.N}, {"K", a.K}});
    check::codebook(op, a.K, a.bits, a.vector);
    const int64_t mn = check::product(op, "out", {"M", a.M}, {"N", a.N});
    pointer(op, "x", a.x, check::product(op, "x", {"M", a.M}, {"K", a.K}));
    pointer(op, "indices", a.indices, check::product(op, "indices", {"N", a.N}, {"K", a.K}));
    pointer(op, "codebook", a.codebook, int64_t(a.vector) << a.bits);
    pointer(op, "scale", a.scale, 0);
    pointer(op, "bias", a.bias, 0);
    pointer(op, "addend", a.addend, 0);
    pointer(op, "out", a.out, mn);
    dtype(op, "x_dtype", a.x_dtype);
    dtype(op, "codebook_dtype", a.codebook_dtype);
    dtype(op, "param_dtype", a.param_dtype);
    dtype(op, "addend_dtype", a.addend_dtype);
    dtype(op, "out_dtype", a.out_dtype);
    NIBBLE_RUN(gemm_vq, a, place);
}

inline void linear_w4a8(const Call<LinearW4A8>& call) {
    constexpr const char* op = "linear_w4a8";
    const Target place = placed(op, call.place);
    const LinearW4A8& a = call.op;
    check::sizes(op, {{"M", a.M}, {"N", a.N}, {"K", a.K}, {"R", a.R}});
    check::whole_groups(op, {"K", a.K});
    check::whole_numbers(op, a.K, a.group);
    check::stride(op, a.x_stride, a.K);
    const int64_t mk = check::product(op, "x", {"M", a.M}, {"K", a.K}),
                  nk = check::product(op, "weight", {"N", a.N}, {"K", a.K});
    check::product(op, "x", {"M", a.M}, {"x_stride", a.x_stride});
    pointer(op, "x", a.x, mk);
    pointer(op, "smooth", a.smooth, a.K);
    pointer(op, "proj_down", a.proj_down, check::product(op, "proj_down", {"K", a.K}, {"R", a.R}));
    pointer(op, "weight", a.weight, nk);
    pointer(op, "weight_scale", a.weight_scale, nk / a.group);
    pointer(op, "channel_scale", a.channel_scale, a.N);
    pointer(op, "table", a.table, 16);
    pointer(op, "proj_up", a.proj_up, check::product(op, "proj_up", {"N", a.N}, {"R", a.R}));
    pointer(op, "bias", a.bias, 0);
    pointer(op, "out", a.out, check::product(op, "out", {"M", a.M}, {"N", a.N}));
    dtype(op, "x_dtype", a.x_dtype);
    dtype(op, "param_dtype", a.param_dtype);
    workspace(op, a.scratch, call.workspace_size,
              workspace_of(Op::linear_w4a8, Codes::int8, place.capability, a.M, a.N, a.K, a.R));
    NIBBLE_RUN(linear_w4a8, a, place);
}

}  // namespace calls
}  // namespace nibble

#include "calls_nvfp4.h"

// Every op that has a door, with its struct.
#define NIBBLE_DOORS(DOOR)                                            \
    DOOR(quantize_down, QuantizeDown)                                 \
    DOOR(gemm_w4a4_up, GemmW4A4Up)                                    \
    DOOR(gemm_w4a4_up_gelu_quantize_down, GemmW4A4UpGeluQuantizeDown) \
    DOOR(linear_w4a4, LinearW4A4)                                     \
    DOOR(gemv_w4a16, W4A16)                                           \
    DOOR(gemm_w4a16, W4A16)                                           \
    DOOR(gemm_vq, GemmVQ)                                             \
    DOOR(linear_w4a8, LinearW4A8)                                     \
    DOOR(quantize_nvfp4_down, QuantizeNvfp4Down)                      \
    DOOR(gemm_nvfp4_up, GemmNvfp4Up)
