// Runs the CPU's ops on random shapes and compares them with loops in double precision.
//
//     fuzz <isa: 1 portable, 2 AVX2, 3 AVX-512> <rounds> <seed>
//
// Buffers have exactly their tensors' sizes, so that a sanitizer sees each byte touched beyond.
#include "fuzz_8_bit.h"

namespace {

// ---- quantize_down ------------------------------------------------------------------------------

struct Quantized {
    Bytes q;
    std::vector<float> ascales, h;
};

double smoothed(const Floats& x, const Floats& smooth, int64_t m, int64_t k, bool shifted) {
    const float raw = static_cast<float>(x[m * smooth.count + k]);
    return (shifted ? raw + SHIFT : raw) / static_cast<float>(smooth[k]);
}

// Codes and scales of one group against the values that they stand for.
void check_group(const Quantized& found, int64_t M, int64_t K, int64_t m, int64_t g,
                 const double value[GROUP], bool act_unsigned, bool exact) {
    double peak = 0;
    for (int k = 0; k < GROUP; ++k) {
        if (std::isnan(value[k]))
            peak = NAN;
        else if (!std::isnan(peak))
            peak = std::max(peak, act_unsigned ? value[k] : std::fabs(value[k]));
    }
    const float scale = static_cast<float>(peak) / (act_unsigned ? 15.0f : 7.0f);
    const float given = found.ascales[static_cast<size_t>(g * M + m)];
    if (exact)
        require(given == scale || (std::isnan(given) && std::isnan(scale)), "scale");
    else
        require(!std::isfinite(scale) || std::fabs(given - scale) <= 3e-6 * scale + 1e-42,
                "scale within rounding");
    for (int k = 0; k < GROUP; ++k) {
        const int c = code(found.q, m, K, g * GROUP + k, act_unsigned);
        if (!std::isfinite(scale)) {
            require(!std::isfinite(given), "a spoiled group's scale");
            continue;
        }
        const float step = std::max(exact ? scale : given, std::numeric_limits<float>::min());
        float wanted = static_cast<float>(value[k]) / step;
        if (act_unsigned) wanted = std::max(wanted, 0.0f);
        if (exact)
            require(c == static_cast<int>(std::nearbyint(wanted)), "code");
        else
            require(std::fabs(wanted - c) <= 0.5 + 1e-4, "code within rounding");
    }
}

bool same(const std::vector<float>& a, const std::vector<float>& b) {
    return a.empty() ||
           !std::memcmp(a.data(), b.data(), a.size() * 4);  // bits: a NaN equals itself
}

Quantized quantize(const QuantizeDown& given, Target target) {
    Quantized out{Bytes(static_cast<size_t>(given.M * given.K / 2)),
                  std::vector<float>(static_cast<size_t>(given.K / GROUP * given.M)),
                  std::vector<float>(static_cast<size_t>(given.M * given.R))};
    QuantizeDown op = given;
    op.q = out.q.data(), op.ascales = out.ascales.data(), op.h = out.h.data();
    cpu::quantize_down(op, target);
    return out;
}

void fuzz_quantize(Target target) {
    const int64_t M = any(0, 40), K = GROUP * any(1, 5),
                  R = pick<int64_t>({0, 1, 3, 8, 16, 31, 32, 33, 160});
    const bool act_unsigned = coin(), rotate = !act_unsigned && coin();
    const int64_t from = act_unsigned && coin() ? GROUP * any(0, K / GROUP - 1) : 0;
    Floats x(any_dtype(), M * K), smooth(any_dtype(), K), down(smooth.dtype, K * R);
    x.fill(pick({0.0, 1e-39, 1e-6, 1.0, 300.0}));
    smooth.fill(0.3, pick({1.0, -1.0, 4.0})), down.fill(0.1);
    for (int64_t k = 0; k < K; ++k)
        if (std::fabs(smooth[k]) < 0.01) smooth.set(k, 1);
    if (M && coin())
        x.set(any(0, M * K - 1), pick<double>({NAN, INFINITY, -INFINITY, 60000.0, -0.0}));
    const QuantizeDown op{M,
                          K,
                          R,
                          x.data(),
                          K,
                          x.dtype,
                          smooth.data(),
                          down.data(),
                          down.dtype,
                          act_unsigned,
                          rotate,
                          from,
                          Codes::packed,
                          nullptr,
                          nullptr,
                          nullptr};
    const Quantized one = quantize(op, target);
    target.threads = 3;
    const Quantized three = quantize(op, target);
    require(one.q == three.q && same(one.ascales, three.ascales) && same(one.h, three.h),
            "quantize_down with three threads");
    for (int64_t m = 0; m < M; ++m) {
        for (int64_t g = 0; g < K / GROUP; ++g) {
            double value[GROUP], turned[GROUP] = {};
            const bool is_unsigned = act_unsigned && g * GROUP >= from;
            for (int k = 0; k < GROUP; ++k)
                value[k] = smoothed(x, smooth, m, g * GROUP + k, is_unsigned);
            for (int i = 0; i < GROUP && rotate; ++i)
                for (int k = 0; k < GROUP; ++k) {
                    int bits = i & k, odd = 0;
                    for (; bits; bits &= bits - 1) odd ^= 1;
                    turned[i] += odd ? -value[k] / 8 : value[k] / 8;
                }
            check_group(one, M, K, m, g, rotate ? turned : value, is_unsigned, !rotate);
        }
        for (int64_t r = 0; r < R; ++r) {
            double sum = 0, magnitude = 0;
            for (int64_t k = 0; k < K; ++k) {
                sum += x[m * K + k] * down[k * R + r];
                magnitude += std::fabs(x[m * K + k] * down[k * R + r]);
            }
            const double found = one.h[static_cast<size_t>(m * R + r)];
            require(std::isfinite(sum) ? close(found, sum, magnitude, 1e-6) : !std::isfinite(found),
                    "h");
        }
    }
}

// ---- gemm_w4a4_up and its fusion ----------------------------------------------------------------

// A random product: owns what the op's pointers point to.
struct Product {
    int64_t M, N, K, R, stride;
    bool act_unsigned = coin(), has_bias = coin();
    int64_t from = act_unsigned && coin() ? GROUP * any(0, K / GROUP - 1) : 0;
    Dtype dtype = any_dtype();
    Bytes q, weight;
    std::vector<float> ascales, h;
    Floats scale, up, bias;
    Product(int64_t M, int64_t N, int64_t K, int64_t R)
        : M(M),
          N(N),
          K(K),
          R(R),
          stride(R + any(0, 3)),
          q(random_bytes(M * K / 2)),
          weight(random_bytes(N * K / 2)),
          ascales(static_cast<size_t>(K / GROUP * M)),
          h(static_cast<size_t>(M ? (M - 1) * stride + R : 0)),
          scale(dtype, K / GROUP * N),
          up(dtype, N * R),
          bias(dtype, N) {
        for (float& value : ascales) value = static_cast<float>(std::fabs(normal()));
        for (float& value : h) value = static_cast<float>(normal());
        scale.fill(0.01), up.fill(0.3), bias.fill(1);
    }
    GemmW4A4Up op() {
        return {M,
                N,
                K,
                R,
                Codes::packed,
                q.data(),
                act_unsigned,
                from,
                ascales.data(),
                h.data(),
                stride,
                weight.data(),
                scale.data(),
                up.data(),
                has_bias ? bias.data() : nullptr,
                dtype,
                nullptr,
                Dtype::f32,
                nullptr};
    }
    double at(int64_t m, int64_t n, double& magnitude) const {
        double sum = has_bias ? bias[n] : 0;
        magnitude = std::fabs(sum);
        for (int64_t g = 0; g < K / GROUP; ++g) {
            int group = 0;
            for (int64_t k = g * GROUP; k < (g + 1) * GROUP; ++k)
                group += code(q, m, K, k, act_unsigned && k >= from) * code(weight, n, K, k, false);
            const double term = group *
                                static_cast<double>(ascales[static_cast<size_t>(g * M + m)]) *
                                scale[g * N + n];
            sum += term, magnitude += std::fabs(term);
        }
        for (int64_t r = 0; r < R; ++r) {
            const double term = h[static_cast<size_t>(m * stride + r)] * up[n * R + r];
            sum += term, magnitude += std::fabs(term);
        }
        return sum;
    }
};

void fuzz_gemm(Target target) {
    Product product(pick<int64_t>({0, 1, 2, 3, 5, 7, 8, 17, 33}), any(1, 80), GROUP * any(1, 11),
                    pick<int64_t>({0, 1, 3, 8, 16, 31, 33, 257}));
    GemmW4A4Up op = product.op();
    op.out_dtype = any_dtype();
    Floats out(op.out_dtype, op.M * op.N), again(op.out_dtype, op.M * op.N);
    op.out = out.data();
    cpu::gemm_w4a4_up(op, target);
    op.out = again.data(), target.threads = 3;
    cpu::gemm_w4a4_up(op, target);
    require(!std::memcmp(out.data(), again.data(), static_cast<size_t>(out.count * out.width())),
            "gemm_w4a4_up with three threads");
    for (int64_t m = 0; m < op.M; ++m)
        for (int64_t n = 0; n < op.N; ++n) {
            double magnitude;
            const double wanted = product.at(m, n, magnitude);
            require(close(out[m * op.N + n], wanted, magnitude, out.rounding()), "gemm_w4a4_up");
        }
}

void fuzz_gelu(Target target) {
    Product product(pick<int64_t>({0, 1, 5, 130}), GROUP * any(1, 2), GROUP * any(1, 2),
                    pick<int64_t>({0, 5, 16}));
    const int64_t M = product.M, N = product.N, R = pick<int64_t>({0, 1, 17});
    Floats smooth(product.dtype, N), down(product.dtype, N * R);
    smooth.fill(0.1, 1), down.fill(0.1);
    GemmW4A4UpGeluQuantizeDown op{};
    op.first = product.op();
    op.R2 = R, op.smooth2 = smooth.data(), op.proj_down2 = down.data(), op.act_unsigned2 = coin(),
    op.codes2 = Codes::packed;
    Quantized out{Bytes(static_cast<size_t>(M * N / 2)),
                  std::vector<float>(static_cast<size_t>(M * N / GROUP)),
                  std::vector<float>(static_cast<size_t>(M * R))};
    Quantized again = out;
    for (Quantized* to : {&out, &again}) {
        op.q2 = to->q.data(), op.ascales2 = to->ascales.data(), op.h2 = to->h.data();
        cpu::gemm_w4a4_up_gelu_quantize_down(op, target);
        target.threads = 3;
    }
    require(out.q == again.q && out.ascales == again.ascales && out.h == again.h,
            "gemm_w4a4_up_gelu_quantize_down with three threads");
    for (int64_t m = 0; m < M; ++m) {
        std::vector<double> y;
        for (int64_t n = 0; n < N; ++n) {
            double magnitude;
            const double x = product.at(m, n, magnitude);
            y.push_back(0.5 * x *
                        (1 + std::tanh(std::sqrt(2 / M_PI) * (x + 0.044715 * x * x * x))));
        }
        for (int64_t g = 0; g < N / GROUP; ++g) {
            double peak = 0;
            const double scale = out.ascales[static_cast<size_t>(g * M + m)];
            for (int64_t n = g * GROUP; n < (g + 1) * GROUP; ++n) {
                const double value =
                    (y[static_cast<size_t>(n)] + (op.act_unsigned2 ? SHIFT : 0)) / smooth[n];
                peak = std::max(peak, op.act_unsigned2 ? value : std::fabs(value));
                const double kept = op.act_unsigned2 ? std::max(value, 0.0) : value,
                             found = scale * code(out.q, m, N, n, op.act_unsigned2);
                require(std::fabs(kept - found) <= 0.5001 * scale + 1e-4, "codes after a GELU");
            }
            require(std::fabs(scale * (op.act_unsigned2 ? 15 : 7) - peak) <= 1e-4 * peak + 1e-5,
                    "scale after a GELU");
        }
        for (int64_t r = 0; r < R; ++r) {
            double sum = 0;
            for (int64_t n = 0; n < N; ++n) sum += y[static_cast<size_t>(n)] * down[n * R + r];
            require(std::fabs(out.h[static_cast<size_t>(m * R + r)] - sum) <=
                        1e-3 * (1 + std::fabs(sum)),
                    "h after a GELU");
        }
    }
}

// ---- w4a16 --------------------------------------------------------------------------------------

void fuzz_w4a16(Target target) {
    const int64_t M = pick<int64_t>({0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 20}), N = any(1, 80),
                  K = GROUP * any(1, 6);
    Bytes weight = random_bytes(N * K / 2);
    Floats x(any_dtype(), M * K), scale(any_dtype(), K / GROUP * N),
        zeros(scale.dtype, K / GROUP * N), bias(scale.dtype, N);
    x.fill(1), scale.fill(0.01), zeros.fill(0.01), bias.fill(1);
    const bool has_zeros = coin(), has_bias = coin();
    Floats out(x.dtype, M * N), again(x.dtype, M * N);
    W4A16 op{M,
             N,
             K,
             x.data(),
             x.dtype,
             weight.data(),
             scale.data(),
             has_zeros ? zeros.data() : nullptr,
             has_bias ? bias.data() : nullptr,
             scale.dtype,
             out.data()};
    cpu::gemv_w4a16(op, target);
    op.out = again.data(), target.threads = 3;
    cpu::gemm_w4a16(op, target);
    require(!std::memcmp(out.data(), again.data(), static_cast<size_t>(out.count * out.width())),
            "w4a16 with three threads");
    for (int64_t m = 0; m < M; ++m)
        for (int64_t n = 0; n < N; ++n) {
            double sum = has_bias ? bias[n] : 0, magnitude = std::fabs(sum);
            for (int64_t k = 0; k < K; ++k) {
                const int64_t g = k / GROUP * N + n;
                const double term = x[m * K + k] * ((code(weight, n, K, k, true) - 8) * scale[g] +
                                                    (has_zeros ? zeros[g] : 0));
                sum += term, magnitude += std::fabs(term);
            }
            require(close(out[m * N + n], sum, magnitude, out.rounding()), "w4a16");
        }
}

// ---- gemm_vq ------------------------------------------------------------------------------------

void fuzz_vq(Target target) {
    const int bits = static_cast<int>(any(1, 12)), vector = pick({1, 2, 4, 8});
    const int64_t M = pick<int64_t>({0, 1, 3, 8, 17}), N = pick<int64_t>({1, 20, 75, 300}),
                  K = 64 * any(1, 5), row = K / vector * bits / 8;
    Bytes indices = random_bytes(N * row);
    Floats x(any_dtype(), M * K), codebook(any_dtype(), int64_t(vector) << bits),
        scale(any_dtype(), N), bias(scale.dtype, N);
    Floats addend(any_dtype(), M * N), out(any_dtype(), M * N), again(out.dtype, M * N);
    x.fill(1), codebook.fill(1), scale.fill(0.3), bias.fill(1), addend.fill(1);
    const bool has_scale = coin(), has_bias = coin(), has_addend = coin();
    GemmVQ op{M,
              N,
              K,
              bits,
              vector,
              x.data(),
              x.dtype,
              indices.data(),
              codebook.data(),
              codebook.dtype,
              has_scale ? scale.data() : nullptr,
              has_bias ? bias.data() : nullptr,
              scale.dtype,
              has_addend ? addend.data() : nullptr,
              addend.dtype,
              out.data(),
              out.dtype};
    cpu::gemm_vq(op, target);
    op.out = again.data(), target.threads = 3;
    cpu::gemm_vq(op, target);
    require(!std::memcmp(out.data(), again.data(), static_cast<size_t>(out.count * out.width())),
            "gemm_vq with three threads");
    for (int64_t m = 0; m < M; ++m)
        for (int64_t n = 0; n < N; ++n) {
            double sum = (has_bias ? bias[n] : 0) + (has_addend ? addend[m * N + n] : 0),
                   magnitude = std::fabs(sum);
            for (int64_t k = 0; k < K; ++k) {
                int64_t index = 0;
                for (int64_t b = bits - 1, first = k / vector * bits; b >= 0; --b)
                    index = 2 * index + (indices[static_cast<size_t>(n * row + (first + b) / 8)] >>
                                             (first + b) % 8 &
                                         1);
                const double term = x[m * K + k] * codebook[index * vector + k % vector] *
                                    (has_scale ? scale[n] : 1);
                sum += term, magnitude += std::fabs(term);
            }
            require(close(out[m * N + n], sum, magnitude, out.rounding()), "gemm_vq");
        }
}

void check_refusals(Target target) {
    QuantizeDown op{};
    op.codes = Codes::e4m3;
    try {
        cpu::quantize_down(op, target);
        require(false, "8-bit floats are refused");
    } catch (const std::invalid_argument&) {
    }
    op.codes = Codes::packed;
    try {
        cpu::quantize_down(op, target);  // nothing to do, in the instruction set that was asked for
        return;
    } catch (const std::invalid_argument& error) {
        std::fprintf(stderr, "%s\n", error.what());
        std::exit(1);
    }
}

}  // namespace

int main(int count, char** arguments) {
    if (count != 4) {
        std::fprintf(stderr, "fuzz <isa> <rounds> <seed>\n");
        return 2;
    }
    Target target;
    target.isa = static_cast<Isa>(std::atoi(arguments[1]));
    check_refusals(target);
    for (int round = 0; round < std::atoi(arguments[2]); ++round) {
        const unsigned seed = static_cast<unsigned>(std::atoi(arguments[3]) + round);
        generator.seed(seed);
        where_it_is = "round with seed " + std::to_string(seed);
        for (auto fuzz : {fuzz_quantize, fuzz_gemm, fuzz_gelu, fuzz_w4a16, fuzz_vq}) fuzz(target);
        for (auto fuzz : {fuzz_8_bit, fuzz_w4a8}) fuzz(target);
    }
    std::printf("%s rounds agree\n", arguments[2]);
}
