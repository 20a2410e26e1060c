// Host side of a launch: the right device, the grid limit, and errors that say what to do.
#pragma once

#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

#include "cuda/cuda.h"

namespace warpo::cuda {

// What nvcc compiles for, as "8.0, 9.0, 10.0".
inline std::string capabilities() {
    std::string list;
    for (const int arch : {__CUDA_ARCH_LIST__}) {
        list += (list.empty() ? "" : ", ") + std::to_string(arch / 100) + ".";
        list += std::to_string(arch / 10 % 10);
    }
    return list;
}

inline void check(cudaError_t status, const char* operation) {
    if (status == cudaSuccess) return;
    std::string message = std::string(operation) + ": " + cudaGetErrorString(status);
    if (status == cudaErrorInsufficientDriver || status == cudaErrorNoDevice) {
        message += status == cudaErrorNoDevice
                       ? ". No CUDA device is visible on this machine"
                       : ". No CUDA driver for this build is on this machine";
        message +=
            ": move the tensors to the CPU, or install an NVIDIA driver and make a GPU visible";
    } else if (status == cudaErrorNoKernelImageForDevice) {
        message += ". The kernels are built for compute capability " + capabilities() +
                   ": rebuild them for this GPU: WARPO_CUDA_ARCHS=... pip install -e .";
    }
    throw std::runtime_error(message);
}

// Makes the device of the stream current, and the previous one again at the end of the scope.
class DeviceGuard {
public:
    DeviceGuard(int device, const char* operation) {
        check(cudaGetDevice(&previous_), operation);
        changed_ = device != previous_;
        if (changed_) check(cudaSetDevice(device), operation);
    }
    ~DeviceGuard() {
        if (changed_) cudaSetDevice(previous_);
    }
    DeviceGuard(const DeviceGuard&) = delete;
    DeviceGuard& operator=(const DeviceGuard&) = delete;

private:
    int previous_ = 0;
    bool changed_ = false;
};

inline void check_blocks(const char* operation, int64_t blocks) {
    if (blocks > INT32_MAX) {
        throw std::runtime_error(std::string(operation) + ": needs " + std::to_string(blocks) +
                                 " blocks, a launch has at most 2147483647: split the batch");
    }
}

template <typename... Parameters>
void launch(const char* operation, Stream stream, int64_t blocks, int threads,
            void (*kernel)(Parameters...), Parameters... arguments) {
    check_blocks(operation, blocks);
    kernel<<<static_cast<unsigned>(blocks), threads, 0, static_cast<cudaStream_t>(stream.stream)>>>(
        arguments...);
    check(cudaGetLastError(), operation);
}

}  // namespace warpo::cuda
