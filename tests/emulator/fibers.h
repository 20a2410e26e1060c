// The threads of a cluster of blocks as fibers of one host thread, and the barriers at which they
// wait. Most clusters are one block.
//
// A fiber runs until it waits or ends, a warp until all its fibers stand at a barrier of the block
// or the cluster or have ended, and a block until all its warps stand at a barrier of the cluster or
// have ended; only then does the next one run. So at each barrier one warp is as far ahead of the
// others as it can be, and one block: what is read before it is written, or overwritten before it is
// read, gives another result, in one order of the threads or in the other. A barrier that not all
// threads reach throws std::runtime_error: stricter than a GPU, which does not wait for those that
// have ended.
//
// Not shown: time; races between clusters, which run one after another; what a GPU may reorder
// between two threads without a barrier, as here all see each write at once; reads of shared memory
// that no thread of the block has written, which holds what the last block left.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <functional>
#include <memory>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

namespace emulator {

constexpr int kWarp = 32, kMaxThreads = 1024, kMaxCluster = 8;
constexpr size_t kStackBytes = 1 << 16;

enum State { kReady, kAtWarpBarrier, kAtBlockBarrier, kAtClusterBarrier, kDone };

// To shared memory, beside the thread: done when it is waited for, and no sooner.
struct Copy {
    void* to;
    const void* from;
    unsigned group;
};

struct Fiber {
    std::unique_ptr<char[]> stack;
    ucontext_t start;
    jmp_buf resume;
    bool started;
    State state;
    unsigned exchanges;  // shuffles and votes so far
    bool fenced;         // since the last barrier of the block
    unsigned arrivals;   // at barriers of the cluster so far
    unsigned groups;     // of copies so far
    std::vector<Copy> copies;
};

inline Fiber fibers[kMaxCluster * kMaxThreads];
inline jmp_buf scheduler;
inline int current;                         // thread of the cluster that runs
inline unsigned thread_index, block_index;  // of it
inline int block_threads;                   // threads of each block
inline unsigned first_block;                // of the cluster
inline char* shared_memory[kMaxCluster];    // the dynamic one of each block
inline std::function<void()> body;          // of a thread
inline std::string fault;                   // of a thread; empty: none

// Back to the scheduler, until it resumes this fiber. swapcontext would cost two system calls.
inline void wait_as(State state) {
    fibers[current].state = state;
    if (_setjmp(fibers[current].resume) == 0) _longjmp(scheduler, 1);
}

// Ends the launch with an error, which the scheduler throws: a fiber has no caller.
inline void fail(const std::string& message) {
    fault = message;
    wait_as(kDone);
}

inline void run_body() {
    body();
    wait_as(kDone);
}

__attribute__((noinline)) inline void resume(int thread) {
    Fiber& fiber = fibers[thread];
    current = thread;
    thread_index = static_cast<unsigned>(thread % block_threads);
    block_index = first_block + static_cast<unsigned>(thread / block_threads);
    if (_setjmp(scheduler) != 0) return;
    if (fiber.started) _longjmp(fiber.resume, 1);
    fiber.started = true;
    setcontext(&fiber.start);
}

inline void start(int thread) {
    Fiber& fiber = fibers[thread];
    if (!fiber.stack) fiber.stack.reset(new char[kStackBytes]);
    getcontext(&fiber.start);
    fiber.start.uc_stack.ss_sp = fiber.stack.get();
    fiber.start.uc_stack.ss_size = kStackBytes;
    fiber.start.uc_link = nullptr;
    makecontext(&fiber.start, run_body, 0);
    fiber.started = false;
    fiber.state = kReady;
    fiber.exchanges = fiber.arrivals = fiber.groups = 0;
    fiber.fenced = false;
    fiber.copies.clear();
}

inline int count(int first, int threads, State state) {
    return static_cast<int>(
        std::count_if(fibers + first, fibers + first + threads,
                      [state](const Fiber& fiber) { return fiber.state == state; }));
}

inline void release(int first, int threads, State from) {
    for (int thread = first; thread < first + threads; ++thread) {
        if (fibers[thread].state == from) fibers[thread].state = kReady;
    }
}

// The order in which blocks, warps, and the threads of a warp get their turn: WARPO_EMULATOR_ORDER,
// one of forward (default), reverse and random, which is drawn anew at each barrier from a fixed
// seed.
class Order {
public:
    Order() {
        const char* wanted = std::getenv("WARPO_EMULATOR_ORDER");
        const std::string name = wanted ? wanted : "forward";
        if (name != "forward" && name != "reverse" && name != "random") {
            throw std::runtime_error(
                "WARPO_EMULATOR_ORDER must be one of forward, reverse, random; got '" + name + "'");
        }
        reverse_ = name == "reverse";
        random_ = name == "random";
    }
    std::vector<int> of(int number) {
        std::vector<int> order(number);
        for (int i = 0; i < number; ++i) order[i] = reverse_ ? number - 1 - i : i;
        if (random_) std::shuffle(order.begin(), order.end(), generator_);
        return order;
    }

private:
    bool reverse_, random_;
    std::mt19937 generator_{1};
};

inline Order& wanted_order() {
    static Order order;
    return order;
}

// Until no thread of the warp can go on.
inline void run_warp(int warp, Order& order) {
    const int first = warp * kWarp;
    do {
        for (int lane : order.of(kWarp)) {
            if (fibers[first + lane].state == kReady) resume(first + lane);
            if (!fault.empty()) return;
        }
        if (count(first, kWarp, kAtWarpBarrier) == kWarp) release(first, kWarp, kAtWarpBarrier);
    } while (count(first, kWarp, kReady) > 0);
}

// Until all threads of the block, which begin at `first`, wait for the cluster or have ended.
inline void run_block(const char* operation, int first, int threads, Order& order) {
    const auto ready = [=] { return count(first, threads, kReady); };
    while (ready() > 0) {
        for (int warp : order.of(threads / kWarp)) {
            run_warp(first / kWarp + warp, order);
            if (!fault.empty()) throw std::runtime_error(std::string(operation) + ": " + fault);
        }
        const int in_warp = count(first, threads, kAtWarpBarrier),
                  in_block = count(first, threads, kAtBlockBarrier);
        if (in_warp > 0 || (in_block > 0 && in_block < threads)) {
            throw std::runtime_error(std::string(operation) + ": of " + std::to_string(threads) +
                                     " threads " + std::to_string(in_warp) +
                                     " wait in a shuffle or vote and " + std::to_string(in_block) +
                                     " in __syncthreads for others, which do not come");
        }
        release(first, threads, kAtBlockBarrier);
    }
}

inline void run_cluster(const char* operation, int64_t first, int blocks, int threads) {
    Order& order = wanted_order();
    const int total = blocks * threads;
    fault.clear();
    block_threads = threads;
    first_block = static_cast<unsigned>(first);
    for (int thread = 0; thread < total; ++thread) start(thread);
    for (int waiting = total; waiting > 0;) {
        for (int block : order.of(blocks)) run_block(operation, block * threads, threads, order);
        waiting = count(0, total, kAtClusterBarrier);
        const auto less = [](const Fiber& a, const Fiber& b) { return a.arrivals < b.arrivals; };
        const auto range = std::minmax_element(fibers, fibers + total, less);
        if (waiting > 0 && (waiting < total || range.first->arrivals < range.second->arrivals)) {
            throw std::runtime_error(std::string(operation) + ": of " + std::to_string(total) +
                                     " threads " + std::to_string(waiting) +
                                     " wait for the cluster, and others do not come");
        }
        release(0, total, kAtClusterBarrier);
    }
}

}  // namespace emulator
