// How an array is passed: raw pointer and strides, no torch.
#pragma once
#include <cstdint>
#include <vector>

namespace warpo {

enum DType : int { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2, kUInt8 = 3, kInt32 = 4, kInt64 = 5 };

// A per-token array over (row, step): element (b, t) lies at data[b * stride0 + t * stride1].
// Strides count elements and may be 0. data == nullptr is an absent optional argument.
struct View {
    void* data = nullptr;
    int64_t stride0 = 0, stride1 = 0;
    int dtype = kFloat32;
};

// A tensor with its shape: element (row, column) lies at data[row * view.stride0 + column]. A dense
// tensor is one row, of any other the leading dimensions are merged to rows.
struct Matrix {
    View view;
    int64_t rows, columns;
};

using Matrices = std::vector<Matrix>;

}  // namespace warpo
