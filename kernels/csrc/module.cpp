// The Python module nibble_kernels: numbers in, kernels started, nothing kept. It knows no torch;
// kernels/backends flattens tensors.
//
// Every op takes its arguments by name: where it runs (device, stream, threads, isa), sizes, and
// pointers as integers. A wrong value raises ValueError (std::invalid_argument) before anything
// runs; CUDA's own errors become RuntimeError. The GIL is free while an op works.
#include <pybind11/pybind11.h>

#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "arguments.h"
#include "check.h"
#include "nibble.h"
#include "target.h"

#ifndef NIBBLE_VERSION
#define NIBBLE_VERSION "0"
#endif
#ifndef NIBBLE_ARCHITECTURES
#define NIBBLE_ARCHITECTURES ""
#endif
#ifndef NIBBLE_CUDA_VERSION
#define NIBBLE_CUDA_VERSION ""
#endif

namespace py = pybind11;

namespace nibble {
namespace {

void quantize_down(int device, Address stream, int threads, int isa, int64_t M, int64_t K,
                   int64_t R, Address x, int64_t x_stride, int x_dtype, Address smooth,
                   Address proj_down, int param_dtype, bool act_unsigned, bool rotate,
                   int64_t unsigned_from, int codes, Address q, Address ascales, Address h) {
    constexpr const char* op = "quantize_down";
    const Target place = target_of(op, device, stream, threads, isa);
    const QuantizeDown arguments =
        quantizer(op, M, K, R, x, x_stride, x_dtype, smooth, proj_down, param_dtype, act_unsigned,
                  rotate, unsigned_from, codes, q, ascales, h);
    py::gil_scoped_release release;
    NIBBLE_RUN(quantize_down, arguments, place);
}

void gemm_w4a4_up(int device, Address stream, int threads, int isa, int64_t M, int64_t N, int64_t K,
                  int64_t R, int codes, Address q, bool act_unsigned, int64_t unsigned_from,
                  Address ascales, Address h, int64_t h_stride, Address weight,
                  Address weight_scale, Address proj_up, Address bias, int param_dtype, Address out,
                  int out_dtype, Address workspace, int64_t workspace_size) {
    constexpr const char* op = "gemm_w4a4_up";
    const Target place = target_of(op, device, stream, threads, isa);
    GemmW4A4Up arguments = product(op, M, N, K, R, codes, q, act_unsigned, unsigned_from, ascales,
                                   h, h_stride, weight, weight_scale, proj_up, bias, param_dtype);
    check::pointer(op, "out", out, M * N);
    check::workspace(op, workspace, workspace_size,
                     workspace_of(Op::gemm_w4a4_up, arguments.codes, place.capability, M, N, K, R));
    arguments.out = at(out);
    arguments.out_dtype = check::dtype(op, "out_dtype", out_dtype);
    arguments.workspace = at(workspace);
    py::gil_scoped_release release;
    NIBBLE_RUN(gemm_w4a4_up, arguments, place);
}

void gemm_w4a4_up_gelu_quantize_down(int device, Address stream, int threads, int isa, int64_t M,
                                     int64_t N, int64_t K, int64_t R, int codes, Address q,
                                     bool act_unsigned, int64_t unsigned_from, Address ascales,
                                     Address h, int64_t h_stride, Address weight,
                                     Address weight_scale, Address proj_up, Address bias,
                                     int param_dtype, int mid_dtype, int64_t R2, Address smooth2,
                                     Address proj_down2, bool act_unsigned2, bool rotate2,
                                     int codes2, Address q2, Address ascales2, Address h2,
                                     Address workspace, int64_t workspace_size) {
    constexpr const char* op = "gemm_w4a4_up_gelu_quantize_down";
    const Target place = target_of(op, device, stream, threads, isa);
    GemmW4A4UpGeluQuantizeDown arguments{};
    arguments.first = product(op, M, N, K, R, codes, q, act_unsigned, unsigned_from, ascales, h,
                              h_stride, weight, weight_scale, proj_up, bias, param_dtype);
    check::sizes(op, {{"R2", R2}});
    check::whole_groups(op, {"N", N});
    check::flags(op, act_unsigned2, rotate2);
    check::pointer(op, "smooth2", smooth2, N);
    check::pointer(op, "proj_down2", proj_down2,
                   check::product(op, "proj_down2", {"N", N}, {"R2", R2}));
    check::pointer(op, "q2", q2, M * N);
    check::pointer(op, "ascales2", ascales2, M * N / GROUP);
    check::pointer(op, "h2", h2, check::product(op, "h2", {"M", M}, {"R2", R2}));
    check::workspace(op, workspace, workspace_size,
                     workspace_of(Op::gemm_w4a4_up_gelu_quantize_down, arguments.first.codes,
                                  place.capability, M, N, K, R2));
    arguments.first.out_dtype = check::dtype(op, "mid_dtype", mid_dtype);
    arguments.R2 = R2;
    arguments.smooth2 = at(smooth2), arguments.proj_down2 = at(proj_down2);
    arguments.act_unsigned2 = act_unsigned2, arguments.rotate2 = rotate2;
    arguments.codes2 = check::codes(op, "codes2", codes2);
    arguments.q2 = at(q2);
    arguments.ascales2 = static_cast<float*>(at(ascales2)),
    arguments.h2 = static_cast<float*>(at(h2));
    arguments.workspace = at(workspace);
    py::gil_scoped_release release;
    NIBBLE_RUN(gemm_w4a4_up_gelu_quantize_down, arguments, place);
}

// A whole linear: quantize_down and gemm_w4a4_up, with what goes between them in scratch memory. On
// the CPU `scratch` may be null, and the call then allocates its own.
void linear_w4a4(int device, Address stream, int threads, int isa, int64_t M, int64_t N, int64_t K,
                 int64_t R, Address x, int64_t x_stride, int x_dtype, Address smooth,
                 Address proj_down, Address weight, Address weight_scale, Address proj_up,
                 Address bias, int param_dtype, bool act_unsigned, bool rotate,
                 int64_t unsigned_from, int codes, Address out, Address scratch,
                 int64_t scratch_size) {
    constexpr const char* op = "linear_w4a4";
    const Target target = target_of(op, device, stream, threads, isa);
    check::sizes(op, {{"M", M}, {"N", N}, {"K", K}, {"R", R}});
    const Codes form = check::codes(op, "codes", codes);
    const LinearScratch layout = linear_scratch(target.capability, form, M, N, K, R);
    std::unique_ptr<char[]> own;
    if (!scratch && on_cpu(target)) {
        own.reset(new char[layout.bytes + 255]);
        scratch = (reinterpret_cast<Address>(own.get()) + 255) & ~Address(255);
    } else {
        check::workspace(op, scratch, scratch_size, layout.bytes);
    }
    const Address ascales = scratch + layout.ascales, h = scratch + layout.h;
    const QuantizeDown first =
        quantizer(op, M, K, R, x, x_stride, x_dtype, smooth, proj_down, param_dtype, act_unsigned,
                  rotate, unsigned_from, codes, scratch, ascales, h);
    GemmW4A4Up second = product(op, M, N, K, R, codes, scratch, act_unsigned, unsigned_from,
                                ascales, h, R, weight, weight_scale, proj_up, bias, param_dtype);
    check::pointer(op, "out", out, M * N);
    second.out = at(out);
    second.out_dtype = first.x_dtype;
    second.workspace = at(scratch + layout.workspace);
    py::gil_scoped_release release;
    NIBBLE_RUN(quantize_down, first, target);
    Target next = target;
    next.waits = true;
    NIBBLE_RUN(gemm_w4a4_up, second, next);
}

void gemv_w4a16(int device, Address stream, int threads, int isa, int64_t M, int64_t N, int64_t K,
                Address x, int x_dtype, Address weight, Address weight_scale, Address weight_zeros,
                Address bias, int param_dtype, Address out) {
    const Target place = target_of("gemv_w4a16", device, stream, threads, isa);
    const W4A16 arguments = w4a16("gemv_w4a16", M, N, K, x, x_dtype, weight, weight_scale,
                                  weight_zeros, bias, param_dtype, out);
    py::gil_scoped_release release;
    NIBBLE_RUN(gemv_w4a16, arguments, place);
}

void gemm_w4a16(int device, Address stream, int threads, int isa, int64_t M, int64_t N, int64_t K,
                Address x, int x_dtype, Address weight, Address weight_scale, Address weight_zeros,
                Address bias, int param_dtype, Address out) {
    const Target place = target_of("gemm_w4a16", device, stream, threads, isa);
    const W4A16 arguments = w4a16("gemm_w4a16", M, N, K, x, x_dtype, weight, weight_scale,
                                  weight_zeros, bias, param_dtype, out);
    py::gil_scoped_release release;
    NIBBLE_RUN(gemm_w4a16, arguments, place);
}

void gemm_vq(int device, Address stream, int threads, int isa, int64_t M, int64_t N, int64_t K,
             int bits, int vector, Address x, int x_dtype, Address indices, Address codebook,
             int codebook_dtype, Address scale, Address bias, int param_dtype, Address addend,
             int addend_dtype, Address out, int out_dtype) {
    constexpr const char* op = "gemm_vq";
    const Target place = target_of(op, device, stream, threads, isa);
    check::sizes(op, {{"M", M}, {"N", N}, {"K", K}});
    check::codebook(op, K, bits, vector);
    const int64_t mn = check::product(op, "out", {"M", M}, {"N", N});
    check::pointer(op, "x", x, check::product(op, "x", {"M", M}, {"K", K}));
    check::pointer(op, "indices", indices, check::product(op, "indices", {"N", N}, {"K", K}));
    check::pointer(op, "codebook", codebook, int64_t(vector) << bits);
    check::pointer(op, "scale", scale, 0);
    check::pointer(op, "bias", bias, 0);
    check::pointer(op, "addend", addend, 0);
    check::pointer(op, "out", out, mn);
    const GemmVQ arguments{M,
                           N,
                           K,
                           bits,
                           vector,
                           at(x),
                           check::dtype(op, "x_dtype", x_dtype),
                           at(indices),
                           at(codebook),
                           check::dtype(op, "codebook_dtype", codebook_dtype),
                           at(scale),
                           at(bias),
                           check::dtype(op, "param_dtype", param_dtype),
                           at(addend),
                           check::dtype(op, "addend_dtype", addend_dtype),
                           at(out),
                           check::dtype(op, "out_dtype", out_dtype)};
    py::gil_scoped_release release;
    NIBBLE_RUN(gemm_vq, arguments, place);
}

// ---- questions ----------------------------------------------------------------------------------

int capability(int device) { return device == -1 ? 0 : known_capability(device); }

void known_gpu(int capability) {
    if (capability < 0)
        throw std::invalid_argument("capability=" + std::to_string(capability) + " is negative");
    if (capability && !HAS_CUDA)
        throw std::invalid_argument("capability=" + std::to_string(capability) +
                                    ": built without CUDA");
}

std::pair<std::string, std::string> route(const std::string& name, int capability, int64_t M,
                                          int64_t N, int64_t K) {
    const Op op = op_named(name);
    known_gpu(capability);
    check::sizes("route", {{"M", M}, {"N", N}, {"K", K}});
#ifdef NIBBLE_CUDA
    const Route found = capability ? cuda::route(op, capability, M, N, K) : cpu::route(op, M, N, K);
#else
    const Route found = cpu::route(op, M, N, K);
#endif
    return {found.path, found.reason};
}

size_t workspace_bytes(const std::string& name, int capability, int64_t M, int64_t N, int64_t K,
                       int64_t R, int codes) {
    const Op op = op_named(name);
    known_gpu(capability);
    check::sizes("workspace_bytes", {{"M", M}, {"N", N}, {"K", K}, {"R", R}});
    return workspace_of(op, check::codes("workspace_bytes", "codes", codes), capability, M, N, K,
                        R);
}

size_t linear_w4a4_bytes(int capability, int64_t M, int64_t N, int64_t K, int64_t R, int codes) {
    known_gpu(capability);
    check::sizes("linear_w4a4_bytes", {{"M", M}, {"N", N}, {"K", K}, {"R", R}});
    const Codes form = check::codes("linear_w4a4_bytes", "codes", codes);
    return linear_scratch(capability, form, M, N, K, R).bytes;
}

int codes(int capability) {
    known_gpu(capability);
#ifdef NIBBLE_CUDA
    if (capability) return int(cuda::codes(capability));
#endif
    return int(Codes::packed);
}

// The backend itself is asked, by one group through the smallest op: an instruction set that this
// CPU lacks throws.
bool runs(Isa isa) {
    alignas(16) float x[GROUP] = {}, smooth[GROUP];
    alignas(16) float scale[4], unused[4];
    alignas(16) int8_t q[GROUP / 2];
    for (float& value : smooth) value = 1;
    Target place;
    place.isa = isa;
    try {
        cpu::quantize_down({1, GROUP, 0, x, GROUP, Dtype::f32, smooth, unused, Dtype::f32, false,
                            false, 0, Codes::packed, q, scale, unused},
                           place);
    } catch (const std::exception&) {
        return false;
    }
    return true;
}

py::tuple cpu_isas() {
    py::list found;
    const std::pair<Isa, const char*> all[] = {
        {Isa::portable, "portable"}, {Isa::avx2, "avx2"}, {Isa::avx512_vnni, "avx512_vnni"}};
    for (const auto& [isa, name] : all) {
        if (runs(isa)) found.append(name);
    }
    return py::tuple(found);
}

py::dict build_info() {
    py::dict info;
#if defined(__clang__)
    info["compiler"] = "clang " __clang_version__;
#elif defined(__GNUC__)
    info["compiler"] = "gcc " __VERSION__;
#elif defined(_MSC_VER)
    info["compiler"] = "msvc " + std::to_string(_MSC_FULL_VER);
#else
    info["compiler"] = "unknown";
#endif
    info["cuda"] = NIBBLE_CUDA_VERSION;
    info["architectures"] = NIBBLE_ARCHITECTURES;
    info["pybind11"] =
        std::to_string(PYBIND11_VERSION_MAJOR) + "." + std::to_string(PYBIND11_VERSION_MINOR);
    return info;
}

}  // namespace
}  // namespace nibble

PYBIND11_MODULE(nibble_kernels, m) {
    using namespace nibble;
    m.doc() =
        "Compiled 4-bit kernels for the node pack Nibble. Raw pointers; use them through "
        "nibble.kernels.";
    m.attr("ABI") = ABI;
    m.attr("__version__") = NIBBLE_VERSION;
    m.attr("DEVICES") =
        HAS_CUDA ? py::tuple(py::make_tuple("cpu", "cuda")) : py::tuple(py::make_tuple("cpu"));
#define NIBBLE_PLACE \
    py::kw_only(), py::arg("device"), py::arg("stream"), py::arg("threads"), py::arg("isa")
#define NIBBLE_PRODUCT                                                                       \
    py::arg("M"), py::arg("N"), py::arg("K"), py::arg("R"), py::arg("codes"), py::arg("q"),  \
        py::arg("act_unsigned"), py::arg("unsigned_from"), py::arg("ascales"), py::arg("h"), \
        py::arg("h_stride"), py::arg("weight"), py::arg("weight_scale"), py::arg("proj_up"), \
        py::arg("bias"), py::arg("param_dtype")
#define NIBBLE_W4A16                                                                          \
    NIBBLE_PLACE, py::arg("M"), py::arg("N"), py::arg("K"), py::arg("x"), py::arg("x_dtype"), \
        py::arg("weight"), py::arg("weight_scale"), py::arg("weight_zeros"), py::arg("bias"), \
        py::arg("param_dtype"), py::arg("out")
    m.def("quantize_down", &quantize_down, NIBBLE_PLACE, py::arg("M"), py::arg("K"), py::arg("R"),
          py::arg("x"), py::arg("x_stride"), py::arg("x_dtype"), py::arg("smooth"),
          py::arg("proj_down"), py::arg("param_dtype"), py::arg("act_unsigned"), py::arg("rotate"),
          py::arg("unsigned_from"), py::arg("codes"), py::arg("q"), py::arg("ascales"),
          py::arg("h"));
    m.def("gemm_w4a4_up", &gemm_w4a4_up, NIBBLE_PLACE, NIBBLE_PRODUCT, py::arg("out"),
          py::arg("out_dtype"), py::arg("workspace") = 0, py::arg("workspace_size") = 0);
    m.def("gemm_w4a4_up_gelu_quantize_down", &gemm_w4a4_up_gelu_quantize_down, NIBBLE_PLACE,
          NIBBLE_PRODUCT, py::arg("mid_dtype"), py::arg("R2"), py::arg("smooth2"),
          py::arg("proj_down2"), py::arg("act_unsigned2"), py::arg("rotate2"), py::arg("codes2"),
          py::arg("q2"), py::arg("ascales2"), py::arg("h2"), py::arg("workspace") = 0,
          py::arg("workspace_size") = 0);
    m.def("linear_w4a4", &linear_w4a4, NIBBLE_PLACE, py::arg("M"), py::arg("N"), py::arg("K"),
          py::arg("R"), py::arg("x"), py::arg("x_stride"), py::arg("x_dtype"), py::arg("smooth"),
          py::arg("proj_down"), py::arg("weight"), py::arg("weight_scale"), py::arg("proj_up"),
          py::arg("bias"), py::arg("param_dtype"), py::arg("act_unsigned"), py::arg("rotate"),
          py::arg("unsigned_from"), py::arg("codes"), py::arg("out"), py::arg("scratch") = 0,
          py::arg("scratch_size") = 0);
    m.def("gemv_w4a16", &gemv_w4a16, NIBBLE_W4A16);
    m.def("gemm_w4a16", &gemm_w4a16, NIBBLE_W4A16);
    m.def("gemm_vq", &gemm_vq, NIBBLE_PLACE, py::arg("M"), py::arg("N"), py::arg("K"),
          py::arg("bits"), py::arg("vector"), py::arg("x"), py::arg("x_dtype"), py::arg("indices"),
          py::arg("codebook"), py::arg("codebook_dtype"), py::arg("scale"), py::arg("bias"),
          py::arg("param_dtype"), py::arg("addend"), py::arg("addend_dtype"), py::arg("out"),
          py::arg("out_dtype"));
    m.def("capability", &capability, py::arg("device"),
          "10 * major + minor of a CUDA device; 0 for -1, the CPU.");
    m.def("route", &route, py::arg("op"), py::arg("capability"), py::arg("M"), py::arg("N"),
          py::arg("K"), "(path, reason) in words.");
    m.def("workspace_bytes", &workspace_bytes, py::arg("op"), py::arg("capability"), py::arg("M"),
          py::arg("N"), py::arg("K"), py::arg("R"), py::arg("codes") = 0,
          "Scratch that the caller gives; R is that of the h which the op writes, where it writes "
          "one.");
    m.def("linear_w4a4_bytes", &linear_w4a4_bytes, py::arg("capability"), py::arg("M"),
          py::arg("N"), py::arg("K"), py::arg("R"), py::arg("codes"),
          "Scratch that linear_w4a4 wants.");
    m.def("codes", &codes, py::arg("capability"),
          "The form of activation codes that this device's product reads fastest.");
    m.def("cpu_isas", &cpu_isas,
          "Names of the instruction sets that this CPU can run, slowest first.");
    m.def("build_info", &build_info);
}
