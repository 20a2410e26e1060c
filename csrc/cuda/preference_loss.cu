// Losses of preferences, of pairs of completions or of completions with a verdict: one launch sums
// the tokens of all completions in slices, a second one finds the losses and gives every token its
// gradient, and its last block merges what the blocks found, in their order.
//
// A slice has the same tokens, added in the same order, however many blocks there are: by the place
// of a token in its completion alone.
#include <algorithm>

#include "cuda/counter.h"
#include "cuda/sequences.h"
#include "math/preference_loss.h"

namespace warpo::cuda {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / 32;
constexpr int kAtOnce = 8;                  // tokens of a thread
constexpr int kSlices = kCompletionSlices;  // one a lane
constexpr int kSliceTokens = 32 * kAtOnce;  // of every kSlices * kSliceTokens
constexpr int kGradientTokens = kThreads * kAtOnce;
constexpr int64_t kManyBlocks = 1024;

// A slice is summed by a warp: what its lanes find.
__device__ __forceinline__ CompletionSums sum_slice(const Completions& a, const Span& s,
                                                    int slice) {
    CompletionSums sums = {0.0f, 0.0f, 0.0f};
    for (int64_t start = int64_t{slice} * kSliceTokens; start < s.count;
         start += kSlices * kSliceTokens) {
        const int64_t t = start + threadIdx.x % 32;
        bool valid[kAtOnce];
        uint32_t logprobs[kAtOnce], refs[kAtOnce];
        load_tokens<32>(logprobs, a.logprobs, s, t, s.count);
        if (a.ref_logprobs.data) load_tokens<32>(refs, a.ref_logprobs, s, t, s.count);
        load_valid<32>(valid, a.mask, s, t, s.count);
#pragma unroll
        for (int i = 0; i < kAtOnce; ++i) {
            if (!valid[i]) continue;
            const float logprob = to_float(a.logprobs, logprobs[i]);
            sums.count += 1.0f;
            sums.logprob += logprob;
            if (a.ref_logprobs.data) sums.ratio += logprob - to_float(a.ref_logprobs, refs[i]);
        }
    }
    return sums;
}

// Block `part` of `parts` of a completion.
__device__ __forceinline__ void sum_slices(const Completions& a, int64_t completions, int64_t index,
                                           float4* out, unsigned part, unsigned parts) {
    const Span s = find_span(a.cu_seqlens, completions, a.steps, index);
    const unsigned warp = threadIdx.x / 32;
    for (unsigned slice = part * kWarps + warp; slice < kSlices; slice += parts * kWarps) {
        const CompletionSums sums = sum_slice(a, s, static_cast<int>(slice));
        const float4 total =
            make_float4(warp_sum(sums.count), warp_sum(sums.logprob), warp_sum(sums.ratio), 0.0f);
        if (threadIdx.x % 32 == 0) out[slice] = total;
    }
}

// Slices of the completions of one side, and then of the other if there is one.
__global__ __launch_bounds__(kThreads) void slices_kernel(const Completions one,
                                                          const Completions other,
                                                          int64_t completions, float4* slices,
                                                          unsigned parts) {
    const int64_t index = blockIdx.x / parts;
    const unsigned part = blockIdx.x % parts;
    float4* const out = slices + index * kSlices;
    if (index < completions) return sum_slices(one, completions, index, out, part, parts);
    sum_slices(other, completions, index - completions, out, part, parts);
}

// In every thread. `weight` becomes NaN where the completion is malformed.
__device__ __forceinline__ CompletionSums sum_completion(const Completions& a, const Span& s,
                                                         const float4* slices, float& weight) {
    weight = poison_if(s.malformed, weight);
    const float4 own = slices[threadIdx.x % kSlices];
    CompletionSums sums = {warp_sum(own.x), warp_sum(own.y), 0.0f};
    sums.ratio = a.ref_logprobs.data ? warp_sum(own.z) : sums.logprob;
    return sums;
}

// All valid tokens of a completion have the same gradient.
__device__ __forceinline__ void write_gradient(const Completions& a, const Span& s, float gradient,
                                               unsigned part, unsigned parts) {
    if (!a.grad_logprobs) return;
    for (int64_t start = int64_t{part} * kGradientTokens; start < s.count;
         start += int64_t{parts} * kGradientTokens) {
        const int64_t t = start + threadIdx.x;
        bool valid[kAtOnce];
        load_valid<kThreads>(valid, a.mask, s, t, s.count);
#pragma unroll
        for (int i = 0; i < kAtOnce; ++i) {
            const int64_t step = t + i * kThreads;
            if (step < s.count) a.grad_logprobs[s.offset + step] = valid[i] ? gradient : 0.0f;
        }
    }
}

// Of a launch: `rows` sequences of `parts` blocks each; blocks: all, and 1 without a sequence.
struct Grid {
    int64_t rows;
    unsigned parts, blocks;
};

Grid grid_of(int64_t rows, int64_t steps, int64_t tokens) {
    const int64_t tiles = (steps + tokens - 1) / tokens;
    const int64_t parts =
        std::max<int64_t>(1, std::min(tiles, kManyBlocks / std::max<int64_t>(rows, 1)));
    return {rows, static_cast<unsigned>(parts),
            static_cast<unsigned>(std::max<int64_t>(rows * parts, 1))};
}

__device__ __forceinline__ void find_pair(const PreferenceLoss& a, const float4* slices,
                                          float* rows, int64_t pair, unsigned part,
                                          unsigned parts) {
    const Span one = find_span(a.chosen.cu_seqlens, a.pairs, a.chosen.steps, pair);
    const Span other = find_span(a.rejected.cu_seqlens, a.pairs, a.rejected.steps, pair);
    float weight = inverse_or_zero(value_of(a.denominator));
    const CompletionSums chosen = sum_completion(a.chosen, one, slices + pair * kSlices, weight);
    const CompletionSums rejected =
        sum_completion(a.rejected, other, slices + (a.pairs + pair) * kSlices, weight);
    const bool counts = chosen.count > 0.0f && rejected.count > 0.0f;
    PreferenceTerm term = {};
    if (counts) term = preference_term(a, chosen, rejected);
    write_gradient(a.chosen, one, weighted(weight, term.grad_chosen), part, parts);
    write_gradient(a.rejected, other, weighted(weight, term.grad_rejected), part, parts);
    if (part != 0 || threadIdx.x != 0) return;
    float* const out = rows + pair * kNumPreferenceMetrics;
    out[kPreferenceLoss] = weighted(weight, term.loss);
    out[kPreferencePairs] = counts ? 1.0f : 0.0f;
    out[kPreferenceCorrect] = term.chosen_reward > term.rejected_reward ? 1.0f : 0.0f;
    out[kChosenReward] = term.chosen_reward;
    out[kRejectedReward] = term.rejected_reward;
    out[kChosenLogprob] = counts ? chosen.logprob : 0.0f;
    out[kRejectedLogprob] = counts ? rejected.logprob : 0.0f;
    out[kChosenNll] = term.nll;
}

__global__ __launch_bounds__(kThreads) void pair_kernel(const PreferenceLoss a, Grid grid,
                                                        unsigned* counter) {
    const float4* const slices = reinterpret_cast<const float4*>(a.partials);
    float* const rows = a.partials + 2 * a.pairs * kSlices * 4;
    const int64_t pair = blockIdx.x / grid.parts;
    if (pair < a.pairs) find_pair(a, slices, rows, pair, blockIdx.x % grid.parts, grid.parts);
    if (!last_block(counter, grid.blocks)) return;
    merge_rows<kWarps, kNumPreferenceMetrics, 0, kNumPreferenceMetrics>(rows, a.pairs, a.loss,
                                                                        a.metrics);
}

__device__ __forceinline__ void find_example(const KtoLoss& a, const float4* slices, float* rows,
                                             int64_t example, unsigned part, unsigned parts) {
    const Span s = find_span(a.completions.cu_seqlens, a.examples, a.completions.steps, example);
    float weight = inverse_or_zero(value_of(a.denominator));
    const CompletionSums sums =
        sum_completion(a.completions, s, slices + example * kSlices, weight);
    const bool desirable = load_flag(a.desirable, 0, example), counts = sums.count > 0.0f;
    KtoTerm term = {0.0f, 0.0f, 0.0f};
    if (counts) term = kto_term(a, *a.kl, desirable, sums.ratio);
    write_gradient(a.completions, s, weighted(weight, term.grad), part, parts);
    if (part != 0 || threadIdx.x != 0) return;
    const float count = counts ? 1.0f : 0.0f, logprob = counts ? sums.logprob : 0.0f;
    float* const out = rows + example * kNumKtoMetrics;
    out[kKtoLoss] = weighted(weight, term.loss);
    out[kDesirable] = desirable ? count : 0.0f;
    out[kUndesirable] = desirable ? 0.0f : count;
    out[kDesirableReward] = desirable ? term.reward : 0.0f;
    out[kUndesirableReward] = desirable ? 0.0f : term.reward;
    out[kDesirableLogprob] = desirable ? logprob : 0.0f;
    out[kUndesirableLogprob] = desirable ? 0.0f : logprob;
}

__global__ __launch_bounds__(kThreads) void kto_kernel(const KtoLoss a, Grid grid,
                                                       unsigned* counter) {
    const float4* const slices = reinterpret_cast<const float4*>(a.partials);
    float* const rows = a.partials + a.examples * kSlices * 4;
    const int64_t example = blockIdx.x / grid.parts;
    if (example < a.examples)
        find_example(a, slices, rows, example, blockIdx.x % grid.parts, grid.parts);
    if (!last_block(counter, grid.blocks)) return;
    merge_rows<kWarps, kNumKtoMetrics, 0, kNumKtoMetrics>(rows, a.examples, a.loss, a.metrics);
}

// `sides` of one or two, of as many completions each.
void launch_slices(const char* operation, Stream stream, const Completions& one,
                   const Completions& other, int64_t sides, int64_t completions, float* partials) {
    if (completions == 0) return;
    const int64_t steps = std::max(one.steps, other.steps);
    Grid grid = grid_of(sides * completions, steps, kWarps * kSliceTokens);
    grid.parts = std::min<unsigned>(grid.parts, kSlices / kWarps);
    launch(operation, stream, grid.rows * grid.parts, kThreads, slices_kernel, one, other,
           completions, reinterpret_cast<float4*>(partials), grid.parts);
}

}  // namespace

void preference_loss(const PreferenceLoss& a, Stream stream) {
    DeviceGuard guard(stream.device, "preference_loss");
    launch_slices("preference_loss", stream, a.chosen, a.rejected, 2, a.pairs, a.partials);
    const int64_t steps = std::max(a.chosen.steps, a.rejected.steps);
    const Grid grid = grid_of(a.pairs, steps, kGradientTokens);
    launch("preference_loss", stream, grid.blocks, kThreads, pair_kernel, a, grid,
           counter_of(stream, "preference_loss"));
}

void kto_loss(const KtoLoss& a, Stream stream) {
    DeviceGuard guard(stream.device, "kto_loss");
    launch_slices("kto_loss", stream, a.completions, a.completions, 1, a.examples, a.partials);
    const Grid grid = grid_of(a.examples, a.completions.steps, kGradientTokens);
    launch("kto_loss", stream, grid.blocks, kThreads, kto_kernel, a, grid,
           counter_of(stream, "kto_loss"));
}

}  // namespace warpo::cuda
