// Threads of one solve. They come from the OpenMP runtime that PyTorch itself runs on, through its own entry point, so
// that there is one pool of threads in the process; without it, one thread does all.
#pragma once
#include <atomic>
#include <sched.h>

namespace neuralode {

typedef void (*Parallel)(void (*run)(void*), void* data, unsigned threads, unsigned flags);  // GOMP_parallel
typedef int (*Number)();                                                                     // omp_get_...

struct Runtime {
    Parallel parallel;
    Number count, index;
};

class Team {
  public:
    int count = 1;

    // Until every thread of the team has come here.
    void meet() {
        if (count == 1) return;
        const int round = round_.load(std::memory_order_relaxed);
        if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == count) {
            arrived_.store(0, std::memory_order_relaxed);
            round_.store(round + 1, std::memory_order_release);
            return;
        }
        for (int spins = 0; round_.load(std::memory_order_acquire) == round; spins++)
            if (spins > 4000) sched_yield();  // another program may hold the core that is waited for
    }

    // Calls work(index) on up to `threads` threads at once; `count` is how many there are.
    template <typename Work> void run(const Runtime& runtime, int threads, Work work) {
        if (threads <= 1 || !runtime.parallel) {
            count = 1;
            work(0);
            return;
        }
        struct Call {
            Team* team;
            const Runtime* runtime;
            Work* work;
        } call{this, &runtime, &work};
        runtime.parallel(
            [](void* data) {
                Call& call = *(Call*)data;
                call.team->count = call.runtime->count();  // the same for all: a runtime may give fewer than asked for
                (*call.work)(call.runtime->index());
            },
            &call, threads, 0);
    }

  private:
    std::atomic<int> arrived_{0}, round_{0};
};

}  // namespace neuralode
