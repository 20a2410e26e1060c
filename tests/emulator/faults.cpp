// Three kernels, and the faults that the emulator must see in them: `faults NAME` says on stderr what
// it saw and fails; `faults none` passes.
#include <cstdio>
#include <exception>
#include <string>

#include "cuda/cluster.h"
#include "cuda/counter.h"
#include "cuda/device.h"
#include "cuda/ptx.h"

namespace warpo::cuda {
namespace {

constexpr int kThreads = 64, kBlocks = 4, kSharedBytes = 4 * kThreads + 16;

enum Fault {
    kNone,
    kReadBeforeWritten,
    kOverwrittenBeforeRead,
    kHalfAWarpShuffles,
    kAThreadReturns,
    kMisalignedVector,
    kPastSharedMemory,
    kNoBlocks,
    kCountBeforeFence,
    kCounterLeft,
    kNeighbourReadBeforeWritten,
    kNeighbourReadAfterItsEnd,
    kABlockStaysAway,
    kCopyReadBeforeWaitedFor,
    kPastDynamicSharedMemory,
    kNumFaults
};

const char* const kNames[kNumFaults] = {
    "none",
    "read_before_written",
    "overwritten_before_read",
    "half_a_warp_shuffles",
    "a_thread_returns",
    "misaligned_vector",
    "past_shared_memory",
    "no_blocks",
    "count_before_fence",
    "counter_left",
    "neighbour_read_before_written",
    "neighbour_read_after_its_end",
    "a_block_stays_away",
    "copy_read_before_waited_for",
    "past_dynamic_shared_memory",
};

// Reverses the values in each warp, and in the block, twice: to where they were.
__global__ void reverse_twice(int* values, Fault fault) {
    __shared__ int shared[kThreads];
    const int own = static_cast<int>(threadIdx.x), other = kThreads - 1 - own;
    if (fault == kMisalignedVector) load_read_only(values + 1);
    for (int round = 0; round < 2; ++round) {
        if (fault == kHalfAWarpShuffles && own < 16) return;
        values[own] = __shfl_xor_sync(0xffffffffu, values[own], 31);
        if (fault == kAThreadReturns && own == 5) return;
        shared[fault == kPastSharedMemory ? own + 1 : own] = values[own];
        if (fault != kReadBeforeWritten) __syncthreads();
        values[own] = shared[other];
        if (fault != kOverwrittenBeforeRead) __syncthreads();
    }
}

// A sum whose bits depend on the order: 1e8, 1, ..., 1.
__global__ void sum_blocks(float* partials, float* sum, unsigned* counter, unsigned blocks,
                           Fault fault) {
    if (threadIdx.x == 0) partials[blockIdx.x] = blockIdx.x == 0 ? 1e8f : 1.0f;
    if (fault == kCountBeforeFence && threadIdx.x == 0) atomicInc(counter, blocks - 1);
    if (!last_block(counter, fault == kCounterLeft ? blocks + 1 : blocks)) return;
    if (threadIdx.x != 0) return;
    *sum = 0.0f;
    for (unsigned block = 0; block < blocks; ++block) *sum += partials[block];
}

void run_sums(Fault fault) {
    constexpr unsigned kBlocks = 40;
    for (int round = 0; round < 2; ++round) {
        float partials[kBlocks], sum = 0.0f;
        unsigned* const counter = counter_of(Stream{}, "sum_blocks");
        launch("sum_blocks", Stream{}, kBlocks, kThreads, sum_blocks, static_cast<float*>(partials),
               &sum, counter, kBlocks, fault);
        if (sum != 1e8f && fault != kCounterLeft) throw std::runtime_error("wrong result");
    }
}

// To the values of each block of a cluster adds those of the next one.
__global__ void add_next(int* values, Fault fault) {
    const int thread = static_cast<int>(threadIdx.x), block = static_cast<int>(blockIdx.x);
    uint4* vectors = static_cast<uint4*>(dynamic_shared());
    float* shared = static_cast<float*>(dynamic_shared());
    int* own = values + block * kThreads;
    if (thread < kThreads / 4) copy_async(vectors + thread, own + 4 * thread);
    commit_copies();
    if (fault != kCopyReadBeforeWaitedFor) wait_copies<0>();
    __syncthreads();
    int value;
    memcpy(&value, shared + thread, sizeof value);
    const bool past = fault == kPastDynamicSharedMemory && thread == 0;
    shared[past ? kSharedBytes / 4 : thread] = static_cast<float>(value + past);
    if (fault == kABlockStaysAway && block == 1) return;
    cluster_arrive();
    if (fault != kNeighbourReadBeforeWritten) cluster_wait();
    own[thread] = value + static_cast<int>(load_from_block(shared + thread, (block + 1) % kBlocks));
    if (fault == kNeighbourReadAfterItsEnd) return;
    cluster_arrive_relaxed();
    cluster_wait();
}

void run_cluster(Fault fault) {
    alignas(16) int values[kBlocks * kThreads];
    for (int i = 0; i < kBlocks * kThreads; ++i) values[i] = i;
    const Grid grid = {1, kBlocks, kThreads, kSharedBytes};
    launch_clusters("add_next", Stream{}, grid, add_next, static_cast<int*>(values), fault);
    for (int i = 0; i < kBlocks * kThreads; ++i) {
        if (values[i] != i + (i + kThreads) % (kBlocks * kThreads))
            throw std::runtime_error("wrong result");
    }
}

void run(Fault fault) {
    if (fault == kNone || fault >= kNeighbourReadBeforeWritten) run_cluster(fault);
    if (fault >= kNeighbourReadBeforeWritten) return;
    alignas(16) int values[kThreads];
    for (int i = 0; i < kThreads; ++i) values[i] = i + 1;
    launch("reverse_twice", Stream{}, fault == kNoBlocks ? 0 : 1, kThreads, reverse_twice,
           static_cast<int*>(values), fault);
    for (int i = 0; i < kThreads; ++i) {
        if (values[i] != i + 1) throw std::runtime_error("wrong result");
    }
    run_sums(fault);
}

}  // namespace
}  // namespace warpo::cuda

int main(int argc, char** argv) {
    using namespace warpo::cuda;
    for (int fault = 0; fault < kNumFaults; ++fault) {
        if (argc != 2 || std::string(argv[1]) != kNames[fault]) continue;
        try {
            run(static_cast<Fault>(fault));
            return 0;
        } catch (const std::exception& error) {
            std::fprintf(stderr, "%s\n", error.what());
            return 1;
        }
    }
    std::fprintf(stderr, "usage: faults NAME, with NAME one of those in faults.cpp\n");
    return 2;
}
