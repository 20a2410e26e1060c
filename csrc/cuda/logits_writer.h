// The gradient of a row of logits: each thread writes the columns that it has read.
#pragma once

#include "cuda/logits_reader.h"

namespace warpo::cuda {

// A vector of the gradient holds as many columns as 16 bytes of the logits: 16 bytes too, or 8
// where the gradient of float32 logits has 16 bits.
template <int kDType, int kOutDType>
struct Gradient {
    using Bits = typename Element<kOutDType>::Bits;
    static constexpr int kPerVector = Element<kDType>::kPerVector;
    static constexpr int kVectorBytes = kPerVector * sizeof(Bits);
    static_assert(kVectorBytes == 16 || kVectorBytes == 8);
    static constexpr int kWords = kVectorBytes / 4;
};

__device__ __forceinline__ uint4 vector_of(const uint32_t (&words)[4]) {
    return make_uint4(words[0], words[1], words[2], words[3]);
}

__device__ __forceinline__ uint2 vector_of(const uint32_t (&words)[2]) {
    return make_uint2(words[0], words[1]);
}

// The part of a row that one thread of the backward pass owns: vectors at boundaries of their size
// in the gradient, and perhaps one column before the first boundary or after the last.
struct Columns {
    int first;   // column of the first vector; the next is kThreads vectors on
    int end;     // the vectors of the row end here
    int single;  // -1: none
};

// kVectors: those that a thread owns of each chunk.
template <int kDType, int kOutDType, int kThreads, int kVectors = kLoads>
__device__ __forceinline__ Columns own_columns(const void* gradient, int vocab, int chunk) {
    using G = Gradient<kDType, kOutDType>;
    constexpr int kSize = sizeof(typename G::Bits), kPerVector = G::kPerVector;
    const int past = misalignment_of(gradient) % G::kVectorBytes;
    const int before = min((G::kVectorBytes - past) % G::kVectorBytes / kSize, vocab);
    const int thread = static_cast<int>(threadIdx.x);
    Columns own;
    own.end = before + (vocab - before) / kPerVector * kPerVector;
    own.first = before + (chunk * kVectors * kThreads + thread) * kPerVector;
    own.single = -1;
    if (chunk == 0 && thread < before) own.single = thread;
    if (chunk == 0 && thread >= 32 && thread - 32 < vocab - own.end)
        own.single = own.end + thread - 32;
    return own;
}

// pattern: a word of the gradient.
template <int kDType, int kOutDType, int kThreads, int kVectors = kLoads>
__device__ __forceinline__ void fill_columns(typename Element<kOutDType>::Bits* gradient,
                                             const Columns& own, uint32_t pattern) {
    using G = Gradient<kDType, kOutDType>;
    uint32_t words[G::kWords];
    for (int w = 0; w < G::kWords; ++w) words[w] = pattern;
#pragma unroll
    for (int k = 0; k < kVectors; ++k) {
        const int column = own.first + k * kThreads * G::kPerVector;
        if (column < own.end) store_streaming(gradient + column, vector_of(words));
    }
    if (own.single >= 0) gradient[own.single] = static_cast<typename G::Bits>(pattern);
}

// target: index of the target within the vector, or -1.
template <int kDType, int kOutDType, bool kEntropy>
__device__ __forceinline__ auto gradient_vector(const SoftmaxGradient& g, uint4 v, int target) {
    using E = Element<kDType>;
    using Out = Element<kOutDType>;
    const uint32_t words[4] = {v.x, v.y, v.z, v.w};
    float x[E::kPerVector];
#pragma unroll
    for (int w = 0; w < 4; ++w) E::unpack(words[w], x + w * E::kPerWord);
#pragma unroll
    for (int i = 0; i < E::kPerVector; ++i) {
        x[i] = softmax_gradient_at<kEntropy>(g, x[i]);
        if (i == target) x[i] += g.at_target;
    }
    constexpr int kWords = Gradient<kDType, kOutDType>::kWords;
    uint32_t packed[kWords];
#pragma unroll
    for (int w = 0; w < kWords; ++w) packed[w] = Out::pack(x + w * Out::kPerWord);
    return vector_of(packed);
}

// The thread's vectors of logits, whose alignment may differ from that of the gradient.
template <int kDType, int kThreads, int kVectors>
__device__ __forceinline__ void load_columns(uint4 (&v)[kVectors],
                                             const typename Element<kDType>::Bits* row,
                                             const Columns& own, int vocab) {
    constexpr int kPerVector = Element<kDType>::kPerVector, kStride = kThreads * kPerVector;
    const int misalignment = misalignment_of(row + own.end);
    if (misalignment == 0) {
#pragma unroll
        for (int k = 0; k < kVectors; ++k) {
            const int column = own.first + k * kStride;
            v[k] = column < own.end ? load_once(row + column) : make_uint4(0, 0, 0, 0);
        }
        return;
    }
#pragma unroll
    for (int k = 0; k < kVectors; ++k) {
        const int column = own.first + k * kStride;
        const bool inside = column >= kPerVector && column + 2 * kPerVector <= vocab;
        v[k] = inside ? load_across(row + column, misalignment)
                      : load_edge<kDType>(row, column, vocab, 0);
    }
}

// Of loaded vectors.
template <int kDType, int kOutDType, int kThreads, bool kEntropy, int kVectors>
__device__ __forceinline__ void store_columns(const uint4 (&v)[kVectors],
                                              const typename Element<kDType>::Bits* row,
                                              typename Element<kOutDType>::Bits* gradient,
                                              const Columns& own, const SoftmaxGradient& g,
                                              int target) {
    constexpr int kPerVector = Element<kDType>::kPerVector, kStride = kThreads * kPerVector;
#pragma unroll
    for (int k = 0; k < kVectors; ++k) {
        const int column = own.first + k * kStride;
        if (column >= own.end) break;
        // One vector of a row holds the target: the others skip the comparisons.
        const int place = target - column;
        const auto out = place >= 0 && place < kPerVector
                             ? gradient_vector<kDType, kOutDType, kEntropy>(g, v[k], place)
                             : gradient_vector<kDType, kOutDType, kEntropy>(g, v[k], -1);
        store_streaming(gradient + column, out);
    }
    if (own.single >= 0) {
        const uint4 word = make_uint4(row[own.single], 0, 0, 0);
        const auto out =
            gradient_vector<kDType, kOutDType, kEntropy>(g, word, target == own.single ? 0 : -1);
        gradient[own.single] = static_cast<typename Element<kOutDType>::Bits>(out.x);
    }
}

// Every element is read by the thread that writes it, before it does: gradients may be the logits.
template <int kDType, int kOutDType, int kThreads, bool kEntropy>
__device__ __forceinline__ void write_columns(const typename Element<kDType>::Bits* row,
                                              typename Element<kOutDType>::Bits* gradient,
                                              const Columns& own, const SoftmaxGradient& g,
                                              int vocab, int target) {
    uint4 v[kLoads];
    load_columns<kDType, kThreads>(v, row, own, vocab);
    store_columns<kDType, kOutDType, kThreads, kEntropy>(v, row, gradient, own, g, target);
}

}  // namespace warpo::cuda
