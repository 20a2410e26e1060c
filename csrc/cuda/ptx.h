// Instructions that C++ has no words for: cache hints, copies beside the thread, packed maxima,
// packed conversions, and what the blocks of a cluster share.
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

__device__ __forceinline__ uint32_t shared_address(const void* pointer) {
    return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// Copies 16 bytes into shared memory while the thread goes on; they may be read after wait_copies,
// and by other threads after a barrier more.
__device__ __forceinline__ void copy_async(void* shared, const void* global) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;"
                 :
                 : "r"(shared_address(shared)), "l"(global)
                 : "memory");
}

// Makes one group of the thread's copies so far.
__device__ __forceinline__ void commit_copies() { asm volatile("cp.async.commit_group;"); }

// Until all groups of the thread but the last kGroups are there.
template <int kGroups>
__device__ __forceinline__ void wait_copies() {
    asm volatile("cp.async.wait_group %0;" : : "n"(kGroups) : "memory");
}

// Makes the compiler compute again what depends on the value, where it would rather keep results of
// 64 bits in registers for the length of a loop.
__device__ __forceinline__ void compute_anew(int64_t& value) { asm volatile("" : "+l"(value)); }

// Bits [8 * bytes, 8 * bytes + 32) of the 64 bits high:low, bytes < 4.
__device__ __forceinline__ uint32_t shift_bytes(uint32_t low, uint32_t high, int bytes) {
    return __funnelshift_r(low, high, 8 * bytes);
}

// The dynamic shared memory of the block.
__device__ __forceinline__ void* dynamic_shared() {
    extern __shared__ uint4 memory[];
    return memory;
}

// The barrier of all threads of a cluster, in two halves: what is written to shared memory before
// the first is seen after the second. Clusters begin with compute capability 9.0.
__device__ __forceinline__ void cluster_arrive() {
#if __CUDA_ARCH__ >= 900
    asm volatile("barrier.cluster.arrive.release;" ::: "memory");
#endif
}

// The same for a thread that has read what it needs, and whose writes no other block waits for.
__device__ __forceinline__ void cluster_arrive_relaxed() {
#if __CUDA_ARCH__ >= 900
    asm volatile("barrier.cluster.arrive.relaxed;" ::: "memory");
#endif
}

__device__ __forceinline__ void cluster_wait() {
#if __CUDA_ARCH__ >= 900
    asm volatile("barrier.cluster.wait.acquire;" ::: "memory");
#endif
}

// What another block of the cluster has at the place in its shared memory of `own` in this one's.
__device__ __forceinline__ float load_from_block(const float* own, int block) {
#if __CUDA_ARCH__ >= 900
    uint32_t address = shared_address(own);
    asm("mapa.shared::cluster.u32 %0, %0, %1;" : "+r"(address) : "r"(block));
    float value;
    asm volatile("ld.shared::cluster.f32 %0, [%1];" : "=f"(value) : "r"(address) : "memory");
    return value;
#else
    return *own;
#endif
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
