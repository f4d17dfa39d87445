// Where a call runs, from the numbers that Python gives, and the backend that runs it there.
#pragma once

#include <atomic>
#include <string>

#include "check.h"
#include "nibble.h"

namespace nibble {

using check::Address;

#ifdef NIBBLE_CUDA
constexpr bool HAS_CUDA = true;
#else
constexpr bool HAS_CUDA = false;
#endif

inline void* at(Address address) { return reinterpret_cast<void*>(address); }

#ifdef NIBBLE_CUDA
// Asked of the driver once a device; 0 means not asked yet. A device's capability never changes, so
// a race writes the same number.
inline int known_capability(int device) {
    static std::atomic<int> known[64];
    if (device < 0 || device >= 64)
        throw std::invalid_argument("device " + std::to_string(device) +
                                    " is no CUDA device index");
    int found = known[device].load(std::memory_order_relaxed);
    if (!found) known[device].store(found = cuda::capability(device), std::memory_order_relaxed);
    return found;
}
#else
inline int known_capability(int device) {
    throw std::invalid_argument("device " + std::to_string(device) +
                                ": this nibble_kernels was built without CUDA");
}
#endif

inline Target target_of(const char* op, int device, Address stream, int threads, int isa) {
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

inline bool on_cpu(const Target& place) { return place.device < 0; }

inline size_t workspace_of(Op op, Codes codes, int capability, int64_t M, int64_t N, int64_t K,
                           int64_t R) {
#ifdef NIBBLE_CUDA
    if (capability) return cuda::workspace_bytes(op, codes, capability, M, N, K, R);
#endif
    return cpu::workspace_bytes(op, codes, M, N, K, R);
}

}  // namespace nibble

#ifdef NIBBLE_CUDA
#define NIBBLE_RUN(op, arguments, place) \
    (on_cpu(place) ? cpu::op(arguments, place) : cuda::op(arguments, place))
#else
#define NIBBLE_RUN(op, arguments, place) cpu::op(arguments, place)
#endif
