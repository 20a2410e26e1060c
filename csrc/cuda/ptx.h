// Instructions that C++ has no words for: cache hints, packed maxima and packed conversions.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

namespace warpo::cuda {

// For data that nothing writes while the kernel runs, read once: leaves the L1 cache alone.
__device__ __forceinline__ uint4 load_read_only(const void* address) {
    uint4 v;
    asm("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
        : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
        : "l"(address));
    return v;
}

// The same for data that this kernel may overwrite.
__device__ __forceinline__ uint4 load_once(const void* address) {
    uint4 v;
    asm volatile("ld.global.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                 : "l"(address)
                 : "memory");
    return v;
}

template <typename Vector>
__device__ __forceinline__ void store_streaming(void* address, Vector v) {
    __stcs(static_cast<Vector*>(address), v);
}

// Makes the compiler compute again what depends on the value, where it would rather keep results of
// 64 bits in registers for the length of a loop.
__device__ __forceinline__ void compute_anew(int64_t& value) { asm volatile("" : "+l"(value)); }

// Bits [8 * bytes, 8 * bytes + 32) of the 64 bits high:low, bytes < 4.
__device__ __forceinline__ uint32_t shift_bytes(uint32_t low, uint32_t high, int bytes) {
    return __funnelshift_r(low, high, 8 * bytes);
}

template <typename Pair>
__device__ __forceinline__ Pair as_pair(uint32_t word) {
    Pair pair;
    memcpy(&pair, &word, sizeof word);
    return pair;
}

template <typename Pair>
__device__ __forceinline__ uint32_t as_word(Pair pair) {
    uint32_t word;
    memcpy(&word, &pair, sizeof word);
    return word;
}

__device__ __forceinline__ uint32_t max_bf16x2(uint32_t a, uint32_t b) {
    return as_word(__hmax2(as_pair<__nv_bfloat162>(a), as_pair<__nv_bfloat162>(b)));
}

__device__ __forceinline__ uint32_t max_f16x2(uint32_t a, uint32_t b) {
    return as_word(__hmax2(as_pair<__half2>(a), as_pair<__half2>(b)));
}

__device__ __forceinline__ uint32_t pack_bf16x2(float low, float high) {
    return as_word(__floats2bfloat162_rn(low, high));
}

__device__ __forceinline__ uint32_t pack_f16x2(float low, float high) {
    return as_word(__floats2half2_rn(low, high));
}

__device__ __forceinline__ float2 unpack_f16x2(uint32_t word) {
    return __half22float2(as_pair<__half2>(word));
}

}  // namespace warpo::cuda
