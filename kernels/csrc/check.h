// What the bindings refuse. Backends may rely on every rule here and check nothing again.
//
// A raw pointer says nothing of what it points to, so what can be checked is: sizes, their
// products, presence, alignment and codes of enums. That buffers are as large as the sizes say is
// checked one floor up, from the tensors' shapes (the checks in kernels/ops).
#pragma once

#include <cstdint>
#include <initializer_list>
#include <stdexcept>
#include <string>

#include "nibble.h"

namespace nibble::check {

using Address = std::uintptr_t;

struct Size {
    const char* name;
    int64_t value;
};

[[noreturn]] inline void refuse(const char* op, const std::string& words) {
    throw std::invalid_argument(std::string(op) + ": " + words);
}

inline std::string shape(std::initializer_list<Size> sizes) {
    std::string text;
    for (const Size& size : sizes)
        text +=
            (text.empty() ? "" : ", ") + std::string(size.name) + "=" + std::to_string(size.value);
    return text;
}

// Kernels index rows with 32 bits, so a single extent stays below 2^31.
inline void sizes(const char* op, std::initializer_list<Size> all) {
    for (const Size& size : all) {
        if (size.value < 0)
            refuse(op, std::string(size.name) + " is negative (" + shape(all) + ")");
        if (size.value > INT32_MAX)
            refuse(op, std::string(size.name) + " must be below 2^31 (" + shape(all) + ")");
    }
}

// 2^46 elements of up to 8 bytes are more than an address space of 48 bits holds; below it no index
// arithmetic overflows.
inline int64_t product(const char* op, const char* tensor, Size a, Size b) {
    if (a.value && b.value > (int64_t(1) << 46) / a.value) {
        refuse(op, std::string(tensor) + " (" + a.name + ", " + b.name +
                       ") is larger than memory: " + shape({a, b}));
    }
    return a.value * b.value;
}

inline void whole_groups(const char* op, Size size) {
    if (size.value % GROUP)
        refuse(op, shape({size}) + " is not a multiple of the group size " + std::to_string(GROUP));
}

// Kernels load and store 16 bytes at once.
inline void pointer(const char* op, const char* name, Address address, int64_t elements) {
    if (address % 16)
        refuse(op, std::string(name) + " is not aligned to 16 bytes (address " +
                       std::to_string(address) + ")");
    if (elements && !address)
        refuse(op,
               std::string(name) + " is null and has " + std::to_string(elements) + " elements");
}

inline Dtype dtype(const char* op, const char* name, int code) {
    if (code < 0 || code > 2)
        refuse(op, std::string(name) + "=" + std::to_string(code) +
                       " is none of 0 (float32), 1 (float16), 2 (bfloat16)");
    return Dtype(code);
}

inline Codes codes(const char* op, const char* name, int code) {
    if (code < 0 || code > 2)
        refuse(op, std::string(name) + "=" + std::to_string(code) +
                       " is none of 0 (packed), 1 (e4m3), 2 (int8)");
    return Codes(code);
}

// A GPU has one path of this module's; another is tried through kernels/backends/cubins.
inline Isa isa(const char* op, int code, bool gpu) {
    if (gpu && code) refuse(op, "isa=" + std::to_string(code) + " names no path of a GPU: it is 0");
    if (code < 0 || code > 3) {
        refuse(op, "isa=" + std::to_string(code) +
                       " is none of 0 (best), 1 (portable), 2 (avx2), 3 (avx512_vnni)");
    }
    return Isa(code);
}

// Rotated values have both signs, so codes 0..15 cannot hold them.
inline void flags(const char* op, bool act_unsigned, bool rotate) {
    if (act_unsigned && rotate)
        refuse(op,
               "act_unsigned and rotate exclude one another: rotated activations have both signs");
}

// Columns before it are signed.
inline void unsigned_from(const char* op, bool act_unsigned, int64_t column, int64_t K) {
    if (!column) return;
    if (!act_unsigned || column < 0 || column >= K || column % GROUP) {
        refuse(op, shape({{"unsigned_from", column}, {"K", K}}) +
                       ": a multiple of the group size within K is wanted, and act_unsigned");
    }
}

// Rows of x, in elements: they may not overlap, and kernels load 16 bytes at once.
inline void stride(const char* op, int64_t x_stride, int64_t K) {
    sizes(op, {{"x_stride", x_stride}});
    if (x_stride < K)
        refuse(op, shape({{"x_stride", x_stride}, {"K", K}}) + ": rows of x would overlap");
    if (x_stride % 8 || x_stride > (int64_t(1) << 26)) {
        refuse(op,
               shape({{"x_stride", x_stride}}) + " is not a multiple of 8, or is more than 2^26");
    }
}

// The layouts that backends have; a GPU's has fewer and refuses the others itself.
inline void codebook(const char* op, int64_t K, int bits, int vector) {
    if (bits < 1 || bits > 12) refuse(op, "bits=" + std::to_string(bits) + " is outside 1..12");
    if (vector != 1 && vector != 2 && vector != 4 && vector != 8)
        refuse(op, "vector=" + std::to_string(vector) + " is none of 1, 2, 4, 8");
    if (K % 8) refuse(op, shape({{"K", K}}) + " is not a multiple of 8");
    if (K / vector * bits % 8)
        refuse(op, shape({{"K", K}}) + ": a row of indices does not fill whole bytes");
}

inline void workspace(const char* op, Address address, int64_t given, size_t needed) {
    pointer(op, "workspace", address, 0);
    if (given < 0) refuse(op, "workspace_size=" + std::to_string(given) + " is negative");
    if (needed && (!address || size_t(given) < needed)) {
        refuse(op, "workspace of " + std::to_string(given) + " bytes, and workspace_bytes says " +
                       std::to_string(needed));
    }
}

}  // namespace nibble::check
