// The Python module nibble_kernels: calls as bytes in, kernels started, nothing kept. It knows no
// torch; kernels/backends/compiled.py lays the bytes out.
//
// A wrong value raises ValueError (std::invalid_argument) before anything runs; CUDA's own errors
// become RuntimeError. The GIL is free while an op works.
#include <pybind11/pybind11.h>

#include <string>
#include <string_view>

#include "calls.h"
#include "questions.h"

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

PYBIND11_MODULE(nibble_kernels, m) {
    using namespace nibble;
    m.doc() = "Compiled 4-bit kernels for the node pack Nibble; use them through nibble.kernels.";
    m.attr("ABI") = ABI;
    m.attr("__version__") = NIBBLE_VERSION;
    m.attr("DEVICES") =
        HAS_CUDA ? py::tuple(py::make_tuple("cpu", "cuda")) : py::tuple(py::make_tuple("cpu"));
#define NIBBLE_DOOR(name, Op)                                                \
    m.def(#name, [](const py::bytes& bytes) {                                \
        const std::string_view view = bytes;                                 \
        const Call<Op> call = received<Op>(#name, view.data(), view.size()); \
        py::gil_scoped_release release;                                      \
        calls::name(call);                                                   \
    });
    NIBBLE_DOORS(NIBBLE_DOOR)
    m.def("capability", &questions::capability, py::arg("device"));
    m.def(
        "route",
        [](const std::string& op, int capability, int64_t M, int64_t N, int64_t K) {
            const Route found = questions::route(op, capability, M, N, K);
            return py::make_tuple(found.path, found.reason);
        },
        py::arg("op"), py::arg("capability"), py::arg("M"), py::arg("N"), py::arg("K"));
    m.def("workspace_bytes", &questions::workspace_bytes, py::arg("op"), py::arg("capability"),
          py::arg("M"), py::arg("N"), py::arg("K"), py::arg("R"), py::arg("codes") = 0);
    m.def("linear_w4a4_bytes", &questions::linear_w4a4_bytes, py::arg("capability"), py::arg("M"),
          py::arg("N"), py::arg("K"), py::arg("R"), py::arg("codes"));
    m.def("codes", &questions::codes, py::arg("capability"));
    m.def("cpu_isas", [] { return py::tuple(py::str(questions::cpu_isas()).attr("split")()); });
    m.def("build_info", [] {
        py::dict info;
        info["compiler"] = questions::compiler();
        info["cuda"] = NIBBLE_CUDA_VERSION;
        info["architectures"] = NIBBLE_ARCHITECTURES;
        info["pybind11"] =
            std::to_string(PYBIND11_VERSION_MAJOR) + "." + std::to_string(PYBIND11_VERSION_MINOR);
        return info;
    });
}
