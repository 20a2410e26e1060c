// Losses of preferences: one block a pair of completions or a completion with a verdict sums its
// tokens, finds the loss and gives every token its gradient; a second launch merges what the blocks
// found, in their order.
#include "cuda/sequences.h"
#include "math/preference_loss.h"

namespace warpo::cuda {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / 32;

// In every thread of the block. `weight` becomes NaN where the completion is malformed.
__device__ __forceinline__ CompletionSums sum_completion(const Completions& a, int64_t completions,
                                                         int64_t index, float* scratch,
                                                         float& weight) {
    const Span s = find_span(a.cu_seqlens, completions, a.steps, index);
    weight = poison_if(s.malformed, weight);
    CompletionSums sums = {0.0f, 0.0f, 0.0f};
    for (int64_t t = threadIdx.x; t < s.count; t += kThreads) {
        if (!is_valid(a.mask, s, t)) continue;
        const float logp = load_token(a.logprobs, s, t);
        sums.count += 1.0f;
        sums.logprob += logp;
        if (a.ref_logprobs.data) sums.ratio += logp - load_token(a.ref_logprobs, s, t);
    }
    sums.count = block_sum<kWarps>(sums.count, scratch);
    sums.logprob = block_sum<kWarps>(sums.logprob, scratch);
    sums.ratio = a.ref_logprobs.data ? block_sum<kWarps>(sums.ratio, scratch) : sums.logprob;
    return sums;
}

// All valid tokens of a completion have the same gradient.
__device__ __forceinline__ void write_gradient(const Completions& a, int64_t completions,
                                               int64_t index, float gradient) {
    if (!a.grad_logprobs) return;
    const Span s = find_span(a.cu_seqlens, completions, a.steps, index);
    for (int64_t t = threadIdx.x; t < s.count; t += kThreads) {
        a.grad_logprobs[s.offset + t] = is_valid(a.mask, s, t) ? gradient : 0.0f;
    }
}

__global__ __launch_bounds__(kThreads) void pair_kernel(const PreferenceLoss a) {
    __shared__ float scratch[kWarps];
    const int64_t pair = blockIdx.x;
    float weight = inverse_or_zero(*a.denominator);
    const CompletionSums chosen = sum_completion(a.chosen, a.pairs, pair, scratch, weight);
    const CompletionSums rejected = sum_completion(a.rejected, a.pairs, pair, scratch, weight);
    const bool counts = chosen.count > 0.0f && rejected.count > 0.0f;
    PreferenceTerm term = {};
    if (counts) term = preference_term(a, chosen, rejected);
    write_gradient(a.chosen, a.pairs, pair, weighted(weight, term.grad_chosen));
    write_gradient(a.rejected, a.pairs, pair, weighted(weight, term.grad_rejected));
    if (threadIdx.x != 0) return;
    float* const out = a.partials + pair * kNumPreferenceMetrics;
    out[kPreferenceLoss] = weighted(weight, term.loss);
    out[kPreferencePairs] = counts ? 1.0f : 0.0f;
    out[kPreferenceCorrect] = term.chosen_reward > term.rejected_reward ? 1.0f : 0.0f;
    out[kChosenReward] = term.chosen_reward;
    out[kRejectedReward] = term.rejected_reward;
    out[kChosenLogprob] = counts ? chosen.logprob : 0.0f;
    out[kRejectedLogprob] = counts ? rejected.logprob : 0.0f;
    out[kChosenNll] = term.nll;
}

__global__ __launch_bounds__(kThreads) void kto_kernel(const KtoLoss a) {
    __shared__ float scratch[kWarps];
    const int64_t example = blockIdx.x;
    float weight = inverse_or_zero(*a.denominator);
    const CompletionSums sums = sum_completion(a.completions, a.examples, example, scratch, weight);
    const bool desirable = load_flag(a.desirable, 0, example), counts = sums.count > 0.0f;
    KtoTerm term = {0.0f, 0.0f, 0.0f};
    if (counts) term = kto_term(a, *a.kl, desirable, sums.ratio);
    write_gradient(a.completions, a.examples, example, weighted(weight, term.grad));
    if (threadIdx.x != 0) return;
    const float count = counts ? 1.0f : 0.0f, logprob = counts ? sums.logprob : 0.0f;
    float* const out = a.partials + example * kNumKtoMetrics;
    out[kKtoLoss] = weighted(weight, term.loss);
    out[kDesirable] = desirable ? count : 0.0f;
    out[kUndesirable] = desirable ? 0.0f : count;
    out[kDesirableReward] = desirable ? term.reward : 0.0f;
    out[kUndesirableReward] = desirable ? 0.0f : term.reward;
    out[kDesirableLogprob] = desirable ? logprob : 0.0f;
    out[kUndesirableLogprob] = desirable ? 0.0f : logprob;
}

}  // namespace

void preference_loss(const PreferenceLoss& a, Stream stream) {
    DeviceGuard guard(stream.device, "preference_loss");
    if (a.pairs > 0) launch("preference_loss", stream, a.pairs, kThreads, pair_kernel, a);
    launch_merge<kNumPreferenceMetrics, 0, kNumPreferenceMetrics>(
        "preference_loss", stream, a.partials, a.pairs, a.loss, a.metrics);
}

void kto_loss(const KtoLoss& a, Stream stream) {
    DeviceGuard guard(stream.device, "kto_loss");
    if (a.examples > 0) launch("kto_loss", stream, a.examples, kThreads, kto_kernel, a);
    launch_merge<kNumKtoMetrics, 0, kNumKtoMetrics>("kto_loss", stream, a.partials, a.examples,
                                                    a.loss, a.metrics);
}

}  // namespace warpo::cuda
