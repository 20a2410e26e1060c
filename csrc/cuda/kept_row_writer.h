// The gradient of a row whose logits are in shared memory, or most of them.
#pragma once

#include "cuda/kept_row.h"

namespace warpo::cuda {

// What block `rank` of the cluster writes of the gradient of a row: the vectors at 16-byte
// boundaries of the gradient that begin in the columns it has read, and block 0 the few columns
// before the first boundary and after the last.
struct Part {
    int before;      // columns before the first vector
    int begin, end;  // vectors
    int single;      // column of this thread's own; -1: none
};

template <int kGradient>
__device__ __forceinline__ Part part_of(const void* gradient, int rank, int columns, int vocab) {
    constexpr int kPerVector = Element<kGradient>::kPerVector;
    constexpr int kSize = sizeof(typename Element<kGradient>::Bits);
    const int thread = static_cast<int>(threadIdx.x), start = rank * columns;
    Part part;
    part.before = min((16 - misalignment_of(gradient)) % 16 / kSize, vocab);
    const int vectors = (vocab - part.before) / kPerVector;
    const auto first_from = [&](int column) {
        return min((max(column - part.before, 0) + kPerVector - 1) / kPerVector, vectors);
    };
    part.begin = first_from(start);
    part.end = first_from(start + columns);
    part.single = -1;
    if (rank == 0 && thread < part.before) part.single = thread;
    const int after = part.before + vectors * kPerVector;
    if (rank == 0 && thread >= 32 && thread - 32 < vocab - after)
        part.single = after + thread - 32;
    return part;
}

template <int kGradient>
__device__ __forceinline__ void fill_part(const RowPlan& plan,
                                          typename Element<kGradient>::Bits* gradient,
                                          const Part& part, uint32_t pattern) {
    using E = Element<kGradient>;
    for (int i = part.begin + static_cast<int>(threadIdx.x); i < part.end; i += plan.threads) {
        store_streaming(gradient + part.before + i * E::kPerVector,
                        make_uint4(pattern, pattern, pattern, pattern));
    }
    if (part.single >= 0) gradient[part.single] = static_cast<typename E::Bits>(pattern);
}

// Of logits in as many vectors as the gradient needs for one. target: index of the target within
// the vector, or -1.
template <int kDType, int kGradient, bool kEntropy, int kVectors>
__device__ __forceinline__ uint4 gradient_of(const SoftmaxGradient& g, const uint4 (&v)[kVectors],
                                             int target) {
    using E = Element<kDType>;
    using G = Element<kGradient>;
    uint32_t out[4];
#pragma unroll
    for (int w = 0; w < 4; ++w) {
        float x[G::kPerWord];
#pragma unroll
        for (int j = 0; j < kVectors; ++j) {
            const int word = w * kVectors + j;
            const uint4& from = v[word / 4];
            const uint32_t words[4] = {from.x, from.y, from.z, from.w};
            E::unpack(words[word % 4], x + j * E::kPerWord);
        }
#pragma unroll
        for (int i = 0; i < G::kPerWord; ++i) {
            x[i] = softmax_gradient_at<kEntropy>(g, x[i]);
            if (w * G::kPerWord + i == target) x[i] += g.at_target;
        }
        out[w] = G::pack(x);
    }
    return {out[0], out[1], out[2], out[3]};
}

// A vector of logits from byte `offset` of what is kept.
__device__ __forceinline__ uint4 load_kept(const uint4* kept, int offset) {
    const uint4* at = kept + offset / 16;
    const int misalignment = offset % 16;
    return misalignment == 0 ? at[0] : cut_across(at[0], at[1], misalignment);
}

// The gradient may be the logits: what is not kept is read by the thread that writes it, before it
// does.
template <int kDType, int kGradient, bool kEntropy>
__device__ __forceinline__ void write_part(const RowPlan& plan, const uint4* kept,
                                           const typename Element<kDType>::Bits* row,
                                           typename Element<kGradient>::Bits* gradient,
                                           const Part& part, int start, const SoftmaxGradient& g,
                                           int vocab, int target) {
    using E = Element<kDType>;
    using G = Element<kGradient>;
    constexpr int kVectors = G::kPerVector / E::kPerVector, kBatch = kLoads / kVectors;
    constexpr int kSize = sizeof(typename E::Bits);
    const int step = kBatch * plan.threads, kept_end = start + plan.kept * E::kPerVector;
    const int thread = static_cast<int>(threadIdx.x);
    // From the end: what is not kept was read last, and is in the L2 cache the surer.
    for (int base = part.begin + (part.end - part.begin - 1) / step * step; base >= part.begin;
         base -= step) {
        uint4 v[kBatch][kVectors];
#pragma unroll
        for (int k = 0; k < kBatch; ++k) {
            const int i = base + k * plan.threads + thread;
            if (i >= part.end) break;
            const int column = part.before + i * G::kPerVector;
#pragma unroll
            for (int j = 0; j < kVectors; ++j) {
                const int from = column + j * E::kPerVector;
                v[k][j] = from + E::kPerVector <= kept_end
                              ? load_kept(kept, (from - start) * kSize)
                              : load_vector<kDType>(row + from, from, vocab, misalignment_of(row + from));
            }
        }
#pragma unroll
        for (int k = 0; k < kBatch; ++k) {
            const int i = base + k * plan.threads + thread;
            if (i >= part.end) break;
            const int column = part.before + i * G::kPerVector, place = target - column;
            // One vector of a row holds the target: the others skip the comparisons.
            uint4 out = gradient_of<kDType, kGradient, kEntropy>(g, v[k], -1);
            if (place >= 0 && place < G::kPerVector)
                out = gradient_of<kDType, kGradient, kEntropy>(g, v[k], place);
            store_streaming(gradient + column, out);
        }
    }
    if (part.single < 0) return;
    float x[2] = {softmax_gradient_at<kEntropy>(g, load_logit<kDType>(row, part.single)), 0.0f};
    if (part.single == target) x[0] += g.at_target;
    gradient[part.single] = static_cast<typename G::Bits>(G::pack(x));
}

}  // namespace warpo::cuda
