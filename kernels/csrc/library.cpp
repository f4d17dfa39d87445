// The C library nibble_cpu: the CPU's ops for any program that can load a library, with no Python
// in it. kernels/backends/cpu_library.py loads it by ctypes.
//
// Every function that can fail returns null, or words that the caller hands back to nibble_free;
// their first letter is the kind: V a wrong value, M no memory, R anything else. No exception
// leaves the library.
#include <cstdio>
#include <cstdlib>
#include <new>

#include "calls.h"
#include "questions.h"

#ifdef _WIN32
#define NIBBLE_EXPORT extern "C" __declspec(dllexport)
#else
#define NIBBLE_EXPORT extern "C" __attribute__((visibility("default")))
#endif

using namespace nibble;

namespace {

char no_memory[] = "Mout of memory";

char* words(char kind, const char* text) noexcept {
    const size_t size = std::strlen(text) + 2;
    char* said = static_cast<char*>(std::malloc(size));
    if (said) std::snprintf(said, size, "%c%s", kind, text);
    return said ? said : no_memory;
}

template <typename Work>
char* guarded(const Work& work) noexcept {
    try {
        work();
        return nullptr;
    } catch (const std::invalid_argument& error) {
        return words('V', error.what());
    } catch (const std::bad_alloc&) {
        return no_memory;
    } catch (const std::exception& error) {
        return words('R', error.what());
    } catch (...) {
        return words('R', "an unknown error");
    }
}

// As much of a text as fits, ended by a zero.
void copy(const std::string& text, char* to, size_t size) noexcept {
    std::snprintf(to, size, "%s", text.c_str());
}

}  // namespace

NIBBLE_EXPORT int nibble_abi() { return ABI; }

NIBBLE_EXPORT void nibble_free(char* said) {
    if (said != no_memory) std::free(said);
}

// nibble_quantize_down and so on: a Call of calls.h.
#define NIBBLE_DOOR(name, Op)                                                   \
    NIBBLE_EXPORT char* nibble_##name(const void* bytes, size_t size) {         \
        return guarded([&] { calls::name(received<Op>(#name, bytes, size)); }); \
    }
NIBBLE_DOORS(NIBBLE_DOOR)

NIBBLE_EXPORT char* nibble_capability(int device, int64_t* answer) {
    return guarded([&] { *answer = questions::capability(device); });
}

NIBBLE_EXPORT char* nibble_codes(int capability, int64_t* answer) {
    return guarded([&] { *answer = questions::codes(capability); });
}

NIBBLE_EXPORT char* nibble_workspace_bytes(const char* op, int capability, int64_t M, int64_t N,
                                           int64_t K, int64_t R, int codes, int64_t* answer) {
    return guarded(
        [&] { *answer = int64_t(questions::workspace_bytes(op, capability, M, N, K, R, codes)); });
}

NIBBLE_EXPORT char* nibble_linear_w4a4_bytes(int capability, int64_t M, int64_t N, int64_t K,
                                             int64_t R, int codes, int64_t* answer) {
    return guarded(
        [&] { *answer = int64_t(questions::linear_w4a4_bytes(capability, M, N, K, R, codes)); });
}

// path, newline, reason
NIBBLE_EXPORT char* nibble_route(const char* op, int capability, int64_t M, int64_t N, int64_t K,
                                 char* answer, size_t size) {
    return guarded([&] {
        const Route found = questions::route(op, capability, M, N, K);
        copy(found.path + "\n" + found.reason, answer, size);
    });
}

// compiler, newline, names of instruction sets
NIBBLE_EXPORT char* nibble_about(char* answer, size_t size) {
    return guarded(
        [&] { copy(questions::compiler() + "\n" + questions::cpu_isas(), answer, size); });
}
