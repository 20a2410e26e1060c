// The part of DLPack's exchange API that reads a tensor of Python where it lies, as the standard
// has it: https://github.com/dmlc/dlpack/blob/v1.3/include/dlpack/dlpack.h. PyTorch has it from
// 2.10 on as `torch.Tensor.__dlpack_c_exchange_api__`; no header of torch is needed for it.
#pragma once

#include <cstdint>

#include "view.h"

namespace warpo::dlpack {

struct Tensor {
    void* data;
    int32_t device_type, device_id;
    int32_t ndim;
    uint8_t type_code, type_bits;
    uint16_t type_lanes;
    int64_t *shape, *strides;
    uint64_t byte_offset;
};

struct ExchangeApi {
    struct {
        uint32_t major, minor;
        void* previous;
    } header;
    void *allocate, *from_python, *to_python;
    // Borrows: valid while the Python object lives. Not 0: a Python error is set.
    int (*read)(void* object, Tensor* out);
    void* current_work_stream;
};

constexpr const char* kCapsule = "dlpack_exchange_api";
constexpr uint32_t kMajor = 1;

// -1 for a dtype that no operation has.
inline int dtype_of(const Tensor& tensor) {
    switch (tensor.type_code << 8 | tensor.type_bits) {
        case 2 << 8 | 32: return kFloat32;
        case 4 << 8 | 16: return kBFloat16;
        case 2 << 8 | 16: return kFloat16;
        case 1 << 8 | 8: return kUInt8;
        case 6 << 8 | 8: return kUInt8;  // bool
        case 0 << 8 | 32: return kInt32;
        case 0 << 8 | 64: return kInt64;
        default: return -1;
    }
}

// The leading two dimensions; a vector is one row.
inline View view_of(const Tensor& tensor) {
    void* const data = static_cast<char*>(tensor.data) + tensor.byte_offset;
    const int64_t *const strides = tensor.strides, first = tensor.ndim ? strides[0] : 0;
    if (tensor.ndim >= 2) return {data, first, strides[1], dtype_of(tensor)};
    return {data, 0, first, dtype_of(tensor)};
}

inline bool is_dense(const Tensor& tensor) {
    int64_t size = 1;
    for (int i = tensor.ndim - 1; i >= 0; --i) {
        if (tensor.shape[i] != 1 && tensor.strides[i] != size) return false;
        size *= tensor.shape[i];
    }
    return true;
}

inline int64_t size_of(const Tensor& tensor) {
    int64_t size = 1;
    for (int i = 0; i < tensor.ndim; ++i) size *= tensor.shape[i];
    return size;
}

// Dense, or of two dimensions.
inline Matrix matrix_of(const Tensor& tensor) {
    const View view = view_of(tensor);
    if (is_dense(tensor)) return {view, 1, size_of(tensor)};
    return {view, tensor.shape[0], tensor.shape[1]};
}

}  // namespace warpo::dlpack
