// In place of csrc/cuda/cluster.h: a chip that the environment describes, and the blocks of a
// cluster at once. Their dynamic shared memory is NaN until it is written, and a launch fails that
// writes past it. Not shown: cudaFuncSetAttribute, and how many blocks a multiprocessor holds.
#pragma once

#include <algorithm>
#include <cstdlib>
#include <memory>

#include "cuda/launch.h"

namespace warpo::cuda {

struct Chip {
    int shared_bytes;
    bool has_clusters;
};

inline int chip_value(const char* variable, int otherwise) {
    const char* value = std::getenv(variable);
    return value ? std::atoi(value) : otherwise;
}

// That of compute capability 9.0, unless WARPO_EMULATOR_SHARED (bytes) and WARPO_EMULATOR_CLUSTERS
// (0 or 1) say otherwise.
template <typename... Parameters>
Chip chip_for(const char*, void (*)(Parameters...)) {
    return {chip_value("WARPO_EMULATOR_SHARED", 227 * 1024),
            chip_value("WARPO_EMULATOR_CLUSTERS", 1) != 0};
}

struct Grid {
    int64_t clusters;
    int blocks, threads, shared_bytes;
};

template <typename... Parameters>
void launch_clusters(const char* operation, Stream, const Grid& grid,
                     void (*kernel)(Parameters...), Parameters... arguments) {
    constexpr int kGuard = 64;
    constexpr char kPattern = '\xff';
    const int size = grid.shared_bytes + kGuard;
    check_launch(operation, grid.clusters * grid.blocks, grid.threads);
    if (grid.blocks < 1 || grid.blocks > emulator::kMaxCluster ||
        grid.shared_bytes > chip_for(operation, kernel).shared_bytes) {
        throw std::runtime_error(std::string(operation) + ": a cluster of " +
                                 std::to_string(grid.blocks) + " blocks with " +
                                 std::to_string(grid.shared_bytes) + " bytes of shared memory");
    }
    const std::unique_ptr<char[]> memory(new char[grid.blocks * size]);
    emulator::body = [&] { kernel(arguments...); };
    for (int64_t cluster = 0; cluster < grid.clusters; ++cluster) {
        std::fill_n(memory.get(), grid.blocks * size, kPattern);
        for (int block = 0; block < grid.blocks; ++block)
            emulator::shared_memory[block] = memory.get() + block * size;
        emulator::run_cluster(operation, cluster * grid.blocks, grid.blocks, grid.threads);
        for (int block = 0; block < grid.blocks; ++block) {
            const char* end = emulator::shared_memory[block] + grid.shared_bytes;
            if (std::count(end, end + kGuard, kPattern) != kGuard)
                throw std::runtime_error(std::string(operation) + ": writes past shared memory");
        }
    }
}

}  // namespace warpo::cuda
