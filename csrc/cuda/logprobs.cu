// Log-probability of the target and entropy of each row of logits, and the gradient of the logits.
//
// Forward: one block a row, one read, one power of two an element. Which thread adds which column,
// and in what order, depends on the vocabulary alone: neither on the number of rows nor on the
// alignment of the row.
// Backward: blocks of columns, one read and one write.
#include "cuda/device.h"
#include "cuda/launch.h"
#include "math/online_softmax.h"

namespace warpo::cuda {
namespace {

constexpr int kLoads = 4;  // 16-byte loads in flight per thread
constexpr int kForwardThreads = 512, kBackwardThreads = 256;
constexpr int kForwardWarps = kForwardThreads / 32;

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
    return a.token_temperature.data ? load_float32(a.token_temperature, token.row, token.step)
                                    : a.temperature;
}

template <int kDType>
__device__ __forceinline__ typename Element<kDType>::Bits* row_of(const View& view,
                                                                  const Token& token) {
    return static_cast<typename Element<kDType>::Bits*>(view.data) +
           offset_of(view, token.row, token.step);
}

// This thread's vectors of a tile; columns past the end are -inf.
template <int kDType>
__device__ __forceinline__ void load_tile(uint4 (&tile)[kLoads],
                                          const typename Element<kDType>::Bits* row, int tile_start,
                                          int vocab, int misalignment) {
    constexpr int kPerVector = Element<kDType>::kPerVector, kStride = kForwardThreads * kPerVector;
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
__device__ __forceinline__ void add_tile(SoftmaxState& state, float& origin,
                                         const uint4 (&tile)[kLoads], float scale) {
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
    if (max > state.max) {
        state = softmax_raise<kEntropy>(state, max, scale);
        origin = softmax_origin(max);
    }
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

template <bool kEntropy>
__device__ __forceinline__ SoftmaxState merge_lanes(SoftmaxState state, float scale) {
#pragma unroll
    for (int lanes = 16; lanes > 0; lanes >>= 1) {
        SoftmaxState other = softmax_empty();
        other.max = __shfl_down_sync(kAllLanes, state.max, lanes);
        other.sum = __shfl_down_sync(kAllLanes, state.sum, lanes);
        if (kEntropy) other.weighted = __shfl_down_sync(kAllLanes, state.weighted, lanes);
        state = softmax_merge<kEntropy>(state, other, scale);
    }
    return state;
}

// The state of the whole row, in thread 0.
template <bool kEntropy>
__device__ __forceinline__ SoftmaxState merge_block(SoftmaxState state, float scale) {
    __shared__ SoftmaxState warps[kForwardWarps];
    state = merge_lanes<kEntropy>(state, scale);
    if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = state;
    __syncthreads();
    if (threadIdx.x < 32) {
        state = threadIdx.x < kForwardWarps ? warps[threadIdx.x] : softmax_empty();
        state = merge_lanes<kEntropy>(state, scale);
    }
    return state;
}

__device__ __forceinline__ void store_token(const Logprobs& a, const Token& token, unsigned index,
                                            float logp, float entropy, float max, float log_sum) {
    store_float(a.logprobs, token.row, token.step, logp);
    if (a.entropy.data) store_float(a.entropy, token.row, token.step, entropy);
    reinterpret_cast<float2*>(a.stats)[index] = make_float2(max, log_sum);
}

// The state of this thread's columns.
template <int kDType, bool kEntropy>
__device__ __forceinline__ SoftmaxState read_row(const typename Element<kDType>::Bits* row,
                                                 int vocab, float scale) {
    const int misalignment = misalignment_of(row);
    SoftmaxState state = softmax_empty();
    float origin = 0.0f;
    for (int start = 0; start < vocab;
         start += kLoads * kForwardThreads * Element<kDType>::kPerVector) {
        uint4 tile[kLoads];
        load_tile<kDType>(tile, row, start, vocab, misalignment);
        add_tile<kDType, kEntropy>(state, origin, tile, scale);
    }
    return state;
}

// Three blocks per multiprocessor: with four 16-byte loads a thread, 96 KiB can be in flight,
// several times what latency times bandwidth asks for, so that other rows cover the end of one.
template <int kDType, bool kEntropy>
__global__ __launch_bounds__(kForwardThreads, 3) void forward_kernel(const Logprobs a) {
    using E = Element<kDType>;
    // Written and read by thread 0 alone: in shared memory it takes no register of the loop.
    __shared__ float chosen;
    const Token token = load_token(a, blockIdx.x);
    if (!token.valid || !token.in_range) {
        const float value = token.valid ? NAN : 0.0f;
        if (threadIdx.x == 0) store_token(a, token, blockIdx.x, value, value, value, value);
        return;
    }
    const typename E::Bits* row = row_of<kDType>(a.logits, token);
    if (threadIdx.x == 0) {
        float pair[2];
        E::unpack(row[token.target], pair);
        chosen = pair[0];
    }
    const float scale = kLog2e / load_temperature(a, token);
    SoftmaxState state = read_row<kDType, kEntropy>(row, static_cast<int>(a.vocab), scale);
    state = merge_block<kEntropy>(state, scale);
    if (threadIdx.x == 0) {
        // Read again for the same reason.
        const Token again = load_token(a, blockIdx.x);
        const SoftmaxRow result = softmax_finish(state);
        const float logp = (chosen - state.max) / load_temperature(a, again) - result.log_sum;
        store_token(a, again, blockIdx.x, logp > 0.0f ? 0.0f : logp, result.entropy, state.max,
                    result.log_sum);
    }
}

// The part of a row that one thread of the backward pass owns: kLoads vectors at 16-byte boundaries
// of the gradient, and perhaps one column before the first boundary or after the last.
struct Columns {
    int first;   // column of the first vector; the next is kBackwardThreads vectors on
    int end;     // the vectors of the row end here
    int single;  // -1: none
};

template <int kDType>
__device__ __forceinline__ Columns own_columns(const void* gradient, int vocab, int chunk) {
    using E = Element<kDType>;
    constexpr int kSize = sizeof(typename E::Bits), kPerVector = E::kPerVector;
    const int before = min((16 - misalignment_of(gradient)) % 16 / kSize, vocab);
    const int thread = static_cast<int>(threadIdx.x);
    Columns own;
    own.end = before + (vocab - before) / kPerVector * kPerVector;
    own.first = before + (chunk * kLoads * kBackwardThreads + thread) * kPerVector;
    own.single = -1;
    if (chunk == 0 && thread < before) own.single = thread;
    if (chunk == 0 && thread >= 32 && thread - 32 < vocab - own.end)
        own.single = own.end + thread - 32;
    return own;
}

template <int kDType>
__device__ __forceinline__ void fill_columns(typename Element<kDType>::Bits* gradient,
                                             const Columns& own, uint32_t pattern) {
    using E = Element<kDType>;
#pragma unroll
    for (int k = 0; k < kLoads; ++k) {
        const int column = own.first + k * kBackwardThreads * E::kPerVector;
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
template <int kDType>
__device__ __forceinline__ void load_columns(uint4 (&v)[kLoads],
                                             const typename Element<kDType>::Bits* row,
                                             const Columns& own, int vocab) {
    constexpr int kPerVector = Element<kDType>::kPerVector, kStride = kBackwardThreads * kPerVector;
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
template <int kDType, bool kEntropy>
__device__ __forceinline__ void write_columns(const typename Element<kDType>::Bits* row,
                                              typename Element<kDType>::Bits* gradient,
                                              const Columns& own, const SoftmaxGradient& g,
                                              int vocab, int target) {
    using E = Element<kDType>;
    constexpr int kPerVector = E::kPerVector, kStride = kBackwardThreads * kPerVector;
    uint4 v[kLoads];
    load_columns<kDType>(v, row, own, vocab);
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

template <int kDType, bool kEntropy>
__global__ __launch_bounds__(kBackwardThreads, 6) void backward_kernel(const LogprobsBackward b,
                                                                       int chunks) {
    const Logprobs& a = b.forward;
    using E = Element<kDType>;
    const unsigned index = blockIdx.x / static_cast<unsigned>(chunks);
    const int chunk = static_cast<int>(blockIdx.x % static_cast<unsigned>(chunks));
    const Token token = load_token(a, index);
    const int vocab = static_cast<int>(a.vocab);
    typename E::Bits* gradient = row_of<kDType>(b.grad_logits, token);
    const Columns own = own_columns<kDType>(gradient, vocab, chunk);
    if (!token.valid || !token.in_range) {
        fill_columns<kDType>(gradient, own, token.valid ? E::kNaN : 0u);
        return;
    }
    const float2 stats = reinterpret_cast<const float2*>(a.stats)[index];
    const float grad_logp =
        b.grad_logprobs.data ? load_float32(b.grad_logprobs, token.row, token.step) : 0.0f;
    const float grad_entropy =
        kEntropy ? load_float32(b.grad_entropy, token.row, token.step) : 0.0f;
    // A row of weight 0 is not read, unless its gradient is NaN: 0 times a NaN probability.
    if (grad_logp == 0.0f && grad_entropy == 0.0f && isfinite(stats.x) && isfinite(stats.y)) {
        fill_columns<kDType>(gradient, own, 0u);
        return;
    }
    const float entropy = kEntropy ? load_float32(a.entropy, token.row, token.step) : 0.0f;
    const SoftmaxGradient g = softmax_gradient(stats.x, stats.y, load_temperature(a, token),
                                               grad_logp, entropy, grad_entropy);
    write_columns<kDType, kEntropy>(row_of<kDType>(a.logits, token), gradient, own, g, vocab,
                                    static_cast<int>(token.target));
}

// A tile more than the vocabulary must fit into int32.
void check_sizes(const Logprobs& a, const char* operation) {
    const int64_t most = INT32_MAX - (1 << 16);
    if (a.vocab > most || a.rows * a.steps > INT32_MAX) {
        throw std::runtime_error(std::string(operation) + ": " + std::to_string(a.rows * a.steps) +
                                 " tokens of " + std::to_string(a.vocab) +
                                 " logits, at most 2147483647 of " + std::to_string(most) +
                                 " are supported: split the batch");
    }
}

template <int kDType>
void forward(const Logprobs& a, Stream stream) {
    const auto kernel =
        a.entropy.data ? forward_kernel<kDType, true> : forward_kernel<kDType, false>;
    launch("logprobs", stream, a.rows * a.steps, kForwardThreads, kernel, a);
}

template <int kDType>
void backward(const LogprobsBackward& b, Stream stream) {
    const Logprobs& a = b.forward;
    const int64_t columns = int64_t{kLoads} * kBackwardThreads * Element<kDType>::kPerVector;
    const int chunks = static_cast<int>((a.vocab + columns - 1) / columns);
    const auto kernel =
        b.grad_entropy.data ? backward_kernel<kDType, true> : backward_kernel<kDType, false>;
    launch("logprobs_backward", stream, a.rows * a.steps * chunks, kBackwardThreads, kernel, b,
           chunks);
}

}  // namespace

void logprobs_forward(const Logprobs& a, Stream stream) {
    DeviceGuard guard(stream.device, "logprobs");
    check_sizes(a, "logprobs");
    if (a.rows * a.steps == 0) return;
    switch (a.logits.dtype) {
        case kBFloat16: return forward<kBFloat16>(a, stream);
        case kFloat16: return forward<kFloat16>(a, stream);
        default: return forward<kFloat32>(a, stream);
    }
}

void logprobs_backward(const LogprobsBackward& b, Stream stream) {
    const Logprobs& a = b.forward;
    DeviceGuard guard(stream.device, "logprobs_backward");
    check_sizes(a, "logprobs_backward");
    if (a.rows * a.steps == 0) return;
    switch (a.logits.dtype) {
        case kBFloat16: return backward<kBFloat16>(b, stream);
        case kFloat16: return backward<kFloat16>(b, stream);
        default: return backward<kFloat32>(b, stream);
    }
}

}  // namespace warpo::cuda
