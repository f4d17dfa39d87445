// Where a call runs, and the backend that runs it there.
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
    throw std::invalid_argument("device " + std::to_string(device) + ": built without CUDA");
}
#endif

// Where a call wants to run, checked, with the device's capability filled in.
inline Target placed(const char* op, const Target& given) {
    Target place = given;
    if (given.device < -1)
        check::refuse(op, "device=" + std::to_string(given.device) +
                              " is neither -1 (the CPU) nor a CUDA device index");
    if (given.threads < 1)
        check::refuse(op, "threads=" + std::to_string(given.threads) + " is less than 1");
    check::isa(op, int(given.isa), given.device >= 0);
    place.capability = given.device >= 0 ? known_capability(given.device) : 0;
    return place;
}

inline bool on_cpu(const Target& place) { return place.device < 0; }

inline size_t workspace_of(Op op, Codes codes, [[maybe_unused]] int capability, int64_t M,
                           int64_t N, int64_t K, int64_t R) {
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
