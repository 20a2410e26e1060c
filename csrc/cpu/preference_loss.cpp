// Losses of preferences: pairs of completions, and completions with a verdict.
#include "math/preference_loss.h"

#include "cpu/cpu.h"
#include "cpu/sequences.h"

namespace warpo::cpu::WARPO_ISA {
namespace {

struct Tile {
    alignas(64) float logp[kTile], ref[kTile];
    alignas(64) int32_t keep[kTile];
};

// Up to so many tokens, sums that are already taken among them, the loops over tiles cost more than
// they save.
constexpr int kShort = 8;

CompletionSums sum_short_completion(const Completions& a, const Span& span) {
    double count = 0, logprob = 0, ratio = 0;
    for (int64_t step = span.first; step < span.first + span.count; ++step) {
        if (!element<uint8_t>(a.mask, span.row, step, 1)) continue;
        const double logp = load_one(a.logprobs, span.row, step);
        count += 1;
        logprob += logp;
        ratio += a.ref_logprobs.data ? logp - load_one(a.ref_logprobs, span.row, step) : logp;
    }
    return {(float)count, (float)logprob, (float)ratio};
}

CompletionSums sum_completion(const Completions& a, int64_t index) {
    const Span span = find_span(a.cu_seqlens, a.steps, index);
    if (span.count <= kShort) return sum_short_completion(a, span);
    Tile tile;
    double count = 0, logprob = 0, ratio = 0;
    for (int64_t start = 0; start < span.count; start += kTile) {
        const int size = tile_count(span, start);
        count += load_keep(a.mask, span, start, size, tile.keep);
        load_kept(a.logprobs, span, start, size, tile.keep, tile.logp);
        float sum = 0, difference = 0;
#pragma omp simd reduction(+ : sum)
        for (int i = 0; i < size; ++i) sum += tile.logp[i];
        logprob += sum;
        if (!a.ref_logprobs.data) continue;
        load_kept(a.ref_logprobs, span, start, size, tile.keep, tile.ref);
#pragma omp simd reduction(+ : difference)
        for (int i = 0; i < size; ++i) difference += tile.logp[i] - tile.ref[i];
        ratio += difference;
    }
    return {(float)count, (float)logprob, (float)(a.ref_logprobs.data ? ratio : logprob)};
}

// All valid tokens of a completion have the same gradient.
void write_gradient(const Completions& a, int64_t index, float gradient) {
    if (!a.grad_logprobs) return;
    const Span span = find_span(a.cu_seqlens, a.steps, index);
    int32_t keep[kTile];
    for (int64_t start = 0; start < span.count; start += kTile) {
        const int size = tile_count(span, start);
        float* out = a.grad_logprobs + span.offset + start;
        load_keep(a.mask, span, start, size, keep);
        for (int i = 0; i < size; ++i) out[i] = keep[i] ? gradient : 0.0f;
    }
}

void one_pair(const PreferenceLoss& a, int64_t pair) {
    const float weight = inverse_or_zero(value_of(a.denominator));
    const CompletionSums chosen = sum_completion(a.chosen, pair);
    const CompletionSums rejected = sum_completion(a.rejected, pair);
    float* out = a.partials + pair * kNumPreferenceMetrics;
    PreferenceTerm term = {};
    const bool counts = chosen.count > 0 && rejected.count > 0;
    if (counts) term = preference_term(a, chosen, rejected);
    out[kPreferenceLoss] = weighted(weight, term.loss);
    out[kPreferencePairs] = counts;
    out[kPreferenceCorrect] = term.chosen_reward > term.rejected_reward;
    out[kChosenReward] = term.chosen_reward;
    out[kRejectedReward] = term.rejected_reward;
    out[kChosenLogprob] = counts ? chosen.logprob : 0.0f;
    out[kRejectedLogprob] = counts ? rejected.logprob : 0.0f;
    out[kChosenNll] = term.nll;
    write_gradient(a.chosen, pair, weighted(weight, term.grad_chosen));
    write_gradient(a.rejected, pair, weighted(weight, term.grad_rejected));
}

void one_example(const KtoLoss& a, int64_t example) {
    const float weight = inverse_or_zero(value_of(a.denominator));
    const CompletionSums sums = sum_completion(a.completions, example);
    const bool desirable = *address<uint8_t>(a.desirable, 0, example) != 0, counts = sums.count > 0;
    KtoTerm term = {0, 0, 0};
    if (counts) term = kto_term(a, *a.kl, desirable, sums.ratio);
    float* out = a.partials + example * kNumKtoMetrics;
    for (int m = 0; m < kNumKtoMetrics; ++m) out[m] = 0;
    out[kKtoLoss] = weighted(weight, term.loss);
    out[desirable ? kDesirable : kUndesirable] = counts;
    out[desirable ? kDesirableReward : kUndesirableReward] = term.reward;
    out[desirable ? kDesirableLogprob : kUndesirableLogprob] = counts ? sums.logprob : 0.0f;
    write_gradient(a.completions, example, weighted(weight, term.grad));
}

int64_t work_of(const Completions& a, int64_t completions) {
    return a.cu_seqlens ? a.steps : completions * a.steps;
}

}  // namespace

void preference_loss(const PreferenceLoss& a) {
#pragma omp parallel for schedule(dynamic) if (work_of(a.chosen, a.pairs) >= kParallelWork)
    for (int64_t pair = 0; pair < a.pairs; ++pair) one_pair(a, pair);
    merge_partials<kNumPreferenceMetrics, 0, kNumPreferenceMetrics>(a.partials, a.pairs, a.loss,
                                                                    a.metrics);
}

void kto_loss(const KtoLoss& a) {
#pragma omp parallel for schedule(dynamic) if (work_of(a.completions, a.examples) >= kParallelWork)
    for (int64_t example = 0; example < a.examples; ++example) one_example(a, example);
    merge_partials<kNumKtoMetrics, 0, kNumKtoMetrics>(a.partials, a.examples, a.loss, a.metrics);
}

}  // namespace warpo::cpu::WARPO_ISA
