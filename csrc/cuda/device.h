// Device helpers that the kernels share: elements of a View, 16-byte vectors of a row, reductions
// in a fixed order.
#pragma once

#include "cuda/ptx.h"
#include "kernels.h"
#include "math/exp.h"

namespace warpo::cuda {

constexpr unsigned kAllLanes = 0xffffffffu;

__device__ __forceinline__ int64_t offset_of(const View& view, int64_t row, int64_t step) {
    return row * view.stride0 + step * view.stride1;
}

// Element at an offset of a float32, bfloat16 or float16 array.
__device__ __forceinline__ float load_float(const View& view, int64_t offset) {
    if (view.dtype == kFloat32) return static_cast<const float*>(view.data)[offset];
    const uint32_t bits = static_cast<const uint16_t*>(view.data)[offset];
    return view.dtype == kBFloat16 ? float_from_bits(bits << 16) : unpack_f16x2(bits).x;
}

__device__ __forceinline__ float load_float(const View& view, int64_t row, int64_t step) {
    return load_float(view, offset_of(view, row, step));
}

// Of an array that is float32 by contract.
__device__ __forceinline__ float load_float32(const View& view, int64_t row, int64_t step) {
    return static_cast<const float*>(view.data)[offset_of(view, row, step)];
}

__device__ __forceinline__ bool load_flag(const View& view, int64_t row, int64_t step) {
    return static_cast<const uint8_t*>(view.data)[offset_of(view, row, step)] != 0;
}

__device__ __forceinline__ void store_float(const View& view, int64_t row, int64_t step,
                                            float value) {
    static_cast<float*>(view.data)[offset_of(view, row, step)] = value;
}

// Into element `offset` of a float32, bfloat16 or float16 array.
__device__ __forceinline__ void store_as(const View& view, int64_t offset, float value) {
    if (view.dtype == kFloat32) {
        static_cast<float*>(view.data)[offset] = value;
        return;
    }
    const uint32_t bits =
        view.dtype == kBFloat16 ? pack_bf16x2(value, 0.0f) : pack_f16x2(value, 0.0f);
    static_cast<uint16_t*>(view.data)[offset] = static_cast<uint16_t>(bits);
}

// How a dtype lies in a 32-bit word. kPerVector elements make 16 bytes.
template <int kDType>
struct Element {
    using Bits = uint16_t;
    static constexpr int kPerWord = 2, kPerVector = 8;
    static constexpr bool kIsBFloat16 = kDType == kBFloat16;
    static constexpr uint32_t kMinusInfinity = kIsBFloat16 ? 0xff80ff80u : 0xfc00fc00u;
    static constexpr uint32_t kNaN = kIsBFloat16 ? 0x7fc07fc0u : 0x7e007e00u;

    static __device__ __forceinline__ void unpack(uint32_t word, float* values) {
        if (kIsBFloat16) {
            values[0] = float_from_bits(word << 16);
            values[1] = float_from_bits(word & 0xffff0000u);
        } else {
            const float2 pair = unpack_f16x2(word);
            values[0] = pair.x;
            values[1] = pair.y;
        }
    }
    static __device__ __forceinline__ uint32_t pack(const float* values) {
        return kIsBFloat16 ? pack_bf16x2(values[0], values[1]) : pack_f16x2(values[0], values[1]);
    }
    static __device__ __forceinline__ uint32_t max(uint32_t a, uint32_t b) {
        return kIsBFloat16 ? max_bf16x2(a, b) : max_f16x2(a, b);
    }
};

template <>
struct Element<kFloat32> {
    using Bits = uint32_t;
    static constexpr int kPerWord = 1, kPerVector = 4;
    static constexpr uint32_t kMinusInfinity = 0xff800000u, kNaN = 0x7fc00000u;

    static __device__ __forceinline__ void unpack(uint32_t word, float* values) {
        values[0] = float_from_bits(word);
    }
    static __device__ __forceinline__ uint32_t pack(const float* values) {
        return as_word(values[0]);
    }
    static __device__ __forceinline__ uint32_t max(uint32_t a, uint32_t b) {
        return as_word(fmaxf(as_pair<float>(a), as_pair<float>(b)));
    }
};

__device__ __forceinline__ int misalignment_of(const void* address) {
    return static_cast<int>(reinterpret_cast<uintptr_t>(address) & 15);
}

// Of the 32 bytes low, high the 16 from byte `misalignment` on, which is 1 to 15.
__device__ __forceinline__ uint4 cut_across(uint4 low, uint4 high, int misalignment) {
    const bool two = misalignment & 8, one = misalignment & 4;
    const uint32_t a0 = two ? low.z : low.x, a1 = two ? low.w : low.y, a2 = two ? high.x : low.z;
    const uint32_t a3 = two ? high.y : low.w, a4 = two ? high.z : high.x,
                   a5 = two ? high.w : high.y;
    const uint32_t b0 = one ? a1 : a0, b1 = one ? a2 : a1, b2 = one ? a3 : a2, b3 = one ? a4 : a3;
    const uint32_t b4 = one ? a5 : a4;
    const int bytes = misalignment & 3;
    return {shift_bytes(b0, b1, bytes), shift_bytes(b1, b2, bytes), shift_bytes(b2, b3, bytes),
            shift_bytes(b3, b4, bytes)};
}

// 16 bytes at an address whose misalignment is not 0, out of the two aligned vectors that hold
// them.
__device__ __forceinline__ uint4 load_across(const void* address, int misalignment) {
    const char* aligned = static_cast<const char*>(address) - misalignment;
    return cut_across(load_read_only(aligned), load_read_only(aligned + 16), misalignment);
}

// Columns first, first + 1, ... of a row, one vector of them; those past the end are `fill`.
// Nothing outside the row is touched.
template <int kDType>
__device__ __forceinline__ uint4 load_edge(const typename Element<kDType>::Bits* row, int first,
                                           int columns, uint32_t fill) {
    constexpr int kPerWord = Element<kDType>::kPerWord;
    uint32_t words[4];
#pragma unroll
    for (int w = 0; w < 4; ++w) {
        words[w] = fill;
        const int column = first + w * kPerWord;
        if (kPerWord == 1) {
            if (column < columns) words[w] = row[column];
        } else {
            if (column < columns) words[w] = (fill & 0xffff0000u) | row[column];
            if (column + 1 < columns) {
                words[w] = (words[w] & 0xffffu) | static_cast<uint32_t>(row[column + 1]) << 16;
            }
        }
    }
    return {words[0], words[1], words[2], words[3]};
}

template <typename T>
__device__ __forceinline__ T warp_sum(T value) {
#pragma unroll
    for (int lanes = 16; lanes > 0; lanes >>= 1) value += __shfl_xor_sync(kAllLanes, value, lanes);
    return value;
}

// A NaN shows only where all lanes have one.
__device__ __forceinline__ float warp_max(float value) {
#pragma unroll
    for (int lanes = 16; lanes > 0; lanes >>= 1)
        value = fmaxf(value, __shfl_xor_sync(kAllLanes, value, lanes));
    return value;
}

// The sum over a block, in every thread. scratch holds one value a warp and may be reused at once.
template <int kWarps, typename T>
__device__ __forceinline__ T block_sum(T value, T* scratch) {
    value = warp_sum(value);
    if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = value;
    __syncthreads();
    T total = 0;
#pragma unroll
    for (int warp = 0; warp < kWarps; ++warp) total += scratch[warp];
    __syncthreads();
    return total;
}

// Whether this block is the last of its launch to come here: then it sees what the others had
// written when they came. The same in every thread. counter: of `counter_of`; back at 0 after the
// last block. What a block writes must not depend on which one is last: add up in a fixed order.
__device__ __forceinline__ bool last_block(unsigned* counter, unsigned blocks) {
    __shared__ bool last;
    __syncthreads();
    if (threadIdx.x == 0) {
        __threadfence();  // with the barrier before it: of the writes of the whole block
        last = atomicInc(counter, blocks - 1) == blocks - 1;
        __threadfence();
    }
    __syncthreads();
    return last;
}

}  // namespace warpo::cuda
