// The scheduler: fibers, barriers, and the search for deadlocks. See emulator.h.
#include "emulator.h"

#include <ucontext.h>

#include <algorithm>
#include <cstdlib>
#include <memory>
#include <new>
#include <random>
#include <stdexcept>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif

namespace emulator {
namespace {

constexpr size_t STACK = 128 * 1024;

struct Fiber : Thread {
    ucontext_t context;
    std::unique_ptr<char[]> stack;
    void* fake_stack = nullptr;  // AddressSanitizer's
};

struct Run {
    Block block;
    std::vector<Fiber> fibers;
    ucontext_t scheduler;
    Fiber* running = nullptr;
    const std::function<void()>* kernel = nullptr;
    const void* scheduler_stack = nullptr;
    size_t scheduler_stack_size = 0;
};

thread_local Run* now = nullptr;
thread_local std::mt19937 shuffle_order(0);

void to_scheduler(bool for_ever) {
    Fiber* me = now->running;
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_start_switch_fiber(for_ever ? nullptr : &me->fake_stack, now->scheduler_stack,
                                   now->scheduler_stack_size);
#endif
    swapcontext(&me->context, &now->scheduler);
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(me->fake_stack, &now->scheduler_stack,
                                    &now->scheduler_stack_size);
#endif
    (void)for_ever;
}

void fiber_main() {
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(nullptr, &now->scheduler_stack, &now->scheduler_stack_size);
#endif
    (*now->kernel)();
    now->running->done = true;
    to_scheduler(true);
}

void resume(Fiber& fiber) {
    now->running = &fiber;
#if defined(__SANITIZE_ADDRESS__)
    void* saved = nullptr;
    __sanitizer_start_switch_fiber(&saved, fiber.stack.get(), STACK);
#endif
    swapcontext(&now->scheduler, &fiber.context);
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(saved, nullptr, nullptr);
#endif
}

bool ready(Fiber& fiber) {
    if (fiber.done) return false;
    if (fiber.until) {
        if (!fiber.until()) return false;
        fiber.until = nullptr;
    }
    if (fiber.waits_for && *fiber.waits_for == fiber.value) return false;
    fiber.waits_for = nullptr;
    return true;
}

void run_block(Run& run) {
    std::vector<int> warps(run.block.warps.size());
    for (size_t i = 0; i < warps.size(); i++) warps[i] = int(i);
    for (;;) {
        bool moved = false, all_done = true;
        std::shuffle(warps.begin(), warps.end(), shuffle_order);
        for (int warp : warps)
            for (int lane = 0; lane < 32; lane++) {
                Fiber& fiber = run.fibers[warp * 32 + lane];
                if (ready(fiber)) {
                    moved = true;
                    resume(fiber);
                    if (!run.block.error.empty()) throw std::runtime_error(run.block.error);
                }
                all_done &= fiber.done;
            }
        if (all_done) return;
        if (!moved)
            throw std::runtime_error(
                "deadlock: every thread of the block waits at a barrier or for its warp");
    }
}

}  // namespace

Block& block() { return now->block; }
Thread& self() { return *now->running; }
Notes& notes() {
    static thread_local Notes all;
    return all;
}

void set_seed(unsigned seed) { shuffle_order.seed(seed); }

void wait(const unsigned* counter, unsigned value) {
    self().waits_for = counter;
    self().value = value;
    to_scheduler(false);
}

void wait_until(std::function<bool()> condition) {
    if (condition()) return;
    self().until = std::move(condition);
    to_scheduler(false);
}

void fail(const std::string& what) {
    now->block.error = what + " (block " + std::to_string(now->block.index.x) + ", " +
                       std::to_string(now->block.index.y) + ", thread " +
                       std::to_string(self().number) + ")";
    to_scheduler(true);
    __builtin_unreachable();
}

void barrier(int id, int count) {
    Barrier& b = block().barriers[id];
    if (++b.arrived < count) return wait(&b.generation, b.generation);
    b.arrived = 0;
    b.generation++;
}

void check_shared(const void* p, size_t bytes, size_t alignment, const char* what) {
    const char* at = static_cast<const char*>(p);
    if (at < block().shared || at + bytes > block().shared + block().shared_bytes)
        fail(std::string(what) + " outside of shared memory");
    if (size_t(at - block().shared) % alignment)
        fail(std::string(what) + " is not aligned to " + std::to_string(alignment) + " bytes");
}

void run(Index grid, int threads, size_t shared, const std::function<void()>& kernel) {
    if (threads % 32) throw std::runtime_error("the emulator runs whole warps");
    Run run;
    now = &run;
    run.kernel = &kernel;
    run.block.grid = grid;
    run.block.threads = threads;
    run.block.shared_bytes = shared;
    run.fibers = std::vector<Fiber>(threads);
    for (Fiber& fiber : run.fibers) fiber.stack.reset(new char[STACK]);
    for (unsigned z = 0; z < grid.z; z++)
        for (unsigned y = 0; y < grid.y; y++)
            for (unsigned x = 0; x < grid.x; x++) {
                run.block.index = {x, y, z};
                run.block.warps.assign(threads / 32, Warp{});
                for (Barrier& b : run.block.barriers) b = {};
                // Of exactly this size, so that AddressSanitizer guards its end.
                void* allocated = nullptr;
                if (posix_memalign(&allocated, 1024, std::max<size_t>(shared, 1)))
                    throw std::bad_alloc();
                std::unique_ptr<char, void (*)(void*)> memory(static_cast<char*>(allocated), free);
                run.block.shared = memory.get();
                std::memset(memory.get(), 0xFF, shared);
                for (int i = 0; i < threads; i++) {
                    Fiber& fiber = run.fibers[i];
                    fiber.number = i;
                    fiber.done = false;
                    fiber.waits_for = nullptr;
                    fiber.until = nullptr;
                    fiber.committed.clear();
                    fiber.open.clear();
                    getcontext(&fiber.context);
                    fiber.context.uc_stack.ss_sp = fiber.stack.get();
                    fiber.context.uc_stack.ss_size = STACK;
                    fiber.context.uc_link = nullptr;
                    makecontext(&fiber.context, fiber_main, 0);
                }
                run_block(run);
            }
    now = nullptr;
}

}  // namespace emulator
