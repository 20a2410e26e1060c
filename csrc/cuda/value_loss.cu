// Clipped value loss: a block a sequence, or a part of one where sequences are few and long, gives
// gradients and partial results; the last one merges them in the order of the sequences.
//
// No gradient depends on the number of parts: of its sequence it needs the count of valid tokens,
// which each block finds for itself.
#include <algorithm>

#include "cuda/counter.h"
#include "cuda/sequences.h"
#include "math/moments.h"
#include "math/value_loss.h"

namespace warpo::cuda {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / 32;
constexpr int kAtOnce = 4;  // tokens of a thread
constexpr int kTile = kAtOnce * kThreads;
constexpr int kFlagsAtOnce = 16;

struct Sums {
    float loss, clipped;
    Moments<float> returns, errors;  // of the same tokens
};

__device__ __forceinline__ void add(Moments<float>& m, float x) {
    const float difference = x - m.mean;
    m.count += 1.0f;
    m.mean += difference / m.count;
    m.squares = fmaf(difference, x - m.mean, m.squares);
}

__device__ __forceinline__ float count_valid(const View& mask, const Span& s, float* scratch) {
    if (!mask.data) return static_cast<float>(s.count);
    float count = 0.0f;
    for (int64_t t = threadIdx.x; t < s.count; t += kFlagsAtOnce * kThreads) {
        bool valid[kFlagsAtOnce];
        load_valid<kThreads>(valid, mask, s, t, s.count);
#pragma unroll
        for (int i = 0; i < kFlagsAtOnce; ++i) count += valid[i] ? 1.0f : 0.0f;
    }
    return block_sum<kWarps>(count, scratch);
}

// Tokens t, t + kThreads, ...: their gradients, and their part of the sums.
__device__ __forceinline__ void add_tokens(Sums& sums, const ValueLoss& a, const Span& s, int64_t t,
                                           float weight) {
    bool valid[kAtOnce];
    uint32_t values[kAtOnce], olds[kAtOnce], targets[kAtOnce];
    load_tokens<kThreads>(values, a.values, s, t, s.count);
    load_tokens<kThreads>(targets, a.returns, s, t, s.count);
    if (a.old_values.data) load_tokens<kThreads>(olds, a.old_values, s, t, s.count);
    load_valid<kThreads>(valid, a.mask, s, t, s.count);
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
        float derivative = 0.0f;
        if (valid[i]) {
            const float value = to_float(a.values, values[i]);
            const float old = a.old_values.data ? to_float(a.old_values, olds[i]) : value;
            const float target = to_float(a.returns, targets[i]);
            const ValueTerm term =
                clipped_value_loss(value, old, target, a.clip_range, a.huber_delta);
            derivative = weighted(weight, term.derivative);
            sums.loss += term.loss;
            sums.clipped += term.clipped;
            add(sums.returns, target);
            add(sums.errors, target - value);
        }
        const int64_t step = t + i * kThreads;
        if (a.grad_values && step < s.count) a.grad_values[s.offset + step] = derivative;
    }
}

__device__ __forceinline__ Moments<float> merge_down(const Moments<float>& m, int lanes) {
    return merge(
        m, {__shfl_down_sync(kAllLanes, m.count, lanes), __shfl_down_sync(kAllLanes, m.mean, lanes),
            __shfl_down_sync(kAllLanes, m.squares, lanes)});
}

// The sums of the first 2 * lanes lanes, in lane 0.
__device__ __forceinline__ void merge_lanes(Sums& sums, int lanes) {
#pragma unroll
    for (; lanes > 0; lanes >>= 1) {
        sums.loss += __shfl_down_sync(kAllLanes, sums.loss, lanes);
        sums.clipped += __shfl_down_sync(kAllLanes, sums.clipped, lanes);
        sums.returns = merge_down(sums.returns, lanes);
        sums.errors = merge_down(sums.errors, lanes);
    }
}

__device__ __forceinline__ void write_part(const ValueLoss& a, unsigned parts) {
    __shared__ float scratch[kWarps];
    __shared__ Sums of_warps[kWarps];
    const Span s = find_span(a.cu_seqlens, a.sequences, a.steps, blockIdx.x / parts);
    float weight = inverse_or_zero(value_of(a.denominator));
    if (a.sequence_mean) {
        const float count = count_valid(a.mask, s, scratch);
        weight *= count > 0.0f ? 1.0f / count : 1.0f;
    }
    weight = poison_if(s.malformed, weight);

    Sums sums = {};
    for (int64_t start = int64_t{blockIdx.x % parts} * kTile; start < s.count;
         start += int64_t{parts} * kTile)
        add_tokens(sums, a, s, start + threadIdx.x, weight);
    merge_lanes(sums, 16);
    const int warp = static_cast<int>(threadIdx.x / 32), lane = static_cast<int>(threadIdx.x % 32);
    if (lane == 0) of_warps[warp] = sums;
    __syncthreads();
    if (warp != 0) return;
    sums = of_warps[lane % kWarps];
    merge_lanes(sums, kWarps / 2);
    if (lane != 0) return;
    float* const out = a.partials + static_cast<int64_t>(blockIdx.x) * kNumValueMetrics;
    out[kValueLoss] = weighted(weight, sums.loss);
    out[kValueTokens] = sums.returns.count;
    out[kValueClipped] = sums.clipped;
    out[kReturnMean] = sums.returns.mean;
    out[kReturnM2] = sums.returns.squares;
    out[kErrorMean] = sums.errors.mean;
    out[kErrorM2] = sums.errors.squares;
}

// rows: sequences * parts. blocks: as many, and 1 without a sequence.
__global__ __launch_bounds__(kThreads) void value_loss_kernel(const ValueLoss a, unsigned parts,
                                                              unsigned rows, unsigned blocks,
                                                              unsigned* counter) {
    if (blockIdx.x < rows) write_part(a, parts);
    if (!last_block(counter, blocks)) return;
    merge_rows<kWarps, kNumValueMetrics, kValueTokens, kReturnMean>(a.partials, rows, a.loss,
                                                                    a.metrics);
}

}  // namespace

void value_loss(const ValueLoss& a, Stream stream) {
    DeviceGuard guard(stream.device, "value_loss");
    const int64_t tiles = (a.steps + kTile - 1) / kTile;
    const int64_t wanted = a.sequences > 0 ? std::min(kMinValuePartials / a.sequences, tiles) : 1;
    const int64_t parts = std::max<int64_t>(wanted, 1), rows = a.sequences * parts;
    const int64_t blocks = std::max<int64_t>(rows, 1);
    launch("value_loss", stream, blocks, kThreads, value_loss_kernel, a,
           static_cast<unsigned>(parts), static_cast<unsigned>(rows), static_cast<unsigned>(blocks),
           counter_of(stream, "value_loss"));
}

}  // namespace warpo::cuda
