// Picks the instruction set and refuses what the CPU does not compute.
//
// Each ops_*.cpp is compiled with flags of its own, named in its first line; all other files, this
// one too, for the platform's baseline. All of them want -O3 -ffp-contract=off (/O2 /fp:precise).
// Code for a newer processor sits in unnamed namespaces and uses no inline function of the standard
// library: the linker keeps one copy of such a function, which might be the one that an old
// processor cannot run.
#include "isa.h"

#include <cstdint>
#include <initializer_list>
#include <stdexcept>
#include <string>

#ifdef NIBBLE_X86
#ifdef _MSC_VER
#include <intrin.h>
#else
#include <cpuid.h>
#endif
#endif

namespace nibble::cpu {
namespace {

#if !defined(NIBBLE_X86)

Isa best_isa() { return Isa::portable; }

#else

// Four registers that cpuid fills. Asked of the processor itself: not every compiler's runtime
// knows what __builtin_cpu_supports asks (Zig's says no to everything).
struct Cpuid {
    int words[4];  // eax ebx ecx edx

    explicit Cpuid(int leaf) {
#ifdef _MSC_VER
        __cpuidex(words, leaf, 0);
#else
        __cpuid_count(leaf, 0, words[0], words[1], words[2], words[3]);
#endif
    }

    bool has(int word, std::initializer_list<int> bits) const {
        for (const int bit : bits)
            if (!(words[word] >> bit & 1)) return false;
        return true;
    }
};

// Whether the operating system saves registers: bits of XCR0, 1-2 for AVX, 5-7 for AVX-512. Only
// where cpuid has OSXSAVE.
bool saves(unsigned registers) {
#ifdef _MSC_VER
    const unsigned saved = static_cast<unsigned>(_xgetbv(0));
#else
    unsigned saved, high;
    __asm__("xgetbv" : "=a"(saved), "=d"(high) : "c"(0));
#endif
    return (saved & registers) == registers;
}

bool has_avx2() {
    if (Cpuid(0).words[0] < 7) return false;
    // FMA, OSXSAVE, AVX, F16C; AVX2
    return Cpuid(1).has(2, {12, 27, 28, 29}) && Cpuid(7).has(1, {5}) && saves(0x06);
}

// Of a processor that has AVX2.
bool has_avx512_vnni() {
    const Cpuid seven(7);
    return seven.has(1, {16, 17, 30, 31}) && seven.has(2, {11}) && saves(0xE6);  // F DQ BW VL, VNNI
}

Isa best_isa() {
    if (!has_avx2()) return Isa::portable;
#ifdef NIBBLE_SIMDE
    return Isa::avx512_vnni;
#else
    return has_avx512_vnni() ? Isa::avx512_vnni : Isa::avx2;
#endif
}

#endif

const char* name_of(Isa isa) {
    if (isa == Isa::avx512_vnni) return "AVX-512 VNNI";
    return isa == Isa::avx2 ? "AVX2" : "portable C++";
}

const Ops& ops(const Target& target) {
    static const Isa best = best_isa();
    const Isa isa = target.isa == Isa::best ? best : target.isa;
    if (static_cast<int>(isa) > static_cast<int>(best)) {
        throw std::invalid_argument(std::string("this CPU has no ") + name_of(isa) +
                                    "; the best it has is " + name_of(best));
    }
#ifdef NIBBLE_X86
    if (isa == Isa::avx512_vnni) return ops_avx512;
    if (isa == Isa::avx2) return ops_avx2;
#endif
    return ops_portable;
}

int threads(const Target& target) { return target.threads > 1 ? target.threads : 1; }

void whole_numbers(const char* op, Codes codes) {
    if (codes == Codes::e4m3)
        throw std::invalid_argument(
            std::string(op) + ": on the CPU activation codes are packed or int8, not 8-bit floats");
}

}  // namespace

void quantize_down(const QuantizeDown& op, const Target& target) {
    whole_numbers("quantize_down", op.codes);
    ops(target).quantize_down(op, threads(target));
}

void gemm_w4a4_up(const GemmW4A4Up& op, const Target& target) {
    whole_numbers("gemm_w4a4_up", op.codes);
    ops(target).gemm_w4a4_up(op, threads(target));
}

void gemm_w4a4_up_gelu_quantize_down(const GemmW4A4UpGeluQuantizeDown& op, const Target& target) {
    whole_numbers("gemm_w4a4_up_gelu_quantize_down", op.first.codes);
    whole_numbers("gemm_w4a4_up_gelu_quantize_down", op.codes2);
    ops(target).gemm_w4a4_up_gelu_quantize_down(op, threads(target));
}

void gemv_w4a16(const W4A16& op, const Target& target) {
    ops(target).gemv_w4a16(op, threads(target));
}

void gemm_w4a16(const W4A16& op, const Target& target) {
    ops(target).gemm_w4a16(op, threads(target));
}

void gemm_vq(const GemmVQ& op, const Target& target) { ops(target).gemm_vq(op, threads(target)); }

void linear_w4a8(const LinearW4A8& op, const Target& target) {
    ops(target).linear_w4a8(op, threads(target));
}

Route route(Op op, int64_t M, int64_t, int64_t) {
    const Isa isa = best_isa();
    const std::string path = std::string("cpu: ") + name_of(isa);
    if (op == Op::gemv_w4a16 || op == Op::gemm_w4a16) {
        return M <= FEW_TOKENS ? Route{path + ", codes straight into the sum",
                                       "few tokens: reading the weights is what takes time"}
                               : Route{path + ", panels of weights decoded to floats",
                                       "many tokens share one decoding"};
    }
    if (op == Op::gemm_vq) {
        if (vq_by_rows(M, 4))
            return {path + ", codewords straight into the sum",
                    "few tokens: tables of products would not pay"};
        return {path + ", products with the codewords looked up",
                "an addition instead of a sub-vector's products; where there are fewer outputs "
                "than codewords, more than 256 codewords or single weights, panels of weights "
                "decoded to floats"};
    }
    if (op == Op::quantize_down) return {path + ", one read of x", "the only way there is"};
    if (op == Op::linear_w4a8) {
        const char* whole = isa == Isa::avx512_vnni ? ", vpdpbusd" : ", 16-bit products";
        return {path + (isa == Isa::avx2 ? ", vpmaddwd" : whole) + ", panels of 32 outputs",
                "exact integer sums over all of K; the widest instruction set of this CPU"};
    }
    const char* product = ", 16-bit products";
    if (isa == Isa::avx2) product = ", vpmaddubsw";
    if (isa == Isa::avx512_vnni) product = ", vpdpbusd";
    return {path + product + ", panels of 32 outputs",
            "exact integer sums per group; the widest instruction set of this CPU"};
}

// Scratch is allocated inside a call.
size_t workspace_bytes(Op, Codes, int64_t, int64_t, int64_t, int64_t) { return 0; }

}  // namespace nibble::cpu
