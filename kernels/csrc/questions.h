// What a build of the kernels can be asked, through either door.
#pragma once

#include <string>

#include "calls.h"

namespace nibble::questions {

// 10 * major + minor of a CUDA device; 0 for -1, the CPU.
inline int capability(int device) { return device == -1 ? 0 : known_capability(device); }

inline void known_gpu(int capability) {
    if (capability < 0)
        throw std::invalid_argument("capability=" + std::to_string(capability) + " is negative");
    if (capability && !HAS_CUDA)
        throw std::invalid_argument("capability=" + std::to_string(capability) +
                                    ": built without CUDA");
}

inline Route route(const std::string& name, int capability, int64_t M, int64_t N, int64_t K) {
    const Op op = op_named(name);
    known_gpu(capability);
    check::sizes("route", {{"M", M}, {"N", N}, {"K", K}});
#ifdef NIBBLE_CUDA
    if (capability) return cuda::route(op, capability, M, N, K);
#endif
    return cpu::route(op, M, N, K);
}

// Scratch that the caller gives; R is that of the h which the op writes, where it writes one.
inline size_t workspace_bytes(const std::string& name, int capability, int64_t M, int64_t N,
                              int64_t K, int64_t R, int codes) {
    const Op op = op_named(name);
    known_gpu(capability);
    check::sizes("workspace_bytes", {{"M", M}, {"N", N}, {"K", K}, {"R", R}});
    return workspace_of(op, check::codes("workspace_bytes", "codes", codes), capability, M, N, K,
                        R);
}

// Scratch that linear_w4a4 wants.
inline size_t linear_w4a4_bytes(int capability, int64_t M, int64_t N, int64_t K, int64_t R,
                                int codes) {
    known_gpu(capability);
    check::sizes("linear_w4a4_bytes", {{"M", M}, {"N", N}, {"K", K}, {"R", R}});
    const Codes form = check::codes("linear_w4a4_bytes", "codes", codes);
    return calls::linear_scratch(capability, form, M, N, K, R).bytes;
}

// The form of activation codes that a device's product reads fastest.
inline int codes(int capability) {
    known_gpu(capability);
#ifdef NIBBLE_CUDA
    if (capability) return int(cuda::codes(capability));
#endif
    return int(Codes::packed);
}

// Whether this CPU has an instruction set. The backend itself is asked, by one group through the
// smallest op: one that the CPU lacks throws.
inline bool runs(Isa isa) {
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

// The names of those it has, slowest first, a space between them.
inline std::string cpu_isas() {
    std::string found = "portable";
    if (runs(Isa::avx2)) found += " avx2";
    if (runs(Isa::avx512_vnni)) found += " avx512_vnni";
    return found;
}

inline std::string compiler() {
#if defined(__clang__)
    return "clang " __clang_version__;
#elif defined(__GNUC__)
    return "gcc " __VERSION__;
#elif defined(_MSC_VER)
    return "msvc " + std::to_string(_MSC_FULL_VER);
#else
    return "unknown";
#endif
}

}  // namespace nibble::questions
