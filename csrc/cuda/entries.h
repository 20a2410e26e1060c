// Lists of tensors in the parameters of a kernel: those of one launch, and how its blocks find
// theirs. Parameters are copied at the launch, so that nothing of the list has to outlive it.
#pragma once

#include "cuda/device.h"
#include "math/tiles.h"

namespace warpo::cuda {

// What every device and driver takes.
constexpr size_t kParameterBytes = 4096;

// Entry: what a kernel has to know of a tensor, with `first_block` in the launch and `blocks`.
template <typename Entry, int kMost>
struct Entries {
    int count = 0, blocks = 0;
    Entry entries[kMost];

    // False where the launch is full.
    bool add(Entry entry) {
        if (count == kMost) return false;
        entry.first_block = blocks;
        entries[count++] = entry;
        blocks += entry.blocks;
        return true;
    }

    __device__ __forceinline__ const Entry& of_block(int block) const {
        int low = 0, high = count;
        while (high - low > 1) {
            const int middle = (low + high) / 2;
            if (entries[middle].first_block <= block)
                low = middle;
            else
                high = middle;
        }
        return entries[low];
    }
};

// Rows of dense columns, in units of any size.
struct Rows {
    int64_t columns, stride, size;  // size: of all rows; one row has columns == size

    __device__ __forceinline__ int64_t offset_of(int64_t at) const {
        if (columns == size) return at;
        const int64_t row = at / columns;
        return row * stride + (at - row * columns);
    }
};

inline Rows rows_of(const Matrix& tensor) {
    return {tensor.columns, tensor.view.stride0, tensor.rows * tensor.columns};
}

// Whether vectors of `count` elements lie each in one row, at multiples of their bytes.
inline bool is_aligned(const void* data, const Rows& rows, int count, int element_bytes) {
    const bool one_row = rows.columns == rows.size;
    return reinterpret_cast<uintptr_t>(data) % (count * element_bytes) == 0 &&
           (one_row || (rows.columns % count == 0 && rows.stride % count == 0));
}

inline int bytes_of(int dtype) { return dtype == kFloat32 ? 4 : 2; }

}  // namespace warpo::cuda
