// One number from the values of sequences, and its gradient: a launch for the sums of parts, and one
// block that adds those up in their order.
#include "cuda/device.h"
#include "cuda/launch.h"
#include "math/aggregate.h"

namespace warpo::cuda {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / 32;
constexpr int64_t kPart = 4 * kThreads;
constexpr int kReduceThreads = 512, kReduceWarps = kReduceThreads / 32;

__device__ __forceinline__ TokenRange own_range(const Aggregate& a, int64_t parts) {
    return tokens_of_part(a, blockIdx.x / parts, blockIdx.x % parts, parts);
}

__device__ __forceinline__ float load_weight(const View& mask, const TokenRange& range, int64_t t) {
    if (!mask.data) return 1.0f;
    if (mask.dtype == kFloat32) return weight_of(load_float32(mask, range.row, range.first + t));
    return load_flag(mask, range.row, range.first + t) ? 1.0f : 0.0f;
}

__global__ __launch_bounds__(kThreads) void sum_kernel(const Aggregate a, int64_t parts) {
    __shared__ float scratch[kWarps];
    const TokenRange range = own_range(a, parts);
    float sum = 0.0f, tokens = 0.0f;
#pragma unroll 4
    for (int64_t t = threadIdx.x; t < range.count; t += kThreads) {
        const float weight = load_weight(a.mask, range, t);
        if (weight == 0.0f) continue;
        sum = fmaf(weight, load_float(a.values, range.row, range.first + t), sum);
        tokens += weight;
    }
    sum = block_sum<kWarps>(sum, scratch);
    tokens = block_sum<kWarps>(tokens, scratch);
    if (threadIdx.x != 0) return;
    float* const partial = partials_of(a) + 2 * static_cast<int64_t>(blockIdx.x);
    partial[0] = range.malformed ? NAN : sum, partial[1] = tokens;
}

// One block. A warp takes a sequence of several parts, a thread one of a single part.
__global__ __launch_bounds__(kReduceThreads) void reduce_kernel(const Aggregate a, int64_t parts) {
    __shared__ float scratch[kReduceWarps];
    const float* const partials = partials_of(a);
    float tokens = 0.0f;
    for (int64_t p = threadIdx.x; p < a.sequences * parts; p += kReduceThreads)
        tokens += partials[2 * p + 1];
    const float inverse = inverse_denominator(a, block_sum<kReduceWarps>(tokens, scratch));
    const int lanes = parts > 1 ? 32 : 1, lane = static_cast<int>(threadIdx.x) % lanes;
    float result = 0.0f;
    for (int64_t b = threadIdx.x / lanes; b < a.sequences; b += kReduceThreads / lanes) {
        float sum = 0.0f, own = 0.0f;
        for (int64_t p = lane; p < parts; p += lanes) {
            const float* const partial = partials + 2 * (b * parts + p);
            sum += partial[0];
            own += partial[1];
        }
        if (lanes > 1) {
            sum = warp_sum(sum);
            own = warp_sum(own);
        }
        if (lane != 0) continue;
        const float weight = sequence_weight(a, inverse, own);
        a.weights[b] = weight;
        result += weighted(weight, sum);
    }
    result = block_sum<kReduceWarps>(result, scratch);
    if (threadIdx.x == 0) *a.result = result;
}

__device__ __forceinline__ void zero(const View& view, int64_t first, int64_t end) {
    for (int64_t t = first + threadIdx.x; t < end; t += kThreads) store_as(view, t, 0.0f);
}

__global__ __launch_bounds__(kThreads) void gradient_kernel(const AggregateBackward a,
                                                            int64_t parts) {
    const int64_t sequence = blockIdx.x / parts;
    const TokenRange range = tokens_of_part(a, sequence, blockIdx.x % parts, parts);
    const float value = range.malformed ? NAN : a.weights[sequence] * *a.grad;
    const int64_t last = a.sequences * parts - 1;
    if (a.cu_seqlens && !range.malformed) {
        // tokens that belong to no sequence
        if (blockIdx.x == 0) zero(a.grad_values, 0, a.cu_seqlens[0]);
        if (blockIdx.x == last) zero(a.grad_values, a.cu_seqlens[a.sequences], a.steps);
    }
#pragma unroll 4
    for (int64_t t = threadIdx.x; t < range.count; t += kThreads) {
        const float weight = load_weight(a.mask, range, t);
        store_as(a.grad_values, range.offset + t, weight != 0.0f ? weight * value : 0.0f);
    }
}

}  // namespace

void aggregate_forward(const Aggregate& a, Stream stream) {
    DeviceGuard guard(stream.device, "aggregate");
    const int64_t parts = parts_per_sequence(a, kPart);
    if (a.sequences > 0)
        launch("aggregate", stream, a.sequences * parts, kThreads, sum_kernel, a, parts);
    launch("aggregate", stream, 1, kReduceThreads, reduce_kernel, a, parts);
}

void aggregate_backward(const AggregateBackward& a, Stream stream) {
    DeviceGuard guard(stream.device, "aggregate_backward");
    if (a.sequences == 0) return;
    const int64_t parts = parts_per_sequence(a, kPart);
    launch("aggregate_backward", stream, a.sequences * parts, kThreads, gradient_kernel, a, parts);
}

}  // namespace warpo::cuda
