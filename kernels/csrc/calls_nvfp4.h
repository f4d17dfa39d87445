// The ops of 4-bit floats as they come through a door: the part of calls.h that is theirs, which
// includes it.
#pragma once

namespace nibble::calls {

// A GPU's alone: the CPU computes 4-bit floats in plain torch.
inline void on_gpu(const char* op, const Target& place) {
    if (on_cpu(place)) check::refuse(op, "there is no such kernel for the CPU");
}

inline void parameters_of_16_bits(const char* op, Dtype given) {
    dtype(op, "param_dtype", given);
    if (given == Dtype::f32)
        check::refuse(op, "on a GPU parameters are float16 or bfloat16, not float32");
}

inline void quantize_nvfp4_down(const Call<QuantizeNvfp4Down>& call) {
    constexpr const char* op = "quantize_nvfp4_down";
    [[maybe_unused]] const Target place = placed(op, call.place);
    const QuantizeNvfp4Down& a = call.op;
    check::sizes(op, {{"M", a.M}, {"K", a.K}, {"R", a.R}});
    check::whole_groups(op, {"K", a.K});
    check::stride(op, a.x_stride, a.K);
    const int64_t mk = check::product(op, "x", {"M", a.M}, {"K", a.K});
    check::product(op, "x", {"M", a.M}, {"x_stride", a.x_stride});
    pointer(op, "x", a.x, mk);
    pointer(op, "smooth", a.smooth, a.K);
    pointer(op, "proj_down", a.proj_down, check::product(op, "proj_down", {"K", a.K}, {"R", a.R}));
    pointer(op, "q", a.q, mk);
    pointer(op, "ascales", a.ascales, mk);
    pointer(op, "h", a.h, check::product(op, "h", {"M", a.M}, {"R", a.R}));
    dtype(op, "x_dtype", a.x_dtype);
    parameters_of_16_bits(op, a.param_dtype);
    on_gpu(op, place);
#ifdef NIBBLE_CUDA
    cuda::quantize_nvfp4_down(a, place);
#endif
}

inline void gemm_nvfp4_up(const Call<GemmNvfp4Up>& call) {
    constexpr const char* op = "gemm_nvfp4_up";
    [[maybe_unused]] const Target place = placed(op, call.place);
    const GemmNvfp4Up& a = call.op;
    check::sizes(op, {{"M", a.M}, {"N", a.N}, {"K", a.K}, {"R", a.R}});
    check::whole_groups(op, {"K", a.K});
    const int64_t mk = check::product(op, "q", {"M", a.M}, {"K", a.K}),
                  nk = check::product(op, "weight", {"N", a.N}, {"K", a.K});
    pointer(op, "q", a.q, mk);
    pointer(op, "ascales", a.ascales, mk);
    pointer(op, "h", a.h, check::product(op, "h", {"M", a.M}, {"R", a.R}));
    pointer(op, "weight", a.weight, nk);
    pointer(op, "weight_scale", a.weight_scale, nk);
    pointer(op, "weight_scale_2", a.weight_scale_2, a.N);
    pointer(op, "proj_up", a.proj_up, check::product(op, "proj_up", {"N", a.N}, {"R", a.R}));
    pointer(op, "bias", a.bias, 0);
    pointer(op, "out", a.out, check::product(op, "out", {"M", a.M}, {"N", a.N}));
    dtype(op, "out_dtype", a.out_dtype);
    parameters_of_16_bits(op, a.param_dtype);
    on_gpu(op, place);
#ifdef NIBBLE_CUDA
    cuda::gemm_nvfp4_up(a, place);
#endif
}

}  // namespace nibble::calls
