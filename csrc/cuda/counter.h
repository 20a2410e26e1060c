// The counter of `last_block`, which no two launches that may run at once share, zero before and
// after each.
//
// Launches of a stream run one after another, so a stream has one counter. A captured launch runs
// on whatever stream the graph does, so it has one of its own, which the graph keeps; one graph
// never runs twice at once. The counters lie in the module, zero as it loads: a call clears
// nothing. A launch that dies half-way takes its context with it, and the counters.
#pragma once

#include <map>
#include <mutex>
#include <utility>

#include "cuda/launch.h"

namespace warpo::cuda {
namespace {

constexpr unsigned kCounters = 1 << 18;
__device__ unsigned counters[kCounters];

// Of the current device, in any capture mode: to look it up may load the module.
unsigned* find_counters(const char* operation) {
    cudaStreamCaptureMode mode = cudaStreamCaptureModeRelaxed;
    void* address = nullptr;
    check(cudaThreadExchangeStreamCaptureMode(&mode), operation);
    const cudaError_t found = cudaGetSymbolAddress(&address, counters);
    check(cudaThreadExchangeStreamCaptureMode(&mode), operation);
    check(found, operation);
    return static_cast<unsigned*>(address);
}

// For one launch into the stream, whose device is current.
unsigned* counter_of(const Stream& stream, const char* operation) {
    struct Device {
        unsigned* first = nullptr;
        unsigned taken = 0;
        std::map<unsigned long long, unsigned*> of_stream;
    };
    static std::mutex mutex;
    static std::map<int, Device> devices;

    const auto handle = static_cast<cudaStream_t>(stream.stream);
    cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
    unsigned long long id = 0;
    check(cudaStreamIsCapturing(handle, &status), operation);
    const bool captured = status != cudaStreamCaptureStatusNone;
    if (!captured) check(cudaStreamGetId(handle, &id), operation);

    const std::lock_guard<std::mutex> lock(mutex);
    Device& device = devices[stream.device];
    if (!captured) {
        const auto known = device.of_stream.find(id);
        if (known != device.of_stream.end()) return known->second;
    }
    if (!device.first) device.first = find_counters(operation);
    if (device.taken == kCounters) {
        throw std::runtime_error(std::string(operation) + ": " + std::to_string(kCounters) +
                                 " captures in CUDA graphs in one process are the most: capture "
                                 "fewer, or use backend='triton'");
    }
    unsigned* const counter = device.first + device.taken++;
    if (!captured) device.of_stream[id] = counter;
    return counter;
}

}  // namespace
}  // namespace warpo::cuda
