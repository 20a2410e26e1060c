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

template <typename... Parameters>
void launch(const char* operation, Stream, int64_t blocks, int threads,
            void (*kernel)(Parameters...), Parameters... arguments) {
    if (blocks < 1 || blocks > INT32_MAX || threads < 1 || threads > emulator::kMaxThreads ||
        threads % emulator::kWarp != 0) {
        throw std::runtime_error(std::string(operation) + ": a launch of " +
                                 std::to_string(blocks) + " blocks of " + std::to_string(threads) +
                                 " threads");
    }
    emulator::body = [&] { kernel(arguments...); };
    for (int block : emulator::wanted_order().of(static_cast<int>(blocks))) {
        blockIdx.x = static_cast<unsigned>(block);
        emulator::run_block(operation, threads);
    }
}

}  // namespace warpo::cuda
