// Picks the instruction set and refuses what the CPU does not compute.
//
// Each ops_*.cpp is compiled with flags of its own, named in its first line; all other files, this
// one too, for the platform's baseline. All of them want -O3 -ffp-contract=off (/O2 /fp:precise).
// Code for a newer processor sits in unnamed namespaces and uses no inline function of the standard
// library: the linker keeps one copy of such a function, which might be the one that an old
// processor cannot run.
#include "isa.h"

#include <cstdint>
#include <cstring>
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

#ifdef NIBBLE_X86
struct Leaf {
    uint32_t a = 0, b = 0, c = 0, d = 0;
};

Leaf cpuid(uint32_t leaf) {
    Leaf found;
#ifdef _MSC_VER
    int all[4];
    __cpuidex(all, 0, 0);
    if (static_cast<uint32_t>(all[0]) >= leaf) {
        __cpuidex(all, static_cast<int>(leaf), 0);
        found = {static_cast<uint32_t>(all[0]), static_cast<uint32_t>(all[1]),
                 static_cast<uint32_t>(all[2]), static_cast<uint32_t>(all[3])};
    }
#else
    if (!__get_cpuid_count(leaf, 0, &found.a, &found.b, &found.c, &found.d)) found = Leaf{};
#endif
    return found;
}

// Which registers the operating system saves: bit 2 for the upper halves of AVX, bits 5-7 for
// AVX-512.
uint64_t saved_registers() {
#ifdef _MSC_VER
    return _xgetbv(0);
#else
    uint32_t low, high;
    __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    return low | static_cast<uint64_t>(high) << 32;
#endif
}

bool has(uint32_t word, std::initializer_list<int> bits) {
    for (const int bit : bits)
        if (!(word >> bit & 1)) return false;
    return true;
}

Isa best_isa() {
    const Leaf one = cpuid(1), seven = cpuid(7);
    if (!has(one.c, {12, 27, 28, 29})) return Isa::portable;  // FMA, OSXSAVE, AVX, F16C
    const uint64_t saved = saved_registers();
    if ((saved & 6) != 6 || !has(seven.b, {5})) return Isa::portable;  // AVX2
#ifdef NIBBLE_SIMDE
    return Isa::avx512_vnni;
#endif
    const bool wide = has(seven.b, {16, 17, 30, 31}) && has(seven.c, {11});  // F, DQ, BW, VL; VNNI
    return wide && (saved & 0xE6) == 0xE6 ? Isa::avx512_vnni : Isa::avx2;
}
#else
Isa best_isa() { return Isa::portable; }
#endif

const char* name_of(Isa isa) {
    return isa == Isa::avx512_vnni ? "AVX-512 VNNI" : isa == Isa::avx2 ? "AVX2" : "portable C++";
}

const Ops& ops(const Where& where) {
    static const Isa best = best_isa();
    const Isa isa = where.isa == Isa::best ? best : where.isa;
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

int threads(const Where& where) { return where.threads > 1 ? where.threads : 1; }

void only_packed(const char* op, Codes codes) {
    if (codes != Codes::packed)
        throw std::invalid_argument(std::string(op) +
                                    ": on the CPU activation codes are packed, not 8-bit floats");
}

}  // namespace

void quantize_down(const QuantizeDown& op, const Where& where) {
    only_packed("quantize_down", op.codes);
    ops(where).quantize_down(op, threads(where));
}

void gemm_w4a4_up(const GemmW4A4Up& op, const Where& where) {
    only_packed("gemm_w4a4_up", op.codes);
    ops(where).gemm_w4a4_up(op, threads(where));
}

void gemm_w4a4_up_gelu_quantize_down(const GemmW4A4UpGeluQuantizeDown& op, const Where& where) {
    only_packed("gemm_w4a4_up_gelu_quantize_down", op.first.codes);
    only_packed("gemm_w4a4_up_gelu_quantize_down", op.codes2);
    ops(where).gemm_w4a4_up_gelu_quantize_down(op, threads(where));
}

void gemv_w4a16(const W4A16& op, const Where& where) { ops(where).gemv_w4a16(op, threads(where)); }

void gemm_w4a16(const W4A16& op, const Where& where) { ops(where).gemm_w4a16(op, threads(where)); }

void gemm_vq(const GemmVQ& op, const Where& where) { ops(where).gemm_vq(op, threads(where)); }

Route route(const char* op, int64_t M, int64_t, int64_t) {
    const Isa isa = best_isa();
    const std::string path = std::string("cpu: ") + name_of(isa);
    if (!std::strcmp(op, "gemv_w4a16") || !std::strcmp(op, "gemm_w4a16")) {
        return M <= FEW_TOKENS ? Route{path + ", codes straight into the sum",
                                       "few tokens: reading the weights is what takes time"}
                               : Route{path + ", panels of weights decoded to floats",
                                       "many tokens share one decoding"};
    }
    if (!std::strcmp(op, "gemm_vq")) {
        if (vq_by_rows(M, 4))
            return {path + ", codewords straight into the sum",
                    "few tokens: tables of products would not pay"};
        return {path + ", products with the codewords looked up",
                "an addition instead of a sub-vector's products; where there are fewer outputs "
                "than codewords, more than 256 codewords or single weights, panels of weights "
                "decoded to floats"};
    }
    if (!std::strcmp(op, "quantize_down"))
        return {path + ", one read of x", "the only way there is"};
    const char* product = isa == Isa::avx512_vnni ? ", vpdpbusd"
                          : isa == Isa::avx2      ? ", vpmaddubsw"
                                                  : ", 16-bit products";
    return {path + product + ", panels of 32 outputs",
            "exact integer sums per group; the widest instruction set of this CPU"};
}

size_t workspace_bytes(const char*, int64_t, int64_t, int64_t, int64_t) {
    return 0;
}  // scratch is allocated inside a call

}  // namespace nibble::cpu
