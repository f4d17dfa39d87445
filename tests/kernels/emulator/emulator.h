// Runs CUDA kernels on the CPU, one fiber a thread, so that their logic is tested where there is no
// GPU.
//
// A block's threads are fibers that run until they have to wait: at a barrier, or at an instruction
// that a warp carries out together (mma, ldmatrix, shuffles), which happens when the last of its 32
// lanes arrives. What a GPU may do late is done as late as allowed: asynchronous copies spoil their
// destination at once and land only when waited for. Order between warps is shuffled by a seed.
// Misuse is an error: a warp whose lanes meet at different instructions, misaligned rows, a barrier
// that is never complete.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <string>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__
#define __restrict__

namespace emulator {

struct Index {
    unsigned x = 1, y = 1, z = 1;
};

struct Warp {
    const void* arguments[32] = {};
    const char* instruction = nullptr;
    int arrived = 0;
    unsigned generation = 0;
};

struct Barrier {
    int arrived = 0;
    unsigned generation = 0;
};

struct Copy {
    void* to;
    const void* from;
    size_t bytes;
    bool valid;
};

struct Thread;

// One running block. Kernels reach it through `current()`.
struct Block {
    Index index, grid;
    int threads = 0;
    char* shared = nullptr;
    size_t shared_bytes = 0;
    std::vector<Warp> warps;
    Barrier barriers[16];
    std::string error;
};

// A thread: where it stands, and the copies that it started.
struct Thread {
    int number = 0;                            // threadIdx.x
    std::vector<std::vector<Copy>> committed;  // oldest first
    std::vector<Copy> open;
    const unsigned* waits_for = nullptr;  // resumed once *waits_for != value
    unsigned value = 0;
    std::function<bool()> until;  // or once this is true
    bool done = false;
    int lane() const { return number % 32; }
    int warp() const { return number / 32; }
};

Block& block();
Thread& self();
void wait(const unsigned* counter, unsigned value);  // until *counter differs from value
void wait_until(std::function<bool()> condition);
[[noreturn]] void fail(const std::string& what);  // ends the launch with std::runtime_error

// Runs every block of a grid, one after another. `shared` bytes are allocated exactly, and filled
// with NaN bits.
void run(Index grid, int threads, size_t shared, const std::function<void()>& kernel);
void set_seed(unsigned seed);

// Launches that are noted instead of run: what a test compares with another launcher's. Off by
// default; the number of multiprocessors that launchers are told is 4 then.
struct Launched {
    const void* kernel;
    unsigned x, y;
    int threads;
    size_t shared;
    std::vector<std::string> arguments;  // the bytes of each
};
struct Notes {
    bool wanted = false;
    int multiprocessors = 4;
    std::vector<Launched> launches;
};
Notes& notes();

void barrier(int id, int count);

// What a warp does together. `compute(lanes)` gets the 32 lanes' arguments and writes their results
// into them.
template <class Arguments, class Compute>
void together(const char* instruction, Arguments& mine, Compute compute) {
    Warp& warp = block().warps[self().warp()];
    if (warp.arrived && std::strcmp(warp.instruction, instruction))
        fail(std::string("lanes of a warp meet at ") + warp.instruction + " and at " + instruction);
    warp.instruction = instruction;
    warp.arguments[self().lane()] = &mine;
    if (++warp.arrived < 32) return wait(&warp.generation, warp.generation);
    Arguments* lanes[32];
    for (int i = 0; i < 32; i++)
        lanes[i] = const_cast<Arguments*>(static_cast<const Arguments*>(warp.arguments[i]));
    warp.arrived = 0;
    warp.generation++;
    compute(lanes);
}

// Fails unless [p, p + bytes) lies in the block's shared memory and p is aligned.
void check_shared(const void* p, size_t bytes, size_t alignment, const char* what);

// The kernel's built-in variables, as functions behind macros.
inline Index thread_index() { return {unsigned(self().number), 0, 0}; }
inline Index block_index() { return block().index; }
inline Index block_size() { return {unsigned(block().threads), 1, 1}; }
inline Index grid_size() { return block().grid; }

}  // namespace emulator

#define threadIdx (emulator::thread_index())
#define blockIdx (emulator::block_index())
#define blockDim (emulator::block_size())
#define gridDim (emulator::grid_size())
