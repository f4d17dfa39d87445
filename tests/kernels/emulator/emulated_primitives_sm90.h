// kernels/csrc/cuda/primitives_sm90.cuh in plain C++. See emulator.h.
//
// A warp's product reads its operands at once, or as late as the wait for it: chance decides, each
// time. Its sums hold NaN in between. A tile under way, and a store for the tensor core that no
// fence has followed, hold NaN as well. So whatever is touched too early shows.
#pragma once

#include <deque>
#include <map>
#include <random>
#include <stdexcept>
#include <utility>
#include <vector>

#include "emulated_primitives.h"

namespace nibble {

using Barrier = uint64_t;

// ---- products of a warp -------------------------------------------------------------------------

inline uint32_t round_to_tf32(float x) {
    const uint32_t bits = uint32_t(as_int(x));
    const bool number = (bits & 0x7F800000) != 0x7F800000;
    return number ? (bits + 0x1000) & 0xFFFFE000 : bits;
}
inline void mma_tf32(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    struct Lane {
        float* c;
        const uint32_t *a, *b;
    } mine{c, a, b};
    emulator::together("mma.m16n8k8", mine, [](Lane** lanes) {
        const auto cut = [](uint32_t bits) { return double(as_float(int(bits & 0xFFFFE000))); };
        for (int lane = 0; lane < 32; lane++)
            for (int r = 0; r < 4; r++) {
                const int g = lane / 4, column = 2 * (lane % 4) + r % 2;
                double sum = lanes[lane]->c[r];
                for (int k = 0; k < 8; k++)
                    sum += cut(lanes[4 * g + k % 4]->a[r / 2 + k / 4 * 2]) *
                           cut(lanes[4 * column + k % 4]->b[k / 4]);
                lanes[lane]->c[r] = float(sum);
            }
    });
}

// ---- barriers in shared memory and the copy engine ----------------------------------------------

struct TensorMap {
    const char* base;
    uint64_t rows, row_bytes;
    uint32_t box_rows, box_bytes;
};

inline TensorMap tensor_map(const void* base, uint64_t rows, uint64_t row_bytes, uint32_t box_rows,
                            uint32_t box_bytes) {
    const bool aligned = reinterpret_cast<uintptr_t>(base) % 16 == 0 && row_bytes % 16 == 0;
    if (!aligned || !rows || !row_bytes || box_rows > 256 || (box_bytes != 64 && box_bytes != 128))
        throw std::runtime_error("the copy engine cannot read such a matrix");
    return {static_cast<const char*>(base), rows, row_bytes, box_rows, box_bytes};
}

namespace emulated {

struct Tile {
    char* to;
    TensorMap map;
    int byte, row;
};

struct BarrierState {
    uint32_t count = 0, missing = 0, phase = 0;
    int64_t bytes = 0;  // expected and not yet here; may be below zero for a moment
    std::vector<Tile> tiles;
};

inline thread_local std::map<const void*, BarrierState> barriers;
inline thread_local std::mt19937 whim(0);  // early or late

// Lets the other threads run for a while: what a barrier has permitted happens before this thread's
// next step.
inline void linger() {
    for (unsigned rounds = whim() % 4; rounds; rounds--)
        emulator::wait_until([asked = false]() mutable { return std::exchange(asked, true); });
}

inline BarrierState& state(const Barrier* barrier) {
    emulator::check_shared(barrier, 8, 8, "a barrier");
    auto found = barriers.find(barrier);
    if (found == barriers.end()) emulator::fail("a barrier is used before it was made");
    return found->second;
}

inline void land(BarrierState& s, const Tile& tile) {
    const uint32_t width = tile.map.box_bytes;
    for (uint32_t r = 0; r < tile.map.box_rows; r++)
        for (uint32_t b = 0; b < width; b += 16) {
            char* to = tile.to + r * width + b;
            // 128-byte swizzle: address bits 4-6 ^= bits 7-9; 64-byte swizzle: bits 4-5 ^= bits 7-8
            uintptr_t at = uintptr_t(to - emulator::block().shared);
            at ^= width == 128 ? (at >> 7 & 7) << 4 : (at >> 7 & 3) << 4;
            for (int i = 0; i < 16; i++) {
                int64_t row = int64_t(tile.row) + r, byte = int64_t(tile.byte) + b + i;
                bool inside = row >= 0 && row < int64_t(tile.map.rows) && byte >= 0 &&
                              byte < int64_t(tile.map.row_bytes);
                emulator::block().shared[at + i] =
                    inside ? tile.map.base[row * tile.map.row_bytes + byte] : 0;
            }
        }
    s.bytes -= int64_t(tile.map.box_rows) * width;
}

inline void settle(BarrierState& s) {
    if (s.missing || s.bytes) return;
    s.missing = s.count;
    s.phase++;
}

inline void land_all(BarrierState& s) {
    for (const Tile& tile : s.tiles) land(s, tile);
    s.tiles.clear();
    settle(s);
}

}  // namespace emulated

inline void copy_tile(void* to, const TensorMap& map, int byte, int row, Barrier* barrier) {
    const size_t bytes = size_t(map.box_rows) * map.box_bytes;
    emulator::check_shared(to, bytes, map.box_bytes == 128 ? 1024 : 512, "a tile");
    emulated::BarrierState& s = emulated::state(barrier);
    std::memset(to, 0xFF, bytes);
    s.tiles.push_back({static_cast<char*>(to), map, byte, row});
    if (emulated::whim() % 2) emulated::land_all(s);
}

inline void barrier_init(Barrier* barrier, uint32_t count) {
    emulator::check_shared(barrier, 8, 8, "a barrier");
    emulated::BarrierState fresh;
    fresh.count = fresh.missing = count;
    emulated::barriers[barrier] = fresh;
}
inline void barrier_expect(Barrier* barrier, uint32_t bytes) {
    emulated::state(barrier).bytes += bytes;
}
inline void barrier_arrive(Barrier* barrier) {
    emulated::BarrierState& s = emulated::state(barrier);
    if (!s.missing) emulator::fail("more threads arrive at a barrier than it counts");
    s.missing--;
    emulated::settle(s);
    emulated::linger();
}
inline void barrier_wait(Barrier* barrier, uint32_t parity) {
    emulated::BarrierState* s = &emulated::state(barrier);
    emulator::wait_until([s, parity] {
        if (!s->tiles.empty()) emulated::land_all(*s);
        return (s->phase & 1) != parity;  // the phase under way has the other parity
    });
}

inline void sync_named(int id, int threads) {
    if (id < 1 || id > 15) emulator::fail("a numbered barrier must have a number from 1 to 15");
    emulator::barrier(id, threads);
}

inline void registers_move(int count) {
    if (count % 8 || count < 24 || count > 256)
        emulator::fail("setmaxnreg takes multiples of 8 from 24 to 256");
    emulator::together("setmaxnreg", count, [](int**) {});
}
template <int Count>
void registers_release() {
    registers_move(Count);
}
template <int Count>
void registers_claim() {
    registers_move(Count);
}

#include "emulated_products_sm90.h"

// ---- bytes --------------------------------------------------------------------------------------

inline uint32_t permute_bytes(uint32_t low, uint32_t high, uint32_t selectors) {
    const uint64_t table = uint64_t(high) << 32 | low;
    uint32_t y = 0;
    for (int i = 0; i < 4; i++) {
        const uint32_t selector = selectors >> (4 * i) & 15,
                       byte = table >> (8 * (selector & 7)) & 255;
        y |= (selector & 8 ? (byte & 0x80 ? 255 : 0) : byte) << (8 * i);
    }
    return y;
}

inline void store_matrix_x4_transposed(void* row, const uint32_t (&r)[4]) {
    emulator::check_shared(row, 16, 16, "a row of stmatrix");
    struct Lane {
        char* row;
        const uint32_t* r;
    } mine{static_cast<char*>(row), r};
    emulator::together("stmatrix.x4.trans", mine, [](Lane** lanes) {
        for (int lane = 0; lane < 32; lane++)
            for (int j = 0; j < 4; j++)
                for (int half = 0; half < 2; half++) {
                    const uint16_t bits = uint16_t(lanes[lane]->r[j] >> (16 * half));
                    std::memcpy(lanes[8 * j + lane % 4 * 2 + half]->row + lane / 4 * 2, &bits, 2);
                }
    });
}

}  // namespace nibble
