// The threads of a block as fibers of one host thread, and the barriers at which they wait.
//
// A fiber runs until it waits or ends, and a warp until all its fibers stand at a barrier of the
// block or have ended; only then does the next warp run. So at each barrier one warp is as far
// ahead of the others as it can be: what is read before it is written, or overwritten before it is
// read, gives another result, in one order of the threads or in the other. A barrier that not all
// threads reach throws std::runtime_error: stricter than a GPU, which does not wait for those that
// have ended.
//
// Not shown: time; races between blocks, which run one after another; what a GPU may reorder
// between two threads without a barrier, as here all see each write at once; reads of shared memory
// that no thread of the block has written, which holds what the last block left.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cstdlib>
#include <functional>
#include <memory>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

namespace emulator {

constexpr int kWarp = 32, kMaxThreads = 1024;
constexpr size_t kStackBytes = 1 << 16;

enum State { kReady, kAtWarpBarrier, kAtBlockBarrier, kDone };

struct Fiber {
    std::unique_ptr<char[]> stack{new char[kStackBytes]};
    ucontext_t start;
    jmp_buf resume;
    bool started;
    State state;
    unsigned exchanges;  // shuffles and votes so far
    bool fenced;         // since the last barrier of the block
};

inline Fiber fibers[kMaxThreads];
inline jmp_buf scheduler;
inline int current;                 // thread of the block that runs
inline std::function<void()> body;  // of a thread
inline std::string fault;           // of a thread; empty: none

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
    if (_setjmp(scheduler) != 0) return;
    if (fiber.started) _longjmp(fiber.resume, 1);
    fiber.started = true;
    setcontext(&fiber.start);
}

inline void start(int thread) {
    Fiber& fiber = fibers[thread];
    getcontext(&fiber.start);
    fiber.start.uc_stack.ss_sp = fiber.stack.get();
    fiber.start.uc_stack.ss_size = kStackBytes;
    fiber.start.uc_link = nullptr;
    makecontext(&fiber.start, run_body, 0);
    fiber.started = false;
    fiber.state = kReady;
    fiber.exchanges = 0;
    fiber.fenced = false;
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

inline void run_block(const char* operation, int threads) {
    Order& order = wanted_order();
    fault.clear();
    for (int thread = 0; thread < threads; ++thread) start(thread);
    for (int done = 0; done < threads; done = count(0, threads, kDone)) {
        for (int warp : order.of(threads / kWarp)) {
            run_warp(warp, order);
            if (!fault.empty()) throw std::runtime_error(std::string(operation) + ": " + fault);
        }
        const int in_warp = count(0, threads, kAtWarpBarrier),
                  in_block = count(0, threads, kAtBlockBarrier);
        if (in_warp > 0 || (in_block > 0 && in_block < threads)) {
            throw std::runtime_error(std::string(operation) + ": of " + std::to_string(threads) +
                                     " threads " + std::to_string(in_warp) +
                                     " wait in a shuffle or vote and " + std::to_string(in_block) +
                                     " in __syncthreads for others, which do not come");
        }
        release(0, threads, kAtBlockBarrier);
    }
}

}  // namespace emulator
