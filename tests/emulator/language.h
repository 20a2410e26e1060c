// What nvcc knows without an include, for a host compiler: included before each .cu file.
// Threads, warps and barriers are those of fibers.h. A shuffle or vote waits for all 32 lanes,
// whatever its mask, which in our kernels is always full.
//
// Not shown: code for the device, so neither registers nor spills, and the accuracy of the device's
// expf, logf and ex2; __launch_bounds__.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "fibers.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __shared__ static
#define __launch_bounds__(...)

using std::isfinite;
using std::max;
using std::min;

struct alignas(8) float2 {
    float x, y;
};
struct alignas(16) float4 {
    float x, y, z, w;
};
struct alignas(8) uint2 {
    uint32_t x, y;
};
struct alignas(16) uint4 {
    uint32_t x, y, z, w;
};
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline uint2 make_uint2(uint32_t x, uint32_t y) { return {x, y}; }
inline uint4 make_uint4(uint32_t x, uint32_t y, uint32_t z, uint32_t w) { return {x, y, z, w}; }

namespace emulator {

struct ThreadIndex {
    operator unsigned() const { return thread_index; }
};

struct BlockIndex {
    operator unsigned() const { return block_index; }
};

// What the lanes of a warp exchange. Two buffers in turn: a lane may put its next value before
// another has taken the last one.
inline uint64_t exchanged[kMaxCluster * kMaxThreads / kWarp][2][kWarp];

// The values of all lanes of the warp.
inline const uint64_t* exchange(uint64_t value) {
    uint64_t* values = exchanged[current / kWarp][fibers[current].exchanges++ % 2];
    values[current % kWarp] = value;
    wait_as(kAtWarpBarrier);
    return values;
}

template <typename T>
T shuffle(T value, int lane) {
    uint64_t bits = 0;
    std::memcpy(&bits, &value, sizeof value);
    bits = exchange(bits)[lane];
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

inline int own_lane() { return current % kWarp; }

}  // namespace emulator

// Of named classes: variables of an unnamed one would be one for each source file.
inline struct ThreadIndices {
    emulator::ThreadIndex x;
} threadIdx;

inline struct BlockIndices {
    emulator::BlockIndex x;
} blockIdx;

inline void __syncthreads() {
    emulator::fibers[emulator::current].fenced = false;
    emulator::wait_as(emulator::kAtBlockBarrier);
}
inline void __syncwarp() { emulator::wait_as(emulator::kAtWarpBarrier); }

template <typename T>
T __shfl_sync(unsigned, T value, int lane) {
    return emulator::shuffle(value, lane % emulator::kWarp);
}

template <typename T>
T __shfl_down_sync(unsigned, T value, int lanes) {
    const int lane = emulator::own_lane() + lanes;
    return emulator::shuffle(value, lane < emulator::kWarp ? lane : emulator::own_lane());
}

template <typename T>
T __shfl_up_sync(unsigned, T value, int lanes) {
    const int lane = emulator::own_lane() - lanes;
    return emulator::shuffle(value, lane >= 0 ? lane : emulator::own_lane());
}

template <typename T>
T __shfl_xor_sync(unsigned, T value, int lanes) {
    return emulator::shuffle(value, emulator::own_lane() ^ lanes);
}

inline unsigned __ballot_sync(unsigned, bool vote) {
    const uint64_t* votes = emulator::exchange(vote);
    unsigned ballot = 0;
    for (int lane = 0; lane < emulator::kWarp; ++lane) {
        ballot |= static_cast<unsigned>(votes[lane]) << lane;
    }
    return ballot;
}

inline bool __any_sync(unsigned mask, bool vote) { return __ballot_sync(mask, vote) != 0; }

inline int __ffs(int bits) { return __builtin_ffs(bits); }
inline int __clz(int bits) { return bits == 0 ? 32 : __builtin_clz(bits); }

inline void __threadfence() { emulator::fibers[emulator::current].fenced = true; }

// Only counts what other blocks read: without a fence since the last barrier they may not see it.
inline unsigned atomicInc(unsigned* address, unsigned most) {
    if (!emulator::fibers[emulator::current].fenced) {
        emulator::fail("atomicInc without __threadfence between it and the barrier before");
    }
    const unsigned old = *address;
    *address = old >= most ? 0 : old + 1;
    return old;
}

template <typename T>
T atomicAdd(T* address, T value) {
    const T old = *address;
    *address += value;
    return old;
}
