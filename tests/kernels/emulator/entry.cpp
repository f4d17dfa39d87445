// The emulated kernels' C interface for ctypes: each op takes its struct of nibble.h and a Target,
// and returns null or the error's words.
#include <cxxabi.h>
#include <dlfcn.h>

#include <cstdlib>
#include <string>

#include "cuda/gemm_w4a4/gemm_w4a4.h"
#include "cuda/nvfp4/nvfp4.h"
#include "cuda/w4a8/w4a8.h"
#include "emulator.h"
#include "nibble.h"

namespace {

thread_local std::string words;

template <class Work>
const char* said(Work work) {
    try {
        work();
        return nullptr;
    } catch (const std::exception& error) {
        words = error.what();
        return words.c_str();
    }
}

}  // namespace

#define NIBBLE_ENTRY(Op, name)                                                                   \
    extern "C" const char* emulated_##name(const nibble::Op* op, const nibble::Target* target) { \
        return said([&] { nibble::cuda::name(*op, *target); });                                  \
    }

// A library of some of the sources lacks the others: a definition replaces these.
#define NIBBLE_ABSENT(...)                                                      \
    __attribute__((weak)) __VA_ARGS__ {                                         \
        throw std::runtime_error("this library was built without that source"); \
    }
namespace nibble::cuda {
NIBBLE_ABSENT(void quantize_down(const QuantizeDown&, const Target&))
NIBBLE_ABSENT(void gemm_w4a4_up(const GemmW4A4Up&, const Target&))
NIBBLE_ABSENT(void gemm_w4a4_up_sm75(const GemmW4A4Up&, const Target&, int))
NIBBLE_ABSENT(void gemm_w4a4_up_sm80(const GemmW4A4Up&, const Target&, int))
NIBBLE_ABSENT(void gemm_w4a4_up_sm90(const GemmW4A4Up&, const Target&))
NIBBLE_ABSENT(void gemm_w4a4_up_sm100(const GemmW4A4Up&, const Target&, int))
NIBBLE_ABSENT(size_t gemm_w4a4_up_sm90_workspace(Codes, int64_t, int64_t, int64_t))
NIBBLE_ABSENT(void gemm_w4a4_up_gelu_quantize_down(const GemmW4A4UpGeluQuantizeDown&,
                                                   const Target&))
NIBBLE_ABSENT(void gemm_w4a4_up_gelu_quantize_down_sm75(const GemmW4A4UpGeluQuantizeDown&,
                                                        const Target&, int))
NIBBLE_ABSENT(void gemm_w4a4_up_gelu_quantize_down_sm80(const GemmW4A4UpGeluQuantizeDown&,
                                                        const Target&, int))
NIBBLE_ABSENT(void gemm_w4a4_up_gelu_quantize_down_sm100(const GemmW4A4UpGeluQuantizeDown&,
                                                         const Target&, int))
NIBBLE_ABSENT(void gemv_w4a16(const W4A16&, const Target&))
NIBBLE_ABSENT(void gemm_w4a16(const W4A16&, const Target&))
NIBBLE_ABSENT(void gemm_vq(const GemmVQ&, const Target&))
NIBBLE_ABSENT(void linear_w4a8(const LinearW4A8&, const Target&))
NIBBLE_ABSENT(void quantize_tokens(const QuantizeDown&, const Target&))
NIBBLE_ABSENT(void linear_w4a8_sm75(const LinearW4A8&, const GemmW4A4Up&, const Target&, int))
NIBBLE_ABSENT(void linear_w4a8_sm80(const LinearW4A8&, const GemmW4A4Up&, const Target&, int))
NIBBLE_ABSENT(void linear_w4a8_sm100(const LinearW4A8&, const GemmW4A4Up&, const Target&, int))
NIBBLE_ABSENT(void quantize_nvfp4_down(const QuantizeNvfp4Down&, const Target&))
NIBBLE_ABSENT(void quantize_nvfp4_down_sm120(const QuantizeNvfp4Down&, const Target&))
NIBBLE_ABSENT(void gemm_nvfp4_up(const GemmNvfp4Up&, const Target&))
NIBBLE_ABSENT(void gemm_nvfp4_up_sm120(const GemmNvfp4Up&, const Target&, int))
NIBBLE_ABSENT(Route route(Op, int, int64_t, int64_t, int64_t))
NIBBLE_ABSENT(size_t workspace_bytes(Op, Codes, int, int64_t, int64_t, int64_t, int64_t))
NIBBLE_ABSENT(Codes codes(int))
}  // namespace nibble::cuda

NIBBLE_ENTRY(QuantizeDown, quantize_down)
NIBBLE_ENTRY(GemmW4A4Up, gemm_w4a4_up)
NIBBLE_ENTRY(GemmW4A4UpGeluQuantizeDown, gemm_w4a4_up_gelu_quantize_down)
NIBBLE_ENTRY(W4A16, gemv_w4a16)
NIBBLE_ENTRY(W4A16, gemm_w4a16)
NIBBLE_ENTRY(GemmVQ, gemm_vq)
NIBBLE_ENTRY(LinearW4A8, linear_w4a8)
NIBBLE_ENTRY(QuantizeNvfp4Down, quantize_nvfp4_down)
NIBBLE_ENTRY(GemmNvfp4Up, gemm_nvfp4_up)

extern "C" {

void emulated_seed(unsigned seed) { emulator::set_seed(seed); }

size_t emulated_workspace_bytes(const char* op, int codes, int capability, int64_t M, int64_t N,
                                int64_t K, int64_t R) {
    size_t bytes = 0;  // also for a GPU that the router refuses: the op itself then says so
    said([&] {
        bytes = nibble::cuda::workspace_bytes(nibble::op_named(op), nibble::Codes(codes),
                                              capability, M, N, K, R);
    });
    return bytes;
}

// From here on launches are noted instead of run, for so many multiprocessors; 0 runs them again.
void emulated_note(int multiprocessors) {
    emulator::Notes& notes = emulator::notes();
    notes.launches.clear();
    notes.wanted = multiprocessors > 0;
    notes.multiprocessors = multiprocessors > 0 ? multiprocessors : 4;
}

// A line for each: kernel, grid, threads, shared memory and the arguments' bytes in hexadecimal,
// between tabs.
const char* emulated_notes() {
    words.clear();
    for (const emulator::Launched& launch : emulator::notes().launches) {
        Dl_info found{};
        dladdr(launch.kernel, &found);
        char* name = abi::__cxa_demangle(found.dli_sname, nullptr, nullptr, nullptr);
        words += name ? name : "";
        std::free(name);
        for (size_t number :
             {size_t(launch.x), size_t(launch.y), size_t(launch.threads), launch.shared})
            words += "\t" + std::to_string(number);
        for (const std::string& bytes : launch.arguments) {
            words += "\t";
            for (unsigned char byte : bytes) {
                words += "0123456789abcdef"[byte / 16];
                words += "0123456789abcdef"[byte % 16];
            }
        }
        words += "\n";
    }
    emulator::notes().launches.clear();
    return words.c_str();
}

int emulated_codes(int capability) {
    int codes = -1;
    said([&] { codes = int(nibble::cuda::codes(capability)); });
    return codes;
}

// "path: reason", or "error: " and the words.
const char* emulated_route(const char* op, int capability, int64_t M, int64_t N, int64_t K) {
    const char* error = said([&] {
        nibble::Route route = nibble::cuda::route(nibble::op_named(op), capability, M, N, K);
        words = route.path + ": " + route.reason;
    });
    if (error) words = "error: " + words;
    return words.c_str();
}

// Sizes that the caller's structs must have.
size_t emulated_size(const char* name) {
    std::string n = name;
    if (n == "QuantizeDown") return sizeof(nibble::QuantizeDown);
    if (n == "GemmW4A4Up") return sizeof(nibble::GemmW4A4Up);
    if (n == "GemmW4A4UpGeluQuantizeDown") return sizeof(nibble::GemmW4A4UpGeluQuantizeDown);
    if (n == "W4A16") return sizeof(nibble::W4A16);
    if (n == "GemmVQ") return sizeof(nibble::GemmVQ);
    if (n == "LinearW4A8") return sizeof(nibble::LinearW4A8);
    if (n == "QuantizeNvfp4Down") return sizeof(nibble::QuantizeNvfp4Down);
    if (n == "GemmNvfp4Up") return sizeof(nibble::GemmNvfp4Up);
    return n == "Target" ? sizeof(nibble::Target) : 0;
}
}
