// The gradient of a row of logits: each thread writes the columns that it has read.
#pragma once

#include "cuda/logits_reader.h"

namespace warpo::cuda {

// The part of a row that one thread of the backward pass owns: kLoads vectors at 16-byte boundaries
// of the gradient, and perhaps one column before the first boundary or after the last.
struct Columns {
    int first;   // column of the first vector; the next is kThreads vectors on
    int end;     // the vectors of the row end here
    int single;  // -1: none
};

template <int kDType, int kThreads>
__device__ __forceinline__ Columns own_columns(const void* gradient, int vocab, int chunk) {
    using E = Element<kDType>;
    constexpr int kSize = sizeof(typename E::Bits), kPerVector = E::kPerVector;
    const int before = min((16 - misalignment_of(gradient)) % 16 / kSize, vocab);
    const int thread = static_cast<int>(threadIdx.x);
    Columns own;
    own.end = before + (vocab - before) / kPerVector * kPerVector;
    own.first = before + (chunk * kLoads * kThreads + thread) * kPerVector;
    own.single = -1;
    if (chunk == 0 && thread < before) own.single = thread;
    if (chunk == 0 && thread >= 32 && thread - 32 < vocab - own.end)
        own.single = own.end + thread - 32;
    return own;
}

template <int kDType, int kThreads>
__device__ __forceinline__ void fill_columns(typename Element<kDType>::Bits* gradient,
                                             const Columns& own, uint32_t pattern) {
    using E = Element<kDType>;
#pragma unroll
    for (int k = 0; k < kLoads; ++k) {
        const int column = own.first + k * kThreads * E::kPerVector;
        if (column < own.end)
            store_streaming(gradient + column, make_uint4(pattern, pattern, pattern, pattern));
    }
    if (own.single >= 0) gradient[own.single] = static_cast<typename E::Bits>(pattern);
}

// target: index of the target within the vector, or -1.
template <int kDType, bool kEntropy>
__device__ __forceinline__ uint4 gradient_vector(const SoftmaxGradient& g, uint4 v, int target) {
    using E = Element<kDType>;
    uint32_t words[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
    for (int w = 0; w < 4; ++w) {
        float x[E::kPerWord];
        E::unpack(words[w], x);
#pragma unroll
        for (int i = 0; i < E::kPerWord; ++i) {
            x[i] = softmax_gradient_at<kEntropy>(g, x[i]);
            if (w * E::kPerWord + i == target) x[i] += g.at_target;
        }
        words[w] = E::pack(x);
    }
    return {words[0], words[1], words[2], words[3]};
}

// The thread's vectors of logits, whose alignment may differ from that of the gradient.
template <int kDType, int kThreads>
__device__ __forceinline__ void load_columns(uint4 (&v)[kLoads],
                                             const typename Element<kDType>::Bits* row,
                                             const Columns& own, int vocab) {
    constexpr int kPerVector = Element<kDType>::kPerVector, kStride = kThreads * kPerVector;
    const int misalignment = misalignment_of(row + own.end);
    if (misalignment == 0) {
#pragma unroll
        for (int k = 0; k < kLoads; ++k) {
            const int column = own.first + k * kStride;
            v[k] = column < own.end ? load_once(row + column) : make_uint4(0, 0, 0, 0);
        }
        return;
    }
#pragma unroll
    for (int k = 0; k < kLoads; ++k) {
        const int column = own.first + k * kStride;
        const bool inside = column >= kPerVector && column + 2 * kPerVector <= vocab;
        v[k] = inside ? load_across(row + column, misalignment)
                      : load_edge<kDType>(row, column, vocab, 0);
    }
}

// Every element is read by the thread that writes it, before it does: gradients may be the logits.
template <int kDType, int kThreads, bool kEntropy>
__device__ __forceinline__ void write_columns(const typename Element<kDType>::Bits* row,
                                              typename Element<kDType>::Bits* gradient,
                                              const Columns& own, const SoftmaxGradient& g,
                                              int vocab, int target) {
    using E = Element<kDType>;
    constexpr int kPerVector = E::kPerVector, kStride = kThreads * kPerVector;
    uint4 v[kLoads];
    load_columns<kDType, kThreads>(v, row, own, vocab);
#pragma unroll
    for (int k = 0; k < kLoads; ++k) {
        const int column = own.first + k * kStride;
        if (column >= own.end) break;
        // One vector of a row holds the target: the others skip the comparisons.
        uint4 out = gradient_vector<kDType, kEntropy>(g, v[k], -1);
        const int place = target - column;
        if (place >= 0 && place < kPerVector)
            out = gradient_vector<kDType, kEntropy>(g, v[k], place);
        store_streaming(gradient + column, out);
    }
    if (own.single >= 0) {
        const uint4 word = make_uint4(row[own.single], 0, 0, 0);
        const uint4 out = gradient_vector<kDType, kEntropy>(g, word, target == own.single ? 0 : -1);
        gradient[own.single] = static_cast<typename E::Bits>(out.x);
    }
}

}  // namespace warpo::cuda
