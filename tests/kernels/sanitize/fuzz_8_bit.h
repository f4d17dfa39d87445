// Activations of 8 bits and W4A8 on random shapes, against loops in double precision.
#pragma once

#include "fuzz.h"

namespace {

using Numbers = std::vector<int8_t>;

Numbers random_numbers(int64_t count) {
    Numbers numbers(static_cast<size_t>(count));
    numbers.shrink_to_fit();
    for (int8_t& number : numbers) number = static_cast<int8_t>(any(-127, 127));
    return numbers;
}

// quantize_down writes exactly its buffers; the product of random codes is that of their numbers.
void fuzz_8_bit(Target target) {
    const int64_t M = pick<int64_t>({0, 1, 3, 5, 17, 33}), N = any(1, 70), K = GROUP * any(1, 9);
    const Dtype kind = any_dtype();
    Floats x(any_dtype(), M * K), smooth(kind, K), down(kind, 0), scale(kind, K / GROUP * N);
    x.fill(1), smooth.fill(0.1, 2), scale.fill(0.01);
    Numbers q(static_cast<size_t>(M * K));
    std::vector<float> ascales(static_cast<size_t>(K / GROUP * M));
    const bool shifted = coin();
    cpu::quantize_down({M, K, 0, x.data(), K, x.dtype, smooth.data(), down.data(), kind, shifted,
                        false, 0, Codes::int8, q.data(), ascales.data(), nullptr},
                       target);
    for (int64_t i = 0; i < M * K; ++i) {
        const double value = (x[i] + (shifted ? SHIFT : 0)) / smooth[i % K];
        const double step = ascales[static_cast<size_t>(i % K / GROUP * M + i / K)];
        require(std::fabs(q[static_cast<size_t>(i)] * step - value) <= 0.501 * step + 1e-6,
                "a code of 8 bits");
    }
    const Bytes weight = random_bytes(N * K / 2);
    const Numbers codes = random_numbers(M * K);
    Floats out(Dtype::f32, M * N);
    cpu::gemm_w4a4_up(
        {M, N, K, 0, Codes::int8, codes.data(), shifted, 0, ascales.data(), nullptr, 0,
         weight.data(), scale.data(), nullptr, nullptr, kind, out.data(), Dtype::f32, nullptr},
        target);
    for (int64_t m = 0; m < M; ++m)
        for (int64_t n = 0; n < N; ++n) {
            double sum = 0, magnitude = 0;
            for (int64_t g = 0; g < K / GROUP; ++g) {
                int group = 0;
                for (int64_t k = g * GROUP; k < (g + 1) * GROUP; ++k)
                    group += codes[static_cast<size_t>(m * K + k)] * code(weight, n, K, k, false);
                const double term =
                    group * double(ascales[static_cast<size_t>(g * M + m)]) * scale[g * N + n];
                sum += term, magnitude += std::fabs(term);
            }
            require(close(out[m * N + n], sum, magnitude, out.rounding()), "8-bit codes' product");
        }
}

void fuzz_w4a8(Target target) {
    const int64_t M = pick<int64_t>({0, 1, 3, 5, 6, 7, 17, 33}), N = any(1, 80),
                  K = GROUP * any(1, 11), R = pick<int64_t>({0, 1, 8, 17}),
                  group = pick<int64_t>({16, 32, 64}), apart = K + 8 * any(0, 2);
    const Dtype kind = any_dtype();
    Floats x(any_dtype(), M ? (M - 1) * apart + K : 0), smooth(kind, K), down(kind, K * R),
        up(kind, N * R), channel(Dtype::f32, N), bias(kind, N), out(x.dtype, M * N);
    x.fill(1), smooth.fill(0.1, 2), down.fill(0.1), up.fill(0.3), channel.fill(0.01), bias.fill(1);
    const Bytes weight = random_bytes(N * K / 2);
    const Numbers scales = random_numbers(K / group * N), table = random_numbers(16);
    const bool has_bias = coin();
    cpu::linear_w4a8({M,
                      N,
                      K,
                      R,
                      group,
                      x.data(),
                      apart,
                      x.dtype,
                      smooth.data(),
                      down.data(),
                      weight.data(),
                      scales.data(),
                      static_cast<const float*>(channel.data()),
                      table.data(),
                      up.data(),
                      has_bias ? bias.data() : nullptr,
                      kind,
                      false,
                      out.data(),
                      nullptr},
                     target);
    for (int64_t m = 0; m < M; ++m) {
        std::vector<double> values, h(static_cast<size_t>(R));
        double peak = 0;
        for (int64_t k = 0; k < K; ++k) {
            values.push_back(x[m * apart + k] / smooth[k]);
            peak = std::max(peak, std::fabs(values.back()));
            for (int64_t r = 0; r < R; ++r)
                h[static_cast<size_t>(r)] += x[m * apart + k] * down[k * R + r];
        }
        for (int64_t n = 0; n < N; ++n) {
            double sum = has_bias ? bias[n] : 0, magnitude = std::fabs(sum), doubt = 0;
            for (int64_t k = 0; k < K; ++k) {
                const int whole = (table[static_cast<size_t>(code(weight, n, K, k, true))] *
                                       scales[static_cast<size_t>(k / group * N + n)] +
                                   64) >>
                                  7;
                const double wanted = values[static_cast<size_t>(k)] * 127 / peak;
                // On the border of two codes float and double may differ.
                if (std::fabs(wanted - std::floor(wanted) - 0.5) < 1e-4) doubt += std::abs(whole);
                sum += std::nearbyint(wanted) * whole * peak / 127 * channel[n];
                magnitude += std::fabs(wanted * whole * peak / 127 * channel[n]);
            }
            for (int64_t r = 0; r < R; ++r) {
                sum += h[static_cast<size_t>(r)] * up[n * R + r];
                magnitude += std::fabs(h[static_cast<size_t>(r)] * up[n * R + r]);
            }
            const double slack = doubt * peak / 127 * std::fabs(channel[n]);
            require(std::fabs(out[m * N + n] - sum) <=
                        slack + 4e-6 * magnitude + 2 * out.rounding() * std::fabs(sum) + 1e-6,
                    "linear_w4a8");
        }
    }
}

}  // namespace
