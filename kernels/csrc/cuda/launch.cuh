// Starting a kernel, and asking what GPU there is. Errors become exceptions with CUDA's own words;
// nothing waits for the GPU.
#pragma once

#include <cstddef>
#include <stdexcept>
#include <string>

#include "../nibble.h"
#include "primitives.cuh"

namespace nibble::cuda {

struct Grid {
    unsigned x = 1, y = 1, z = 1;
};

#ifdef NIBBLE_EMULATE

template <class... Parameters, class... Arguments>
void launch(void (*kernel)(Parameters...), Grid grid, int threads, size_t shared, const Target&,
            Arguments... arguments) {
    if (emulator::notes().wanted) {
        const auto bytes = [](const auto& value) {
            return std::string(reinterpret_cast<const char*>(&value), sizeof(value));
        };
        emulator::notes().launches.push_back({reinterpret_cast<const void*>(kernel),
                                              grid.x,
                                              grid.y,
                                              threads,
                                              shared,
                                              {bytes(Parameters(arguments))...}});
        return;
    }
    emulator::run({grid.x, grid.y, grid.z}, threads, shared,
                  [=] { kernel(Parameters(arguments)...); });
}
template <class Kernel>
void find_image(Kernel) {}
inline int multiprocessors(int) { return emulator::notes().multiprocessors; }

#else

inline void check(cudaError_t status, const char* what) {
    if (status != cudaSuccess) {
        throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(status));
    }
}

// Makes a device current for one scope: a caller's own choice is restored.
class OnDevice {
public:
    explicit OnDevice(int device) {
        check(cudaGetDevice(&before_), "asking for the current GPU");
        if (device != before_) check(cudaSetDevice(device), "choosing the GPU");
        changed_ = device != before_;
    }
    ~OnDevice() {
        if (changed_) cudaSetDevice(before_);
    }
    OnDevice(const OnDevice&) = delete;

private:
    int before_ = 0;
    bool changed_ = false;
};

// Whether the code that the current GPU gets of a kernel has `wait_for_previous_kernel` in it: that
// which the driver compiles from the PTX of compute_80 has not.
template <class Kernel>
bool knows_waiting(Kernel kernel) {
    cudaFuncAttributes attributes;
    check(cudaFuncGetAttributes(&attributes, kernel), "looking for code for this GPU");
    return attributes.ptxVersion >= 90;
}

// kernel<<<grid, threads, shared, stream>>>(arguments...) on target.device. More than 48 KB of
// shared memory has to be allowed first, for each kernel and device; asking every time keeps no
// state.
template <class... Parameters, class... Arguments>
void launch(void (*kernel)(Parameters...), Grid grid, int threads, size_t shared,
            const Target& target, Arguments... arguments) {
    OnDevice on(target.device);
    if (shared > 48 * 1024)
        check(
            cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(shared)),
            "allowing shared memory");
    // L1 cache and shared memory are one store. The blocks that a kernel's registers allow fit only
    // if shared memory may take its share.
    if (shared > 16 * 1024)
        check(cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout,
                                   int(cudaSharedmemCarveoutMaxShared)),
              "preferring shared memory");
    cudaLaunchConfig_t config = {};
    config.gridDim = dim3(grid.x, grid.y, grid.z);
    config.blockDim = dim3(threads);
    config.dynamicSmemBytes = shared;
    config.stream = static_cast<cudaStream_t>(target.stream);
    cudaLaunchAttribute early = {};
    early.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    early.val.programmaticStreamSerializationAllowed = 1;
    if (target.waits && target.capability >= 90 && knows_waiting(kernel))
        config.attrs = &early, config.numAttrs = 1;
    check(cudaLaunchKernelEx(&config, kernel, Parameters(arguments)...), "starting a kernel");
}

// Asks for a kernel's code for the current GPU: a module that was built for others, or PTX that is
// newer than the driver, is told before anything runs.
template <class Kernel>
void find_image(Kernel kernel) {
    cudaFuncAttributes attributes;
    check(cudaFuncGetAttributes(&attributes, kernel), "looking for code for this GPU");
}

inline int multiprocessors(int device) {
    int count = 0;
    check(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device),
          "asking for the number of multiprocessors");
    return count;
}

#endif
}  // namespace nibble::cuda
