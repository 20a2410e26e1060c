// In place of csrc/cuda/launch.h: runs a kernel on the host, block after block, and refuses what a
// launch would refuse. Not shown: streams, devices and the errors of the CUDA runtime.
#pragma once

#include <stdexcept>
#include <string>

#include "cuda/cuda.h"
#include "fibers.h"
#include "language.h"

namespace warpo::cuda {

struct DeviceGuard {
    DeviceGuard(int, const char*) {}
};

inline void check_launch(const char* operation, int64_t blocks, int threads) {
    if (blocks < 1 || blocks > INT32_MAX || threads < 1 || threads > emulator::kMaxThreads ||
        threads % emulator::kWarp != 0) {
        throw std::runtime_error(std::string(operation) + ": a launch of " +
                                 std::to_string(blocks) + " blocks of " + std::to_string(threads) +
                                 " threads");
    }
}

template <typename... Parameters>
void launch(const char* operation, Stream, int64_t blocks, int threads,
            void (*kernel)(Parameters...), Parameters... arguments) {
    check_launch(operation, blocks, threads);
    emulator::body = [&] { kernel(arguments...); };
    for (int block : emulator::wanted_order().of(static_cast<int>(blocks)))
        emulator::run_cluster(operation, block, 1, threads);
}

}  // namespace warpo::cuda
