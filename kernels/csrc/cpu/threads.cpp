// Threads: torch's own OpenMP team where the process has one, else a small pool.
//
// torch brings its own libgomp. A second team would spin on the same cores between the calls and
// slow both, so the team is borrowed at run time, by name, and OpenMP is never linked: the module
// loads where there is none.

#include "threads.h"

#include <atomic>
#include <condition_variable>
#include <cstdlib>
#include <mutex>
#include <new>
#include <system_error>
#include <thread>
#include <vector>

#if defined(_WIN32)
#include <malloc.h>
#include <process.h>
#else
#include <unistd.h>
#endif
#if defined(__linux__)
#include <dlfcn.h>
#endif

namespace nibble::cpu {
namespace {

void* allocate_or_null(size_t bytes) noexcept {
    bytes = (bytes + 63) / 64 * 64;
#if defined(_WIN32)
    return _aligned_malloc(bytes, 64);
#else
    void* memory = nullptr;
    return posix_memalign(&memory, 64, bytes) == 0 ? memory : nullptr;
#endif
}

int process_id() {
#if defined(_WIN32)
    return _getpid();
#else
    return getpid();
#endif
}

struct Job {
    Task task;
    const void* context;
    int64_t count;
    size_t scratch_bytes;
    alignas(64) std::atomic<int64_t> next{0};
};

void work(Job& job) noexcept {
    void* scratch = nullptr;
    // A thread without scratch leaves its share to the others; parallel() looks afterwards whether
    // anyone did the work.
    if (job.scratch_bytes && !(scratch = allocate_or_null(job.scratch_bytes))) return;
    for (int64_t i; (i = job.next.fetch_add(1, std::memory_order_relaxed)) < job.count;)
        job.task(job.context, i, scratch);
    release(scratch);
}

// ---- torch's team -------------------------------------------------------------------------------

using GompParallel = void (*)(void (*)(void*), void*, unsigned threads, unsigned flags);

GompParallel find_gomp() {
#if defined(__linux__)
    return reinterpret_cast<GompParallel>(dlsym(RTLD_DEFAULT, "GOMP_parallel"));
#else
    return nullptr;
#endif
}

const int loaded_in = process_id();

// libgomp's threads do not survive a fork and it does not notice: in a child it would wait for them
// for ever.
GompParallel gomp() {
    static const GompParallel found = find_gomp();
    return process_id() == loaded_in ? found : nullptr;
}

// ---- a pool of our own --------------------------------------------------------------------------

class Pool {
public:
    explicit Pool(int process) : process(process) {}

    const int process;

    // Runs the job on this thread and up to `helpers` others. False, and nothing done, while
    // another thread's job is running.
    bool run(Job& job, int helpers) {
        std::unique_lock<std::mutex> only_job(gate_, std::try_to_lock);
        if (!only_job) return false;
        {
            std::lock_guard<std::mutex> lock(mutex_);
            grow(helpers);
            job_ = &job;
            wanted_ = helpers;
        }
        wake_.notify_all();
        work(job);
        std::unique_lock<std::mutex> lock(mutex_);
        job_ = nullptr;
        wanted_ = 0;
        done_.wait(lock, [&] { return running_ == 0; });
        return true;
    }

private:
    void grow(int helpers) {
        try {
            for (; threads_ < helpers; ++threads_) std::thread([this] { serve(); }).detach();
        } catch (
            const std::system_error&) {  // no more threads to be had: those that exist do the work
        }
    }

    void serve() {
        std::unique_lock<std::mutex> lock(mutex_);
        for (;;) {
            wake_.wait(lock, [&] { return wanted_ > 0; });
            Job& job = *job_;
            --wanted_;
            ++running_;
            lock.unlock();
            work(job);
            lock.lock();
            if (--running_ == 0) done_.notify_one();
        }
    }

    std::mutex gate_, mutex_;
    std::condition_variable wake_, done_;
    Job* job_ = nullptr;
    int wanted_ = 0, running_ = 0, threads_ = 0;
};

// Never destroyed: its threads sleep until the process ends. A forked child has none of them and
// makes its own.
Pool& pool() {
    static std::atomic<Pool*> current{nullptr};
    Pool* found = current.load();
    if (!found || found->process != process_id()) {
        Pool* made = new Pool(process_id());
        if (current.compare_exchange_strong(found, made)) return *made;
        delete made;
    }
    return *found;
}

}  // namespace

void parallel(int64_t count, int threads, size_t scratch_bytes, Task task, const void* context) {
    if (count <= 0) return;
    Job job{task, context, count, scratch_bytes};
    const int team = static_cast<int>(count < threads ? count : threads);
    if (team > 1) {
        if (const GompParallel start = gomp()) {
            start([](void* shared) { work(*static_cast<Job*>(shared)); }, &job,
                  static_cast<unsigned>(team), 0);
        } else if (!pool().run(job, team - 1)) {
            work(job);  // the pool is busy for another thread of the caller's; waiting for it would
                        // not be faster
        }
    } else {
        work(job);
    }
    if (job.next.load() < count) throw std::bad_alloc();
}

void* allocate(size_t bytes) {
    void* memory = allocate_or_null(bytes ? bytes : 1);
    if (!memory) throw std::bad_alloc();
    return memory;
}

void release(void* memory) noexcept {
#if defined(_WIN32)
    _aligned_free(memory);
#else
    free(memory);
#endif
}

}  // namespace nibble::cpu
