// What the fuzzer draws and compares with: random numbers, 16-bit formats spelled out a second
// time, and buffers of exactly the size of their tensors.
#pragma once

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <memory>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#include "nibble.h"

using namespace nibble;

namespace {

std::mt19937 generator;
int64_t any(int64_t low, int64_t high) {
    return std::uniform_int_distribution<int64_t>(low, high)(generator);
}
bool coin() { return any(0, 1); }
double normal() { return std::normal_distribution<double>()(generator); }
template <class T>
T pick(std::initializer_list<T> all) {
    return all.begin()[any(0, static_cast<int64_t>(all.size()) - 1)];
}

std::string where_it_is;

void require(bool good, const char* what) {
    if (good) return;
    std::fprintf(stderr, "FAILED: %s in %s\n", what, where_it_is.c_str());
    std::exit(1);
}

// ---- 16-bit numbers, spelled out a second time so that the ops' own conversions are checked -----

double from_half(uint16_t h) {
    const int exponent = h >> 10 & 31, mantissa = h & 1023;
    const double magnitude = exponent == 31 ? (mantissa ? NAN : INFINITY)
                             : exponent     ? std::ldexp(1024 + mantissa, exponent - 25)
                                            : std::ldexp(mantissa, -24);
    return h & 0x8000 ? -magnitude : magnitude;
}

double from_bf16(uint16_t b) {
    const uint32_t wide = static_cast<uint32_t>(b) << 16;
    float x;
    std::memcpy(&x, &wide, 4);
    return x;
}

// A tensor of floats in any of the three dtypes, in a buffer of exactly its size.
struct Floats {
    Dtype dtype;
    int64_t count;
    std::unique_ptr<char[]> bytes;
    Floats(Dtype dtype, int64_t count)
        : dtype(dtype), count(count), bytes(new char[static_cast<size_t>(count * width())]) {}
    int64_t width() const { return dtype == Dtype::f32 ? 4 : 2; }
    void* data() { return bytes.get(); }
    double operator[](int64_t i) const {
        if (dtype == Dtype::f32) {
            float x;
            std::memcpy(&x, bytes.get() + 4 * i, 4);
            return x;
        }
        uint16_t x;
        std::memcpy(&x, bytes.get() + 2 * i, 2);
        return dtype == Dtype::f16 ? from_half(x) : from_bf16(x);
    }
    void set(int64_t i, double value) {
        if (dtype == Dtype::f32) {
            const float x = static_cast<float>(value);
            std::memcpy(bytes.get() + 4 * i, &x, 4);
            return;
        }
        uint16_t best =
            0;  // by search among the 16-bit numbers that bracket the value: slow and beyond doubt
        if (std::isnan(value))
            best = 0x7FFF;
        else {
            uint16_t low = 0, high = dtype == Dtype::f16 ? 0x7C00 : 0x7F80;
            while (high - low > 1) {
                const uint16_t middle = static_cast<uint16_t>((low + high) / 2);
                ((dtype == Dtype::f16 ? from_half(middle) : from_bf16(middle)) <= std::fabs(value)
                     ? low
                     : high) = middle;
            }
            best = static_cast<uint16_t>((std::isinf(value) ? high : low) |
                                         (std::signbit(value) ? 0x8000 : 0));
        }
        std::memcpy(bytes.get() + 2 * i, &best, 2);
    }
    void fill(double scale, double shift = 0) {
        for (int64_t i = 0; i < count; ++i) set(i, normal() * scale + shift);
    }
    double rounding() const {
        return dtype == Dtype::f32 ? 1e-7 : dtype == Dtype::f16 ? 5e-4 : 4e-3;
    }
};

using Bytes = std::vector<uint8_t>;

Bytes random_bytes(int64_t count) {
    Bytes bytes(static_cast<size_t>(count));
    bytes.shrink_to_fit();
    for (uint8_t& byte : bytes) byte = static_cast<uint8_t>(any(0, 255));
    return bytes;
}

int code(const Bytes& packed, int64_t row, int64_t columns, int64_t k, bool is_unsigned) {
    const int nibble = packed[static_cast<size_t>((row * columns + k) / 2)] >> (k % 2 * 4) & 15;
    return is_unsigned || nibble < 8 ? nibble : nibble - 16;
}

Dtype any_dtype() { return pick({Dtype::f32, Dtype::f16, Dtype::bf16}); }

// Closeness in units of what was added up: `magnitude` is the sum of the terms' absolute values.
bool close(double found, double wanted, double magnitude, double rounding) {
    if (std::isnan(wanted)) return std::isnan(found);
    return std::fabs(found - wanted) <= 3e-6 * magnitude + rounding * std::fabs(wanted) + 1e-7;
}

}  // namespace
