// Threads and scratch memory for the CPU's ops. Compiled once, for the oldest processor: code built
// for a newer one calls it through plain functions, so that no inline function of the standard
// library is ever shared between instruction sets.
#pragma once

#include <cstddef>
#include <cstdint>

namespace nibble::cpu {

// One piece of work. `scratch` belongs to the thread that runs it, is aligned to 64 bytes and holds
// anything. A task must not throw, and no two tasks write the same memory.
using Task = void (*)(const void* context, int64_t index, void* scratch);

// Runs task(context, 0 .. count-1) on up to `threads` threads and returns when all are done. Which
// thread takes which index is left to chance, so a result that depended on it would be a mistake of
// the task. Throws std::bad_alloc if no thread got its scratch.
void parallel(int64_t count, int threads, size_t scratch_bytes, Task task, const void* context);

// Memory that lives as long as one call, aligned to 64 bytes. Throws std::bad_alloc.
void* allocate(size_t bytes);
void release(void* memory) noexcept;

}  // namespace nibble::cpu
