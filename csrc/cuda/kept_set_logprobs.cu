// Logprobs over the kept ids of each token: one block a token, whose warps take kept ids in groups;
// one warp a piece of a weight row for its gradient.
#include "cuda/device.h"
#include "cuda/launch.h"
#include "math/offsets.h"
#include "math/temperature.h"

namespace warpo::cuda {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / 32;
constexpr int kGroup = 4;  // rows of the weight that a warp reads at once

// The entries of a token.
__device__ __forceinline__ Extent kept_of(const KeptSetLogprobs& a, int64_t token) {
    return extent_of(a.kept_offsets, a.tokens, token, a.num_kept);
}

__device__ __forceinline__ float inverse_temperature(const KeptSetLogprobs& a, int64_t token) {
    return 1.0f / (a.token_temperature.data
                       ? temperature_or_nan(load_float32(a.token_temperature, 0, token))
                       : a.temperature);
}

template <int kDType>
using BitsOf = typename Element<kDType>::Bits;

template <int kDType>
__device__ __forceinline__ BitsOf<kDType>* row_of(const View& view, int64_t row) {
    return static_cast<BitsOf<kDType>*>(view.data) + row * view.stride0;
}

// kWidth elements, 16 bytes or one element, as floats.
template <int kDType, int kWidth>
__device__ __forceinline__ void load_floats(const BitsOf<kDType>* address, float* values) {
    using E = Element<kDType>;
    if constexpr (kWidth == 1) {
        float pair[2];
        E::unpack(*address, pair);
        values[0] = pair[0];
    } else {
        const uint4 v = load_read_only(address);
        E::unpack(v.x, values);
        E::unpack(v.y, values + E::kPerWord);
        E::unpack(v.z, values + 2 * E::kPerWord);
        E::unpack(v.w, values + 3 * E::kPerWord);
    }
}

template <int kDType, int kWidth>
__device__ __forceinline__ void store_floats(const float* values, BitsOf<kDType>* address) {
    using E = Element<kDType>;
    if constexpr (kWidth == 1) {
        const float pair[2] = {values[0], 0.0f};
        *address = static_cast<BitsOf<kDType>>(E::pack(pair));
    } else {
        store_streaming(address, make_uint4(E::pack(values), E::pack(values + E::kPerWord),
                                            E::pack(values + 2 * E::kPerWord),
                                            E::pack(values + 3 * E::kPerWord)));
    }
}

// Logits of the entries [first, first + kGroup) before `last`, one warp.
template <int kDType, int kWidth>
__device__ __forceinline__ void group_logits(const KeptSetLogprobs& a, const BitsOf<kDType>* hidden,
                                             int64_t first, int64_t last) {
    const int lane = static_cast<int>(threadIdx.x % 32);
    int64_t ids[kGroup];
    bool inside[kGroup];
    float sums[kGroup];
#pragma unroll
    for (int k = 0; k < kGroup; ++k) {
        ids[k] = first + k < last ? index_at(a.kept_ids, first + k) : -1;
        inside[k] = ids[k] >= 0 && ids[k] < a.vocab;
        sums[k] = 0.0f;
    }
    for (int64_t column = lane * kWidth; column < a.hidden_size; column += 32 * kWidth) {
        float x[kWidth];
        load_floats<kDType, kWidth>(hidden + column, x);
#pragma unroll
        for (int k = 0; k < kGroup; ++k) {
            if (!inside[k]) continue;
            float w[kWidth];
            load_floats<kDType, kWidth>(row_of<kDType>(a.weight, ids[k]) + column, w);
#pragma unroll
            for (int i = 0; i < kWidth; ++i) sums[k] = fmaf(x[i], w[i], sums[k]);
        }
    }
#pragma unroll
    for (int k = 0; k < kGroup; ++k) {
        float logit = warp_sum(sums[k]);
        if (lane != 0 || first + k >= last) continue;
        if (inside[k] && a.bias.data) logit += load_float(a.bias, 0, ids[k]);
        a.kept_logits[first + k] = inside[k] ? logit : NAN;
    }
}

__device__ __forceinline__ float block_max(float value, float* scratch) {
#pragma unroll
    for (int lanes = 16; lanes > 0; lanes >>= 1)
        value = fmaxf(value, __shfl_xor_sync(kAllLanes, value, lanes));
    if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = value;
    __syncthreads();
    float largest = scratch[0];
#pragma unroll
    for (int warp = 1; warp < kWarps; ++warp) largest = fmaxf(largest, scratch[warp]);
    __syncthreads();
    return largest;
}

template <int kDType, int kWidth>
__global__ __launch_bounds__(kThreads) void forward_kernel(const KeptSetLogprobs a) {
    __shared__ float scratch[kWarps];
    __shared__ float chosen;
    const int64_t token = blockIdx.x;
    const Extent kept = kept_of(a, token);
    const auto finish = [&](float value, float top, float log_sum) {
        a.logprobs[token] = value;
        reinterpret_cast<float2*>(a.stats)[token] = make_float2(top, log_sum);
    };
    if (kept.malformed || kept.first == kept.end) {
        if (threadIdx.x == 0) {
            const float result = kept.malformed ? NAN : 0.0f;
            finish(result, result, result);
        }
        return;
    }
    if (threadIdx.x == 0) chosen = NAN;
    const BitsOf<kDType>* hidden = row_of<kDType>(a.hidden, token);
    for (int64_t e = kept.first + threadIdx.x / 32 * kGroup; e < kept.end; e += kWarps * kGroup)
        group_logits<kDType, kWidth>(a, hidden, e, kept.end);
    __syncthreads();

    const int64_t target =
        static_cast<const int64_t*>(a.targets.data)[offset_of(a.targets, 0, token)];
    const float inverse = inverse_temperature(a, token);
    float top = -INFINITY, sum = 0.0f;
    for (int64_t e = kept.first + threadIdx.x; e < kept.end; e += kThreads) {
        const float logit = a.kept_logits[e];
        top = fmaxf(top, logit);
        if (index_at(a.kept_ids, e) == target) chosen = logit;
    }
    top = block_max(top, scratch);
    for (int64_t e = kept.first + threadIdx.x; e < kept.end; e += kThreads)
        sum += exp_f32((a.kept_logits[e] - top) * inverse);
    sum = block_sum<kWarps>(sum, scratch);
    if (threadIdx.x == 0) {
        // no kept target: NaN for the gradient too
        const float log_sum = chosen == chosen ? logf(sum) : NAN;
        const float value = (chosen - top) * inverse - log_sum;
        finish(value > 0.0f ? 0.0f : value, top, log_sum);
    }
}

// One block a token and kThreads * kWidth columns of its gradient.
template <int kDType, int kWidth>
__global__ __launch_bounds__(kThreads) void backward_kernel(const KeptSetLogprobsBackward b,
                                                            unsigned pieces) {
    __shared__ float grads[kThreads];
    __shared__ int64_t ids[kThreads];
    const KeptSetLogprobs& a = b.forward;
    const int64_t token = blockIdx.x / pieces;
    const unsigned piece = blockIdx.x % pieces;
    const Extent kept = kept_of(a, token);
    const int64_t column = (static_cast<int64_t>(piece) * kThreads + threadIdx.x) * kWidth;
    const bool own = b.grad_hidden.data && column < a.hidden_size;
    const int64_t target =
        static_cast<const int64_t*>(a.targets.data)[offset_of(a.targets, 0, token)];
    const float2 stats = reinterpret_cast<const float2*>(a.stats)[token];
    const float inverse = inverse_temperature(a, token);
    const float weight =
        kept.first < kept.end ? load_float32(b.grad_logprobs, 0, token) * inverse : 0.0f;
    float sums[kWidth];
#pragma unroll
    for (int i = 0; i < kWidth; ++i) sums[i] = kept.malformed ? NAN : 0.0f;
    for (int64_t start = kept.first; start < kept.end; start += kThreads) {
        const int64_t e = start + threadIdx.x;
        if (e < kept.end) {
            const int64_t id = index_at(a.kept_ids, e);
            const float p = exp_f32((a.kept_logits[e] - stats.x) * inverse - stats.y);
            const float grad = weight * ((id == target ? 1.0f : 0.0f) - p);
            grads[threadIdx.x] = grad;
            ids[threadIdx.x] = id;
            if (piece == 0) b.grad_logits[e] = grad;
        }
        __syncthreads();
        const int count = static_cast<int>(min(kept.end - start, int64_t{kThreads}));
        for (int k = 0; own && k < count; ++k) {
            const float grad = grads[k];
            if (grad == 0.0f) continue;
            const bool inside = ids[k] >= 0 && ids[k] < a.vocab;
            float w[kWidth] = {};
            if (inside) load_floats<kDType, kWidth>(row_of<kDType>(a.weight, ids[k]) + column, w);
#pragma unroll
            for (int i = 0; i < kWidth; ++i) sums[i] = inside ? fmaf(grad, w[i], sums[i]) : NAN;
        }
        __syncthreads();
    }
    if (own) store_floats<kDType, kWidth>(sums, row_of<kDType>(b.grad_hidden, token) + column);
}

// One warp an id and 32 * kWidth columns of its row; entries are added in their order.
template <int kDType, int kWidth>
__global__ __launch_bounds__(kThreads) void weight_kernel(const KeptSetWeightGradient g,
                                                          int64_t pieces) {
    const int lane = static_cast<int>(threadIdx.x % 32);
    const int64_t unit = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / 32;
    const int64_t id = unit / pieces, piece = unit % pieces;
    if (id >= g.vocab) return;
    const int64_t first = g.offsets[id], last = g.offsets[id + 1];
    if (g.grad_bias && piece == 0) {
        float total = 0.0f;
        for (int64_t i = first + lane; i < last; i += 32) total += g.grad_logits[g.order[i]];
        total = warp_sum(total);
        if (lane == 0) g.grad_bias[id] = total;
    }
    const int64_t column = (piece * 32 + lane) * kWidth;
    if (!g.grad_weight.data || column >= g.hidden_size) return;
    float sums[kWidth] = {};
#pragma unroll 4
    for (int64_t i = first; i < last; ++i) {
        const float grad = g.grad_logits[g.order[i]];
        if (grad == 0.0f) continue;
        float x[kWidth];
        load_floats<kDType, kWidth>(row_of<kDType>(g.hidden, g.tokens[i]) + column, x);
#pragma unroll
        for (int k = 0; k < kWidth; ++k) sums[k] = fmaf(grad, x[k], sums[k]);
    }
    store_floats<kDType, kWidth>(sums, row_of<kDType>(g.grad_weight, id) + column);
}

// Whether every row begins at a multiple of 16 bytes.
template <int kDType>
bool is_aligned(const View& view) {
    return reinterpret_cast<uintptr_t>(view.data) % 16 == 0 &&
           view.stride0 % Element<kDType>::kPerVector == 0;
}

template <int kDType, int kWidth>
void backward(const KeptSetLogprobsBackward& b, Stream stream) {
    const int64_t columns = kThreads * kWidth;
    const int64_t pieces = b.grad_hidden.data ? (b.forward.hidden_size + columns - 1) / columns : 1;
    launch("kept_set_logprobs_backward", stream, b.forward.tokens * pieces, kThreads,
           backward_kernel<kDType, kWidth>, b, static_cast<unsigned>(pieces));
}

template <int kDType, int kWidth>
void weight_gradient(const KeptSetWeightGradient& g, Stream stream) {
    const int64_t columns = 32 * kWidth;
    const int64_t pieces = g.grad_weight.data ? (g.hidden_size + columns - 1) / columns : 1;
    launch("kept_set_weight_gradient", stream, (g.vocab * pieces + kWarps - 1) / kWarps, kThreads,
           weight_kernel<kDType, kWidth>, g, pieces);
}

template <int kDType>
void forward(const KeptSetLogprobs& a, Stream stream) {
    constexpr int kWidth = Element<kDType>::kPerVector;
    const bool wide =
        a.hidden_size % kWidth == 0 && is_aligned<kDType>(a.hidden) && is_aligned<kDType>(a.weight);
    launch("kept_set_logprobs", stream, a.tokens, kThreads,
           wide ? forward_kernel<kDType, kWidth> : forward_kernel<kDType, 1>, a);
}

template <int kDType>
void backward(const KeptSetLogprobsBackward& b, Stream stream) {
    constexpr int kWidth = Element<kDType>::kPerVector;
    const bool wide = b.forward.hidden_size % kWidth == 0 && is_aligned<kDType>(b.forward.weight) &&
                      is_aligned<kDType>(b.grad_hidden);
    wide ? backward<kDType, kWidth>(b, stream) : backward<kDType, 1>(b, stream);
}

template <int kDType>
void weight_gradient(const KeptSetWeightGradient& g, Stream stream) {
    constexpr int kWidth = Element<kDType>::kPerVector;
    const bool wide = g.hidden_size % kWidth == 0 && is_aligned<kDType>(g.hidden) &&
                      is_aligned<kDType>(g.grad_weight);
    wide ? weight_gradient<kDType, kWidth>(g, stream) : weight_gradient<kDType, 1>(g, stream);
}

}  // namespace

void kept_set_logprobs_forward(const KeptSetLogprobs& a, Stream stream) {
    DeviceGuard guard(stream.device, "kept_set_logprobs");
    if (a.tokens == 0) return;
    switch (a.hidden.dtype) {
        case kBFloat16: return forward<kBFloat16>(a, stream);
        case kFloat16: return forward<kFloat16>(a, stream);
        default: return forward<kFloat32>(a, stream);
    }
}

void kept_set_logprobs_backward(const KeptSetLogprobsBackward& b, Stream stream) {
    DeviceGuard guard(stream.device, "kept_set_logprobs_backward");
    if (b.forward.tokens == 0) return;
    switch (b.forward.hidden.dtype) {
        case kBFloat16: return backward<kBFloat16>(b, stream);
        case kFloat16: return backward<kFloat16>(b, stream);
        default: return backward<kFloat32>(b, stream);
    }
}

void kept_set_weight_gradient(const KeptSetWeightGradient& g, Stream stream) {
    DeviceGuard guard(stream.device, "kept_set_weight_gradient");
    if (g.vocab == 0) return;
    switch (g.hidden.dtype) {
        case kBFloat16: return weight_gradient<kBFloat16>(g, stream);
        case kFloat16: return weight_gradient<kFloat16>(g, stream);
        default: return weight_gradient<kFloat32>(g, stream);
    }
}

}  // namespace warpo::cuda
