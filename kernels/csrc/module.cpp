// The Python module nibble_kernels: numbers in, kernels started, nothing kept. It knows no torch;
// kernels/backends flattens tensors.
//
// Every op takes its arguments by name: where it runs (device, stream, threads, isa), sizes, and
// pointers as integers. A wrong value raises ValueError (std::invalid_argument) before anything
// runs; CUDA's own errors become RuntimeError. The GIL is free while an op works.
#include <pybind11/pybind11.h>

#include <atomic>
#include <string>
#include <utility>
#include <vector>

#include "check.h"
#include "nibble.h"

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

using check::Address;

#ifdef NIBBLE_CUDA
constexpr bool HAS_CUDA = true;
#else
constexpr bool HAS_CUDA = false;
#endif

void* at(Address address) { return reinterpret_cast<void*>(address); }

#ifdef NIBBLE_CUDA
// Asked of the driver once a device; 0 means not asked yet. A device's capability never changes, so
// a race writes the same number.
int known_capability(int device) {
    static std::atomic<int> known[64];
    if (device < 0 || device >= 64)
        throw std::invalid_argument("device " + std::to_string(device) +
                                    " is no CUDA device index");
    int found = known[device].load(std::memory_order_relaxed);
    if (!found) known[device].store(found = cuda::capability(device), std::memory_order_relaxed);
    return found;
}
#else
int known_capability(int device) {
    throw std::invalid_argument("device " + std::to_string(device) +
                                ": this nibble_kernels was built without CUDA");
}
#endif

Target target_of(const char* op, int device, Address stream, int threads, int isa) {
    Target place;
    if (device < -1)
        check::refuse(op, "device=" + std::to_string(device) +
                              " is neither -1 (the CPU) nor a CUDA device index");
    if (threads < 1) check::refuse(op, "threads=" + std::to_string(threads) + " is less than 1");
    place.device = device;
    place.stream = at(stream);
    place.threads = threads;
    place.isa = check::isa(op, isa, device >= 0);
    if (device >= 0) place.capability = known_capability(device);
    return place;
}

bool on_cpu(const Target& place) { return place.device < 0; }

size_t workspace_of(Op op, Codes codes, int capability, int64_t M, int64_t N, int64_t K,
                    int64_t R) {
#ifdef NIBBLE_CUDA
    if (capability) return cuda::workspace_bytes(op, codes, capability, M, N, K, R);
#endif
    return cpu::workspace_bytes(op, codes, M, N, K, R);
}

#ifdef NIBBLE_CUDA
#define NIBBLE_RUN(op, arguments, place) \
    (on_cpu(place) ? cpu::op(arguments, place) : cuda::op(arguments, place))
#else
#define NIBBLE_RUN(op, arguments, place) cpu::op(arguments, place)
#endif

void quantize_down(int device, Address stream, int threads, int isa, int64_t M, int64_t K,
                   int64_t R, Address x, int x_dtype, Address smooth, Address proj_down,
                   int param_dtype, bool act_unsigned, bool rotate, int codes, Address q,
                   Address ascales, Address h) {
    constexpr const char* op = "quantize_down";
    const Target place = target_of(op, device, stream, threads, isa);
    check::sizes(op, {{"M", M}, {"K", K}, {"R", R}});
    check::whole_groups(op, {"K", K});
    check::flags(op, act_unsigned, rotate);
    const Codes form = check::codes(op, "codes", codes);
    const int64_t mk = check::product(op, "x", {"M", M}, {"K", K});
    check::pointer(op, "x", x, mk);
    check::pointer(op, "smooth", smooth, K);
    check::pointer(op, "proj_down", proj_down, check::product(op, "proj_down", {"K", K}, {"R", R}));
    check::pointer(op, "q", q, mk);
    check::pointer(op, "ascales", ascales, mk / GROUP);
    check::pointer(op, "h", h, check::product(op, "h", {"M", M}, {"R", R}));
    const QuantizeDown arguments{M,
                                 K,
                                 R,
                                 at(x),
                                 check::dtype(op, "x_dtype", x_dtype),
                                 at(smooth),
                                 at(proj_down),
                                 check::dtype(op, "param_dtype", param_dtype),
                                 act_unsigned,
                                 rotate,
                                 form,
                                 at(q),
                                 static_cast<float*>(at(ascales)),
                                 static_cast<float*>(at(h))};
    py::gil_scoped_release release;
    NIBBLE_RUN(quantize_down, arguments, place);
}

// Everything of a product but where its result goes: the plain op and the fused one share it.
GemmW4A4Up product(const char* op, int64_t M, int64_t N, int64_t K, int64_t R, int codes, Address q,
                   bool act_unsigned, Address ascales, Address h, int64_t h_stride, Address weight,
                   Address weight_scale, Address proj_up, Address bias, int param_dtype) {
    check::sizes(op, {{"M", M}, {"N", N}, {"K", K}, {"R", R}, {"h_stride", h_stride}});
    check::whole_groups(op, {"K", K});
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
    arguments.act_unsigned = act_unsigned;
    arguments.ascales = static_cast<const float*>(at(ascales));
    arguments.h = static_cast<const float*>(at(h));
    arguments.h_stride = h_stride;
    arguments.weight = at(weight), arguments.weight_scale = at(weight_scale);
    arguments.proj_up = at(proj_up), arguments.bias = at(bias);
    arguments.param_dtype = check::dtype(op, "param_dtype", param_dtype);
    return arguments;
}

void gemm_w4a4_up(int device, Address stream, int threads, int isa, int64_t M, int64_t N, int64_t K,
                  int64_t R, int codes, Address q, bool act_unsigned, Address ascales, Address h,
                  int64_t h_stride, Address weight, Address weight_scale, Address proj_up,
                  Address bias, int param_dtype, Address out, int out_dtype, Address workspace,
                  int64_t workspace_size) {
    constexpr const char* op = "gemm_w4a4_up";
    const Target place = target_of(op, device, stream, threads, isa);
    GemmW4A4Up arguments = product(op, M, N, K, R, codes, q, act_unsigned, ascales, h, h_stride,
                                   weight, weight_scale, proj_up, bias, param_dtype);
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
                                     bool act_unsigned, Address ascales, Address h,
                                     int64_t h_stride, Address weight, Address weight_scale,
                                     Address proj_up, Address bias, int param_dtype, int mid_dtype,
                                     int64_t R2, Address smooth2, Address proj_down2,
                                     bool act_unsigned2, bool rotate2, int codes2, Address q2,
                                     Address ascales2, Address h2, Address workspace,
                                     int64_t workspace_size) {
    constexpr const char* op = "gemm_w4a4_up_gelu_quantize_down";
    const Target place = target_of(op, device, stream, threads, isa);
    GemmW4A4UpGeluQuantizeDown arguments{};
    arguments.first = product(op, M, N, K, R, codes, q, act_unsigned, ascales, h, h_stride, weight,
                              weight_scale, proj_up, bias, param_dtype);
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

W4A16 w4a16(const char* op, int64_t M, int64_t N, int64_t K, Address x, int x_dtype, Address weight,
            Address weight_scale, Address weight_zeros, Address bias, int param_dtype,
            Address out) {
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
        cpu::quantize_down({1, GROUP, 0, x, Dtype::f32, smooth, unused, Dtype::f32, false, false,
                            Codes::packed, q, scale, unused},
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
#define NIBBLE_PRODUCT                                                                      \
    py::arg("M"), py::arg("N"), py::arg("K"), py::arg("R"), py::arg("codes"), py::arg("q"), \
        py::arg("act_unsigned"), py::arg("ascales"), py::arg("h"), py::arg("h_stride"),     \
        py::arg("weight"), py::arg("weight_scale"), py::arg("proj_up"), py::arg("bias"),    \
        py::arg("param_dtype")
#define NIBBLE_W4A16                                                                          \
    NIBBLE_PLACE, py::arg("M"), py::arg("N"), py::arg("K"), py::arg("x"), py::arg("x_dtype"), \
        py::arg("weight"), py::arg("weight_scale"), py::arg("weight_zeros"), py::arg("bias"), \
        py::arg("param_dtype"), py::arg("out")
    m.def("quantize_down", &quantize_down, NIBBLE_PLACE, py::arg("M"), py::arg("K"), py::arg("R"),
          py::arg("x"), py::arg("x_dtype"), py::arg("smooth"), py::arg("proj_down"),
          py::arg("param_dtype"), py::arg("act_unsigned"), py::arg("rotate"), py::arg("codes"),
          py::arg("q"), py::arg("ascales"), py::arg("h"));
    m.def("gemm_w4a4_up", &gemm_w4a4_up, NIBBLE_PLACE, NIBBLE_PRODUCT, py::arg("out"),
          py::arg("out_dtype"), py::arg("workspace") = 0, py::arg("workspace_size") = 0);
    m.def("gemm_w4a4_up_gelu_quantize_down", &gemm_w4a4_up_gelu_quantize_down, NIBBLE_PLACE,
          NIBBLE_PRODUCT, py::arg("mid_dtype"), py::arg("R2"), py::arg("smooth2"),
          py::arg("proj_down2"), py::arg("act_unsigned2"), py::arg("rotate2"), py::arg("codes2"),
          py::arg("q2"), py::arg("ascales2"), py::arg("h2"), py::arg("workspace") = 0,
          py::arg("workspace_size") = 0);
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
    m.def("codes", &codes, py::arg("capability"),
          "The form of activation codes that this device's product reads fastest.");
    m.def("cpu_isas", &cpu_isas,
          "Names of the instruction sets that this CPU can run, slowest first.");
    m.def("build_info", &build_info);
}
