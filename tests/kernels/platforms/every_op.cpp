// Loads a CPU library and runs every op of it on numbers that are the same everywhere; prints the
// results. One program for each platform, so that one platform's library can be held against
// another's.
//
//     every_op LIBRARY ISA
//
// It takes the structs alone from nibble.h and nothing of the C++ library, so that a cross-compiler
// need not build one for it.
#include <cstdint>
#include <cstdio>
#include <cstdlib>

#define __CUDACC_RTC__
#include "nibble.h"

#ifdef _WIN32
#include <windows.h>
static void* symbol(const char* library, const char* name) {
    HMODULE loaded = LoadLibraryA(library);
    return loaded ? reinterpret_cast<void*>(GetProcAddress(loaded, name)) : nullptr;
}
#else
#include <dlfcn.h>
static void* symbol(const char* library, const char* name) {
    void* loaded = dlopen(library, RTLD_NOW);
    if (!loaded) std::fprintf(stderr, "%s\n", dlerror());
    return loaded ? dlsym(loaded, name) : nullptr;
}
#endif

using namespace nibble;

template <typename Op>
struct Call {  // as in calls.h
    Target place;
    Op op;
    int64_t workspace_size;
};

static const char* library;
static int isa;

// Memory aligned to 64 bytes, never freed, of a multiplicative generator's numbers or of zeros.
static uint32_t state = 12345;
static uint32_t next() { return (state = state * 1664525u + 1013904223u) >> 8; }

template <typename T>
static T* memory(size_t count) {
    char* got = static_cast<char*>(std::calloc(count * sizeof(T) + 64, 1));
    return reinterpret_cast<T*>((reinterpret_cast<uintptr_t>(got) + 63) & ~uintptr_t(63));
}

static float* floats(size_t count, float low, float high) {
    float* made = memory<float>(count);
    for (size_t i = 0; i < count; ++i) made[i] = low + (high - low) * float(next()) / 16777216.0f;
    return made;
}

static uint8_t* bytes(size_t count) {
    uint8_t* made = memory<uint8_t>(count);
    for (size_t i = 0; i < count; ++i) made[i] = uint8_t(next());
    return made;
}

template <typename Op>
static void run(const char* name, const Op& op, int threads = 2) {
    Call<Op> call{};
    call.place.threads = threads;
    call.place.isa = Isa(isa);
    call.op = op;
    char door[64];
    std::snprintf(door, sizeof door, "nibble_%s", name);
    auto function = reinterpret_cast<char* (*)(const void*, size_t)>(symbol(library, door));
    if (!function) {
        std::fprintf(stderr, "no %s in %s\n", door, library);
        std::exit(2);
    }
    if (const char* said = function(&call, sizeof call)) std::printf("refused %s\n", said);
}

static void show(const char* name, const float* values, size_t count) {
    std::printf("%s", name);
    for (size_t i = 0; i < count; ++i) std::printf(" %.9g", double(values[i]));
    std::printf("\n");
}

static void show(const char* name, const uint8_t* values, size_t count) {
    std::printf("%s", name);
    for (size_t i = 0; i < count; ++i) std::printf(" %d", values[i]);
    std::printf("\n");
}

int main(int, char** arguments) {
    library = arguments[1];
    isa = std::atoi(arguments[2]);
    constexpr int64_t M = 5, N = 128, K = 192, R = 16, R2 = 8;
    const float* x = floats(M * K, -3, 3);

    QuantizeDown quantize{M,
                          K,
                          R,
                          x,
                          K,
                          Dtype::f32,
                          floats(K, 0.5f, 2),
                          floats(K * R, -1, 1),
                          Dtype::f32,
                          false,
                          true,
                          0,
                          Codes::packed,
                          memory<uint8_t>(M * K / 2),
                          memory<float>(K / GROUP * M),
                          memory<float>(M * R)};
    run("quantize_down", quantize);
    show("codes", static_cast<uint8_t*>(quantize.q), M * K / 2);
    show("ascales", quantize.ascales, K / GROUP * M);
    show("h", quantize.h, M * R);

    GemmW4A4Up up{M,
                  N,
                  K,
                  R,
                  Codes::packed,
                  quantize.q,
                  false,
                  0,
                  quantize.ascales,
                  quantize.h,
                  R,
                  bytes(N * K / 2),
                  floats(K / GROUP * N, 0.01f, 0.1f),
                  floats(N * R, -1, 1),
                  floats(N, -1, 1),
                  Dtype::f32,
                  memory<float>(M * N),
                  Dtype::f32,
                  nullptr};
    run("gemm_w4a4_up", up);
    show("gemm_w4a4_up", static_cast<float*>(up.out), M * N);

    GemmW4A4UpGeluQuantizeDown fused{up,
                                     R2,
                                     floats(N, 0.5f, 2),
                                     floats(N * R2, -1, 1),
                                     true,
                                     false,
                                     Codes::packed,
                                     memory<uint8_t>(M * N / 2),
                                     memory<float>(N / GROUP * M),
                                     memory<float>(M * R2),
                                     nullptr};
    run("gemm_w4a4_up_gelu_quantize_down", fused);
    show("codes2", static_cast<uint8_t*>(fused.q2), M * N / 2);
    show("ascales2", fused.ascales2, N / GROUP * M);
    show("h2", fused.h2, M * R2);

    W4A16 w4a16{M,
                N,
                K,
                x,
                Dtype::f32,
                up.weight,
                up.weight_scale,
                nullptr,
                up.bias,
                Dtype::f32,
                memory<float>(M * N)};
    run("gemm_w4a16", w4a16);
    show("gemm_w4a16", static_cast<float*>(w4a16.out), M * N);
    w4a16.M = 1;
    run("gemv_w4a16", w4a16);
    show("gemv_w4a16", static_cast<float*>(w4a16.out), N);

    GemmVQ vq{M,
              N,
              K,
              8,
              4,
              x,
              Dtype::f32,
              bytes(N * K / 4),
              floats(256 * 4, -1, 1),
              Dtype::f32,
              nullptr,
              up.bias,
              Dtype::f32,
              nullptr,
              Dtype::f32,
              memory<float>(M * N),
              Dtype::f32};
    run("gemm_vq", vq);
    show("gemm_vq", static_cast<float*>(vq.out), M * N);

    LinearW4A8 w4a8{M,
                    N,
                    K,
                    R,
                    32,
                    x,
                    K,
                    Dtype::f32,
                    quantize.smooth,
                    quantize.proj_down,
                    up.weight,
                    bytes(K / 32 * N),
                    up.bias,
                    bytes(16),
                    up.proj_up,
                    up.bias,
                    Dtype::f32,
                    true,
                    memory<float>(M * N),
                    nullptr};
    run("linear_w4a8", w4a8);
    show("linear_w4a8", static_cast<float*>(w4a8.out), M * N);

    quantize.K = 65;  // a refusal is an exception inside, and words outside
    run("quantize_down", quantize);
    return 0;
}
