// Products of a warpgroup in plain C++: the part of primitives_sm90.cuh that multiplies.
#pragma once

#include "emulated_primitives.h"

namespace emulated {

struct Store {
    float4* to;
    float4 value;
};

enum class Kind { e4m3, tf32, s8 };

// What one warp has asked for: its 16 of the 64 rows.
struct Product {
    Kind kind;
    bool accumulate, done = false;
    float* d[32];  // of s8: integers, kept as the bits that they are
    const uint32_t* a[32];
    uint64_t b;
    std::vector<float> before;  // [lane][32], where the sums are added to
};

struct WarpProducts {
    bool fenced = false;
    std::deque<std::vector<Product>> groups = {{}};   // the last one is open
    std::map<const float*, std::vector<float>> sums;  // of registers under way, by lane 0's address
    std::vector<uint64_t> history;  // what was asked for, to compare the four warps
};

// Belongs to the running block: made anew where a block makes its barriers.
struct Products {
    std::map<int, WarpProducts> warps;
    std::map<int, std::vector<Store>> stores;
};
inline thread_local Products products;
inline WarpProducts& of_this_warp() { return products.warps[emulator::self().warp()]; }

inline float e4m3(uint8_t x) {
    int exponent = x >> 3 & 15, mantissa = x & 7;
    if ((x & 0x7F) == 0x7F) return NAN;
    float y = exponent ? ldexpf(8 + mantissa, exponent - 10) : ldexpf(mantissa, -9);
    return x & 0x80 ? -y : y;
}

// Byte `k` of row n of B.
inline const char* operand(uint64_t descriptor, int n, int k) {
    const uint32_t start = (descriptor & 0x3FFF) << 4, leading = (descriptor >> 16 & 0x3FFF) << 4;
    const uint32_t stride = (descriptor >> 32 & 0x3FFF) << 4;
    const int swizzle = int(descriptor >> 62);
    uint32_t at;
    if (swizzle == 1) {  // 128 bytes: rows of 128 bytes, eight of them `stride` from the next
                         // eight; the leading offset is not used
        at = start + n / 8 * stride + n % 8 * 128 + k;
        at ^= (at >> 7 & 7) << 4;
    } else {  // none: 8 rows x 16 bytes dense; `leading` along k, `stride` along n
        at = start + n / 8 * stride + k / 16 * leading + n % 8 * 16 + k % 16;
    }
    if (at + 4 > emulator::block().shared_bytes)
        emulator::fail("a product's operand lies outside of shared memory");
    return emulator::block().shared + at;
}

// Hopper's e4m3 sum: products and addend aligned to the largest exponent, 13 bits kept below it,
// cut towards zero.
inline float add_aligned(const float* x, int count) {
    int top = -1000;
    for (int i = 0; i < count; i++) {
        if (x[i] != x[i]) return NAN;
        if (x[i]) top = std::max(top, ilogbf(x[i]));
    }
    if (top == -1000) return 0;
    double sum = 0, unit = ldexp(1.0, top - 13);
    for (int i = 0; i < count; i++) sum += trunc(x[i] / unit);
    sum *= unit;
    if (!sum) return 0;
    unit = ldexp(1.0, ilogb(sum) - 13);
    return float(trunc(sum / unit) * unit);
}

inline float cut_to_float(double x) {
    float y = float(x);
    return std::isfinite(y) && fabs(double(y)) > fabs(x) ? nextafterf(y, 0) : y;
}

inline float tf32(uint32_t bits) { return bit_cast<float>(bits & 0xFFFFE000); }

// What a byte stands for.
inline const float* numbers(Kind kind) {
    static float floats[256], integers[256];
    static const bool filled = [] {
        for (int i = 0; i < 256; i++) floats[i] = e4m3(uint8_t(i)), integers[i] = int8_t(i);
        return true;
    }();
    (void)filled;
    return kind == Kind::s8 ? integers : floats;
}

inline void carry_out(WarpProducts& warp, Product& p) {
    if (p.done) return;
    p.done = true;
    const float* table = numbers(p.kind);
    const int depth = p.kind == Kind::tf32 ? 8 : 32;
    float a[16][32], b[64][32], terms[33];
    for (int lane = 0; lane < 32; lane++)
        for (int r = 0; r < 4; r++) {
            const int row = lane / 4 + r % 2 * 8, t = lane % 4;
            if (p.kind == Kind::tf32)
                a[row][t + r / 2 * 4] = tf32(p.a[lane][r]);
            else
                for (int i = 0; i < 4; i++)
                    a[row][r / 2 * 16 + 4 * t + i] = table[p.a[lane][r] >> (8 * i) & 255];
        }
    for (int n = 0; n < 64; n++)
        for (int k = 0; k < depth; k++) {
            if (p.kind != Kind::tf32)
                b[n][k] = table[uint8_t(*operand(p.b, n, k))];
            else {
                uint32_t bits;
                std::memcpy(&bits, operand(p.b, n, 4 * k), 4);
                b[n][k] = tf32(bits);
            }
        }
    std::vector<float>& sums = warp.sums[p.d[0]];
    if (!p.before.empty()) sums = p.before;
    if (sums.empty()) sums.resize(32 * 32);
    for (int lane = 0; lane < 32; lane++)
        for (int e = 0; e < 32; e++) {
            const int row = lane / 4 + e / 2 % 2 * 8, n = e / 4 * 8 + lane % 4 * 2 + e % 2;
            float& sum = sums[lane * 32 + e];
            if (p.kind == Kind::tf32) {
                double exact = p.accumulate ? sum : 0;
                for (int k = 0; k < depth; k++) exact += double(a[row][k]) * b[n][k];
                sum = cut_to_float(exact);
            } else if (p.kind == Kind::s8) {
                int total = p.accumulate ? bit_cast<int>(sum) : 0;
                for (int k = 0; k < depth; k++) total += int(a[row][k]) * int(b[n][k]);
                sum = bit_cast<float>(total);
            } else {
                // Fast where nothing can be cut: integers (up to a power of two that the smallest
                // term tells) below 2^13.
                double exact = p.accumulate ? sum : 0, size = fabs(exact);
                bool integers = exact == rint(exact);
                for (int k = 0; k < depth; k++) {
                    const float x = a[row][k] * b[n][k];
                    terms[k] = x, exact += x, size += fabsf(x), integers &= x == rintf(x);
                }
                if (integers && size < 8192) {
                    sum = float(exact);
                    continue;
                }
                terms[depth] = p.accumulate ? sum : 0;
                sum = add_aligned(terms, depth + 1);
            }
        }
}

inline void ask(Kind kind, bool accumulate, float* d, const uint32_t (&a)[4], uint64_t b) {
    struct Lane {
        float* d;
        const uint32_t* a;
        uint64_t b;
        Kind kind;
        bool accumulate;
    } mine{d, a, b, kind, accumulate};
    emulator::together("wgmma.mma_async", mine, [](Lane** lanes) {
        WarpProducts& warp = of_this_warp();
        if (!warp.fenced)
            emulator::fail(
                "a product whose registers may have been touched since the last wait, without a "
                "fence");
        Product p;
        p.kind = lanes[0]->kind, p.accumulate = lanes[0]->accumulate, p.b = lanes[0]->b;
        for (int i = 0; i < 32; i++) {
            if (lanes[i]->b != p.b) emulator::fail("lanes disagree about a product's operand");
            p.d[i] = lanes[i]->d, p.a[i] = lanes[i]->a;
        }
        warp.history.push_back(p.b);
        const int first = emulator::self().warp() / 4 * 4;
        for (int other = first; other < first + 4; other++) {
            const auto& theirs = products.warps[other].history;
            const size_t at = warp.history.size() - 1;
            if (theirs.size() > at && theirs[at] != p.b)
                emulator::fail("the warps of a warpgroup ask for different products");
        }
        if (p.accumulate && !warp.sums.count(p.d[0])) {
            p.before.resize(32 * 32);
            for (int i = 0; i < 32; i++) std::memcpy(&p.before[32 * i], p.d[i], 32 * sizeof(float));
            warp.sums[p.d[0]] = p.before;
        }
        if (!p.accumulate) warp.sums[p.d[0]].assign(32 * 32, 0.0f);
        for (int i = 0; i < 32; i++) std::memset(p.d[i], 0xFF, 32 * sizeof(float));
        warp.groups.back().push_back(p);
        if (whim() % 2)  // products end in order
            for (auto& group : warp.groups)
                for (Product& each : group) carry_out(warp, each);
    });
}

inline void finish(WarpProducts& warp, size_t running) {
    while (warp.groups.size() - 1 > running) {
        for (Product& p : warp.groups.front()) carry_out(warp, p);
        for (Product& p : warp.groups.front()) {
            auto found = warp.sums.find(p.d[0]);
            if (found == warp.sums.end()) continue;
            for (int i = 0; i < 32; i++)
                std::memcpy(p.d[i], &found->second[32 * i], 32 * sizeof(float));
            warp.sums.erase(found);
        }
        warp.groups.pop_front();
    }
    warp.fenced = false;
}

}  // namespace emulated

inline void product_store(float4* to, float4 value) {
    emulator::check_shared(to, 16, 16, "a store for the tensor core");
    std::memset(to, 0xFF, 16);
    emulated::products.stores[emulator::self().number].push_back({to, value});
}
inline void product_store_fence() {
    auto& stores = emulated::products.stores[emulator::self().number];
    for (const emulated::Store& store : stores) *store.to = store.value;
    stores.clear();
}

inline uint64_t product_operand(const void* start, uint32_t leading, uint32_t stride,
                                uint64_t swizzle) {
    emulator::check_shared(start, 16, 16, "a product's operand");
    return swizzle << 62 | uint64_t(stride >> 4) << 32 | uint64_t(leading >> 4) << 16 |
           uint64_t((shared_address(start) & 0x3FFFF) >> 4);
}
inline uint64_t product_operand_swizzled(const void* start) {
    return product_operand(start, 16, 1024, 1);
}
inline uint64_t product_operand_repeated(const void* start) {
    return product_operand(start, 0, 128, 0);
}

inline void product_fence() {
    int nothing = 0;
    emulator::together("wgmma.fence", nothing,
                       [](int**) { emulated::of_this_warp().fenced = true; });
}
inline void product_commit() {
    int nothing = 0;
    emulator::together("wgmma.commit_group", nothing,
                       [](int**) { emulated::of_this_warp().groups.emplace_back(); });
}
template <int N>
void product_wait() {
    emulated::linger();
    int nothing = 0;
    emulator::together("wgmma.wait_group", nothing,
                       [](int**) { emulated::finish(emulated::of_this_warp(), N); });
}
inline void product_landed(float (&)[32]) {}
inline void product_landed(int (&)[32]) {}

inline void product_e4m3_first(float (&d)[32], const uint32_t (&a)[4], uint64_t b) {
    emulated::ask(emulated::Kind::e4m3, false, d, a, b);
}
inline void product_e4m3_next(float (&d)[32], const uint32_t (&a)[4], uint64_t b) {
    emulated::ask(emulated::Kind::e4m3, true, d, a, b);
}
inline void product_s8_first(int (&d)[32], const uint32_t (&a)[4], uint64_t b) {
    emulated::ask(emulated::Kind::s8, false, reinterpret_cast<float*>(d), a, b);
}
inline void product_s8_next(int (&d)[32], const uint32_t (&a)[4], uint64_t b) {
    emulated::ask(emulated::Kind::s8, true, reinterpret_cast<float*>(d), a, b);
}
inline void product_tf32(float (&d)[32], const uint32_t (&a)[4], uint64_t b) {
    emulated::ask(emulated::Kind::tf32, false, d, a, b);
}

inline void barrier_init_fence() { emulated::products = {}; }
