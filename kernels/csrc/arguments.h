// Numbers from Python into the ops' structs of nibble.h, checked: what backends may rely on.
#pragma once

#include "check.h"
#include "nibble.h"
#include "target.h"

namespace nibble {

inline QuantizeDown quantizer(const char* op, int64_t M, int64_t K, int64_t R, Address x,
                              int64_t x_stride, int x_dtype, Address smooth, Address proj_down,
                              int param_dtype, bool act_unsigned, bool rotate,
                              int64_t unsigned_from, int codes, Address q, Address ascales,
                              Address h) {
    check::sizes(op, {{"M", M}, {"K", K}, {"R", R}});
    check::whole_groups(op, {"K", K});
    check::flags(op, act_unsigned, rotate);
    check::unsigned_from(op, act_unsigned, unsigned_from, K);
    check::stride(op, x_stride, K);
    const Codes form = check::codes(op, "codes", codes);
    const int64_t mk = check::product(op, "x", {"M", M}, {"K", K});
    check::product(op, "x", {"M", M}, {"x_stride", x_stride});
    check::pointer(op, "x", x, mk);
    check::pointer(op, "smooth", smooth, K);
    check::pointer(op, "proj_down", proj_down, check::product(op, "proj_down", {"K", K}, {"R", R}));
    check::pointer(op, "q", q, mk);
    check::pointer(op, "ascales", ascales, mk / GROUP);
    check::pointer(op, "h", h, check::product(op, "h", {"M", M}, {"R", R}));
    return {M,
            K,
            R,
            at(x),
            x_stride,
            check::dtype(op, "x_dtype", x_dtype),
            at(smooth),
            at(proj_down),
            check::dtype(op, "param_dtype", param_dtype),
            act_unsigned,
            rotate,
            unsigned_from,
            form,
            at(q),
            static_cast<float*>(at(ascales)),
            static_cast<float*>(at(h))};
}

// Everything of a product but where its result goes: the plain op and the fused one share it.
inline GemmW4A4Up product(const char* op, int64_t M, int64_t N, int64_t K, int64_t R, int codes,
                          Address q, bool act_unsigned, int64_t unsigned_from, Address ascales,
                          Address h, int64_t h_stride, Address weight, Address weight_scale,
                          Address proj_up, Address bias, int param_dtype) {
    check::sizes(op, {{"M", M}, {"N", N}, {"K", K}, {"R", R}, {"h_stride", h_stride}});
    check::whole_groups(op, {"K", K});
    check::unsigned_from(op, act_unsigned, unsigned_from, K);
    if (h_stride < R)
        check::refuse(
            op, check::shape({{"h_stride", h_stride}, {"R", R}}) + ": rows of h would overlap");
    const int64_t mk = check::product(op, "q", {"M", M}, {"K", K}),
                  nk = check::product(op, "weight", {"N", N}, {"K", K});
    check::product(op, "out", {"M", M}, {"N", N});
    check::product(op, "h", {"M", M}, {"h_stride", h_stride});
    check::pointer(op, "q", q, mk);
    check::pointer(op, "ascales", ascales, mk / GROUP);
    check::pointer(op, "h", h, M * R);
    check::pointer(op, "weight", weight, nk);
    check::pointer(op, "weight_scale", weight_scale, nk / GROUP);
    check::pointer(op, "proj_up", proj_up, check::product(op, "proj_up", {"N", N}, {"R", R}));
    check::pointer(op, "bias", bias, 0);
    GemmW4A4Up arguments{};
    arguments.M = M, arguments.N = N, arguments.K = K, arguments.R = R;
    arguments.codes = check::codes(op, "codes", codes);
    arguments.q = at(q);
    arguments.act_unsigned = act_unsigned, arguments.unsigned_from = unsigned_from;
    arguments.ascales = static_cast<const float*>(at(ascales));
    arguments.h = static_cast<const float*>(at(h));
    arguments.h_stride = h_stride;
    arguments.weight = at(weight), arguments.weight_scale = at(weight_scale);
    arguments.proj_up = at(proj_up), arguments.bias = at(bias);
    arguments.param_dtype = check::dtype(op, "param_dtype", param_dtype);
    return arguments;
}

inline W4A16 w4a16(const char* op, int64_t M, int64_t N, int64_t K, Address x, int x_dtype,
                   Address weight, Address weight_scale, Address weight_zeros, Address bias,
                   int param_dtype, Address out) {
    check::sizes(op, {{"M", M}, {"N", N}, {"K", K}});
    check::whole_groups(op, {"K", K});
    const int64_t nk = check::product(op, "weight", {"N", N}, {"K", K});
    check::pointer(op, "x", x, check::product(op, "x", {"M", M}, {"K", K}));
    check::pointer(op, "weight", weight, nk);
    check::pointer(op, "weight_scale", weight_scale, nk / GROUP);
    check::pointer(op, "weight_zeros", weight_zeros, 0);
    check::pointer(op, "bias", bias, 0);
    check::pointer(op, "out", out, check::product(op, "out", {"M", M}, {"N", N}));
    return {M,
            N,
            K,
            at(x),
            check::dtype(op, "x_dtype", x_dtype),
            at(weight),
            at(weight_scale),
            at(weight_zeros),
            at(bias),
            check::dtype(op, "param_dtype", param_dtype),
            at(out)};
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

}  // namespace nibble
