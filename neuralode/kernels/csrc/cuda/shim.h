// Plays a GPU on the CPU, for tests: every thread of every block is a fiber, which runs until it has to wait for others.
//
// Nothing else is different: the very kernels run. Fibers take turns in a fixed order, forwards or backwards, so that
// two runs show whether a result depends on which thread comes first.
#pragma once
#include <cmath>
#include <cstring>
#include <memory>
#include <ucontext.h>
#include <vector>

#define DEVICE inline
#define APART inline
#define KERNEL static
#define TABLE static const
#define ANYWHERE inline
#define ANYWHERE_MEMBER
#define SHARED_MEMORY(name) char* name = neuralode::shim::current->block->shared.data();

namespace neuralode {
namespace shim {

struct Block {
    int index;
    std::vector<char> shared;
    long arrivals = 0;  // at meetings of the block
    long votes[2] = {};
};

struct Fiber {
    ucontext_t context;
    std::vector<char> stack;
    Block* block;
    int index;
    long meetings = 0;
    bool done = false;
};

inline Fiber* current;
inline ucontext_t scheduler;
inline int block_count, thread_count;
inline void (*body)(const void*);
inline const void* argument;

inline void wait() { swapcontext(&current->context, &scheduler); }

inline void run_fiber() {
    body(argument);
    current->done = true;
    wait();
}

// Runs a kernel. The memory that blocks share is filled with NaN at first, as it may be on a GPU.
inline void launch(int count, int size, int shared, void (*kernel)(const void*), const void* given, bool backwards) {
    block_count = count, thread_count = size, body = kernel, argument = given;
    std::vector<std::unique_ptr<Block>> all;
    std::vector<std::unique_ptr<Fiber>> fibers;
    for (int b = 0; b < count; b++) {
        all.emplace_back(new Block{b, std::vector<char>(shared, (char)0xff)});
        for (int t = 0; t < size; t++) {
            fibers.emplace_back(new Fiber);
            Fiber& fiber = *fibers.back();
            fiber.block = all.back().get(), fiber.index = t, fiber.stack.resize(1 << 17);
            getcontext(&fiber.context);
            fiber.context.uc_stack.ss_sp = fiber.stack.data(), fiber.context.uc_stack.ss_size = fiber.stack.size();
            fiber.context.uc_link = nullptr;
            makecontext(&fiber.context, run_fiber, 0);
        }
    }
    for (size_t left = fibers.size(); left;)
        for (size_t i = 0; i < fibers.size(); i++) {
            Fiber& fiber = *fibers[backwards ? fibers.size() - 1 - i : i];
            if (fiber.done) continue;
            current = &fiber;
            swapcontext(&scheduler, &fiber.context);
            left -= fiber.done;
        }
}

}  // namespace shim

inline int thread() { return shim::current->index; }
inline int threads() { return shim::thread_count; }
inline int block() { return shim::current->block->index; }
inline int blocks() { return shim::block_count; }

inline void meet() {
    shim::Block& block = *shim::current->block;
    const long all = ++shim::current->meetings * shim::thread_count;
    block.arrivals++;
    while (block.arrivals < all) shim::wait();
}

inline bool meet_or(bool mine) {
    shim::Block& block = *shim::current->block;
    const int turn = shim::current->meetings & 1;
    meet();  // everybody has read the vote before
    block.votes[turn] = 0;
    meet();
    block.votes[turn] += mine;
    meet();
    return block.votes[turn];
}

inline void meet_all(unsigned* tickets) {
    const unsigned all = shim::block_count * shim::thread_count, last = *tickets / all * all + all;
    ++*tickets;
    while (*tickets < last) shim::wait();
}

inline bool last_block(unsigned* tickets) {
    return meet_or(thread() == 0 && (*tickets)++ % blocks() == (unsigned)blocks() - 1);
}

inline void raise(int* status, int value) { *status = value > *status ? value : *status; }

}  // namespace neuralode
