// A row of logits, read once by a block: its softmax statistics.
#pragma once

#include "cuda/device.h"
#include "cuda/launch.h"
#include "math/online_softmax.h"
#include "math/temperature.h"

namespace warpo::cuda {

constexpr int kLoads = 4;  // 16-byte loads in flight per thread

// Of token `index` of the flattened (rows, steps).
struct Token {
    int64_t row, step, target;
    bool valid, in_range;
};

__device__ __forceinline__ Token load_token(const Logprobs& a, unsigned index) {
    const unsigned steps = static_cast<unsigned>(a.steps);
    Token token;
    token.row = index / steps;
    token.step = index % steps;
    token.target =
        static_cast<const int64_t*>(a.targets.data)[offset_of(a.targets, token.row, token.step)];
    token.valid = token.target != a.ignore_index;
    if (a.mask.data) token.valid = load_flag(a.mask, token.row, token.step) && token.valid;
    token.in_range = token.target >= 0 && token.target < a.vocab;
    return token;
}

__device__ __forceinline__ float load_temperature(const Logprobs& a, const Token& token) {
    return a.token_temperature.data
               ? temperature_or_nan(load_float32(a.token_temperature, token.row, token.step))
               : a.temperature;
}

template <int kDType>
__device__ __forceinline__ typename Element<kDType>::Bits* row_of(const View& view,
                                                                  const Token& token) {
    return static_cast<typename Element<kDType>::Bits*>(view.data) +
           offset_of(view, token.row, token.step);
}

template <int kDType>
__device__ __forceinline__ float load_logit(const typename Element<kDType>::Bits* row,
                                            int64_t column) {
    float pair[2];
    Element<kDType>::unpack(row[column], pair);
    return pair[0];
}

// This thread's vectors of a tile; columns past the end are -inf.
template <int kDType, int kThreads>
__device__ __forceinline__ void load_tile(uint4 (&tile)[kLoads],
                                          const typename Element<kDType>::Bits* row, int tile_start,
                                          int vocab, int misalignment) {
    constexpr int kPerVector = Element<kDType>::kPerVector, kStride = kThreads * kPerVector;
    constexpr int kColumns = kLoads * kStride;
    const int first = tile_start + static_cast<int>(threadIdx.x) * kPerVector;
    // A misaligned vector is cut out of aligned ones, which must not begin before the row or end
    // after it.
    const bool inside = misalignment == 0
                            ? vocab - tile_start >= kColumns
                            : tile_start > 0 && vocab - tile_start >= kColumns + kPerVector;
    if (inside && misalignment == 0) {
#pragma unroll
        for (int k = 0; k < kLoads; ++k) tile[k] = load_read_only(row + first + k * kStride);
    } else if (inside) {
#pragma unroll
        for (int k = 0; k < kLoads; ++k)
            tile[k] = load_across(row + first + k * kStride, misalignment);
    } else {
#pragma unroll
        for (int k = 0; k < kLoads; ++k) {
            const int column = first + k * kStride;
            if (misalignment == 0 && vocab - column >= kPerVector) {
                tile[k] = load_read_only(row + column);
            } else {
                tile[k] = load_edge<kDType>(row, column, vocab, Element<kDType>::kMinusInfinity);
            }
        }
    }
}

template <int kDType, bool kEntropy>
__device__ __forceinline__ void add_tile(SoftmaxState& state, const uint4 (&tile)[kLoads],
                                         float scale) {
    using E = Element<kDType>;
    uint32_t largest = tile[0].x;
#pragma unroll
    for (int k = 0; k < kLoads; ++k) {
        const uint4 v = tile[k];
        largest = E::max(largest, E::max(E::max(v.x, v.y), E::max(v.z, v.w)));
    }
    float candidates[E::kPerWord];
    E::unpack(largest, candidates);
    const float max = fmaxf(candidates[0], candidates[E::kPerWord - 1]);
    if (max > state.max) state = softmax_raise<kEntropy>(state, max, scale);
    const float origin = softmax_origin(state.max);
#pragma unroll
    for (int k = 0; k < kLoads; ++k) {
        const uint32_t words[4] = {tile[k].x, tile[k].y, tile[k].z, tile[k].w};
#pragma unroll
        for (int w = 0; w < 4; ++w) {
            float x[E::kPerWord];
            E::unpack(words[w], x);
#pragma unroll
            for (int i = 0; i < E::kPerWord; ++i) softmax_add<kEntropy>(state, x[i], scale, origin);
        }
    }
}

// The states of all lanes in one, in every lane.
template <bool kEntropy>
__device__ __forceinline__ SoftmaxState merge_lanes(SoftmaxState state, float scale) {
    state = softmax_raise<kEntropy>(state, warp_max(state.max), scale);
    state.sum = warp_sum(state.sum);
    if (kEntropy) state.weighted = warp_sum(state.weighted);
    return state;
}

// Columns of a chunk of the row: tiles enough for at most kLogprobsChunks chunks.
template <int kDType, int kThreads>
__host__ __device__ __forceinline__ int chunk_columns(int vocab) {
    constexpr int kTile = kLoads * kThreads * Element<kDType>::kPerVector;
    return ((vocab - 1) / (kTile * kLogprobsChunks) + 1) * kTile;
}

// The state of columns [start, end) in the lanes of each warp: one a warp.
template <int kDType, int kThreads, bool kEntropy>
__device__ __forceinline__ SoftmaxState read_chunk(const typename Element<kDType>::Bits* row,
                                                   int start, int end, int vocab, float scale) {
    const int misalignment = misalignment_of(row);
    SoftmaxState state = softmax_empty();
    for (; start < end; start += kLoads * kThreads * Element<kDType>::kPerVector) {
        uint4 tile[kLoads];
        load_tile<kDType, kThreads>(tile, row, start, vocab, misalignment);
        add_tile<kDType, kEntropy>(state, tile, scale);
    }
    return merge_lanes<kEntropy>(state, scale);
}

template <int kThreads>
using Chunks = SoftmaxState[kLogprobsChunks][kThreads / 32];

// The state of a chunk from those of its warps, in every lane.
template <int kThreads, bool kEntropy>
__device__ __forceinline__ SoftmaxState merge_warps(const Chunks<kThreads>& parts, int chunk,
                                                    float scale) {
    const int lane = threadIdx.x % 32;
    return merge_lanes<kEntropy>(lane < kThreads / 32 ? parts[chunk][lane] : softmax_empty(),
                                 scale);
}

// The state of the row in the lanes of warp 0; other warps get nothing.
template <int kDType, int kThreads, bool kEntropy>
__device__ __forceinline__ SoftmaxState read_row(Chunks<kThreads>& parts,
                                                 const typename Element<kDType>::Bits* row,
                                                 int vocab, float scale) {
    const int columns = chunk_columns<kDType, kThreads>(vocab);
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    int chunks = 0;
    for (int start = 0; start < vocab; start += columns, ++chunks) {
        const int end = min(vocab - start, columns) + start;
        const SoftmaxState state =
            read_chunk<kDType, kThreads, kEntropy>(row, start, end, vocab, scale);
        if (lane == 0) parts[chunks][warp] = state;
    }
    __syncthreads();
    if (warp < chunks) {
        const SoftmaxState state = merge_warps<kThreads, kEntropy>(parts, warp, scale);
        if (lane == 0) parts[warp][0] = state;
    }
    __syncthreads();
    if (warp > 0) return softmax_empty();
    const SoftmaxState state = lane < chunks ? parts[lane][0] : softmax_empty();
    return merge_lanes<kEntropy>(state, scale);
}

__device__ __forceinline__ void store_token(const Logprobs& a, const Token& token, unsigned index,
                                            float logp, float entropy, float max, float log_sum) {
    store_float(a.logprobs, token.row, token.step, logp);
    if (a.entropy.data) store_float(a.entropy, token.row, token.step, entropy);
    if (a.stats) reinterpret_cast<float2*>(a.stats)[index] = make_float2(max, log_sum);
}

// Of a token whose logits are not read.
__device__ __forceinline__ void store_unread(const Logprobs& a, const Token& token,
                                             unsigned index) {
    const float value = token.valid ? NAN : 0.0f;
    store_token(a, token, index, value, value, value, value);
}

// chosen: the logit of the target.
__device__ __forceinline__ float logp_of(float chosen, float max, float log_sum,
                                         float temperature) {
    const float logp = (chosen - max) / temperature - log_sum;
    return logp > 0.0f ? 0.0f : logp;
}

// A tile more than the vocabulary must fit into int32.
inline void check_sizes(const Logprobs& a, const char* operation) {
    const int64_t most = INT32_MAX - (1 << 16);
    if (a.vocab > most || a.rows * a.steps > INT32_MAX) {
        throw std::runtime_error(std::string(operation) + ": " + std::to_string(a.rows * a.steps) +
                                 " tokens of " + std::to_string(a.vocab) +
                                 " logits, at most 2147483647 of " + std::to_string(most) +
                                 " are supported: split the batch");
    }
}

}  // namespace warpo::cuda
