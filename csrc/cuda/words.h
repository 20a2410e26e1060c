// Elements of a tensor in row-major order, one a lane, and the words of the fingerprint they make.
#pragma once

#include "cuda/device.h"
#include "math/fingerprint.h"

namespace warpo::cuda {

// Of element `at` in row-major order of rows whose columns are dense.
__device__ __forceinline__ int64_t dense_offset(const View& view, int64_t rows, int64_t columns,
                                                int64_t at) {
    if (rows == 1) return at;
    const int64_t row = at / columns;
    return row * view.stride0 + (at - row * columns);
}

// In lanes whose element `at` begins a word: the term of it, and 0 in the others and outside. All
// lanes of a warp take part, with consecutive elements, the first of which begins a word; outside
// the tensor bits are 0.
template <int kBytes>
__device__ __forceinline__ uint64_t fingerprint_term(int64_t at, uint32_t bits, bool inside) {
    constexpr int kPerWord = 8 / kBytes;
    uint32_t low = bits, high;
    if (kPerWord == 4) {
        low |= __shfl_down_sync(kAllLanes, bits, 1) << 16;
        high = __shfl_down_sync(kAllLanes, low, 2);
    } else {
        high = __shfl_down_sync(kAllLanes, bits, 1);
    }
    if (!inside || at % kPerWord != 0) return 0;
    return warpo::fingerprint_term(at / kPerWord, static_cast<uint64_t>(high) << 32 | low);
}

}  // namespace warpo::cuda
