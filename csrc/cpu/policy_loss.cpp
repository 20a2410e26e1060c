// Clipped surrogate and KL: loss, metrics and gradient in one call.
#include "math/policy_loss.h"

#include <math.h>

#include "cpu/cpu.h"
#include "cpu/load.h"

namespace warpo::cpu::WARPO_ISA {
namespace {

constexpr int kTile = 256;

struct Tile {
    alignas(64) float logp[kTile], old[kTile], advantage[kTile], ref[kTile], log_ratio[kTile];
    alignas(64) float surrogate_grad[kTile], kl_grad[kTile];
    alignas(64) int32_t keep[kTile];
};

struct Sums {
    double policy = 0, kl = 0, low = 0, high = 0, ratio = 0, approx_kl = 0, surrogate_grad = 0;
    float ratio_min = INFINITY, ratio_max = -INFINITY;
};

// The tokens of one sequence: steps [first, first + count) of a row of the views, and where their
// gradients lie.
struct Span {
    int64_t row, first, count;
    float* grad;
};

Span span_of(const PolicyLoss& a, int64_t sequence) {
    const int64_t first = a.cu_seqlens ? a.cu_seqlens[sequence] : 0;
    const int64_t count = a.cu_seqlens ? a.cu_seqlens[sequence + 1] - first : a.steps;
    const int64_t offset = a.cu_seqlens ? first : sequence * a.steps;
    return {sequence, first, count, a.grad_logprobs ? a.grad_logprobs + offset : nullptr};
}

int tile_count(const Span& span, int64_t start) {
    return span.count - start < kTile ? (int)(span.count - start) : kTile;
}

void load_keep(const PolicyLoss& a, const Span& span, int64_t start, int count, int32_t* keep) {
    const uint8_t* mask =
        a.mask.data ? address<uint8_t>(a.mask, span.row, span.first + start) : nullptr;
    for (int i = 0; i < count; ++i) keep[i] = mask ? mask[i * a.mask.stride1] != 0 : 1;
}

// Masked elements become 0, whatever they hold.
void load_kept(const View& view, const Span& span, int64_t start, int count, const int32_t* keep,
               float* out) {
    load_steps(view, span.row, span.first + start, count, out);
#pragma omp simd
    for (int i = 0; i < count; ++i) out[i] = keep[i] ? out[i] : 0.0f;
}

void load_tile(const PolicyLoss& a, const Span& span, int64_t start, int count, Tile& tile) {
    load_keep(a, span, start, count, tile.keep);
    load_kept(a.logprobs, span, start, count, tile.keep, tile.logp);
    load_kept(a.old_logprobs, span, start, count, tile.keep, tile.old);
    load_kept(a.advantages, span, start, count, tile.keep, tile.advantage);
    if (a.kl != kNoKl) load_kept(a.ref_logprobs, span, start, count, tile.keep, tile.ref);
}

int64_t count_valid(const PolicyLoss& a, const Span& span) {
    if (!a.mask.data) return span.count;
    const uint8_t* mask = address<uint8_t>(a.mask, span.row, span.first);
    int64_t valid = 0;
    for (int64_t i = 0; i < span.count; ++i) valid += mask[i * a.mask.stride1] != 0;
    return valid;
}

float mean_log_ratio(const PolicyLoss& a, const Span& span, int64_t valid, Tile& tile) {
    double total = 0;
    for (int64_t start = 0; start < span.count; start += kTile) {
        const int count = tile_count(span, start);
        load_keep(a, span, start, count, tile.keep);
        load_kept(a.logprobs, span, start, count, tile.keep, tile.logp);
        load_kept(a.old_logprobs, span, start, count, tile.keep, tile.old);
        float sum = 0;
#pragma omp simd reduction(+ : sum)
        for (int i = 0; i < count; ++i) sum += tile.logp[i] - tile.old[i];
        total += sum;
    }
    return (float)(total / (double)(valid > 0 ? valid : 1));
}

// Sums of the tile, and the gradients of surrogate and KL before any weight.
template <int kKl>
void evaluate(const PolicyLoss& a, int count, Tile& tile, Sums& sums) {
    const float limit = a.log_ratio_limit, ratio_low = a.ratio_low, ratio_high = a.ratio_high;
    float policy = 0, kl = 0, low = 0, high = 0, total = 0, approx_kl = 0, grad = 0;
    float smallest = INFINITY, largest = -INFINITY;
#pragma omp simd reduction(+ : policy, kl, low, high, total, approx_kl, grad) \
    reduction(min : smallest) reduction(max : largest)
    for (int i = 0; i < count; ++i) {
        const bool keep = tile.keep[i];
        const float bounded = clamp_symmetric(tile.log_ratio[i], limit);
        const float ratio = exp_f32(bounded);
        const Surrogate s = clipped_surrogate(ratio, tile.advantage[i], ratio_low, ratio_high);
        const float derivative = is_outside(tile.log_ratio[i], limit) ? 0.0f : s.derivative;
        tile.surrogate_grad[i] = keep ? -derivative : 0.0f;
        policy -= keep ? s.value : 0.0f;
        low += keep ? s.clipped_low : 0.0f;
        high += keep ? s.clipped_high : 0.0f;
        total += keep ? ratio : 0.0f;
        approx_kl += keep ? exp_minus_1_minus_x(bounded) : 0.0f;
        grad += keep ? -derivative : 0.0f;
        const float ratio_or_inf = keep ? ratio : INFINITY,
                    ratio_or_minus_inf = keep ? ratio : -INFINITY;
        smallest = ratio_or_inf < smallest ? ratio_or_inf : smallest;
        largest = ratio_or_minus_inf > largest ? ratio_or_minus_inf : largest;
        if (kKl != kNoKl) {
            const KlTerm term = kl_estimate(tile.logp[i], tile.ref[i], kKl, limit);
            tile.kl_grad[i] = keep ? term.derivative : 0.0f;
            kl += keep ? term.value : 0.0f;
        }
    }
    sums.policy += policy;
    sums.kl += kl;
    sums.low += low;
    sums.high += high;
    sums.ratio += total;
    sums.approx_kl += approx_kl;
    sums.surrogate_grad += grad;
    sums.ratio_min = smallest < sums.ratio_min ? smallest : sums.ratio_min;
    sums.ratio_max = largest > sums.ratio_max ? largest : sums.ratio_max;
}

void evaluate(const PolicyLoss& a, int count, Tile& tile, Sums& sums) {
    switch (a.kl) {
        case kNoKl: return evaluate<kNoKl>(a, count, tile, sums);
        case kK1: return evaluate<kK1>(a, count, tile, sums);
        case kK2: return evaluate<kK2>(a, count, tile, sums);
        default: return evaluate<kK3>(a, count, tile, sums);
    }
}

void write_partials(const Sums& sums, int64_t valid, float weight, float* out) {
    out[kPolicyLoss] = (float)(sums.policy * weight);
    out[kKlLoss] = (float)(sums.kl * weight);
    out[kTokens] = (float)valid;
    out[kClippedLow] = (float)sums.low;
    out[kClippedHigh] = (float)sums.high;
    out[kRatio] = (float)sums.ratio;
    out[kRatioMin] = sums.ratio_min;
    out[kRatioMax] = sums.ratio_max;
    out[kApproxKl] = (float)sums.approx_kl;
    out[kKl] = (float)sums.kl;
}

void one_sequence(const PolicyLoss& a, int64_t sequence) {
    const Span span = span_of(a, sequence);
    const int64_t valid = count_valid(a, span);
    const float denominator = *a.denominator;
    float weight = denominator > 0 ? 1.0f / denominator : 0.0f;
    if (a.sequence_mean && valid > 0) weight /= (float)valid;
    const float kl_weight = a.kl == kNoKl ? 0.0f : weight * a.kl_coef;

    Tile tile;
    Sums sums;
    float shared_log_ratio = 0;
    if (a.sequence_level) shared_log_ratio = mean_log_ratio(a, span, valid, tile);
    float* const grad = span.grad;
    for (int64_t start = 0; start < span.count; start += kTile) {
        const int count = tile_count(span, start);
        load_tile(a, span, start, count, tile);
        for (int i = 0; i < count; ++i)
            tile.log_ratio[i] = a.sequence_level ? shared_log_ratio : tile.logp[i] - tile.old[i];
        evaluate(a, count, tile, sums);
        if (!grad) continue;
        for (int i = 0; i < count; ++i) {
            const float of_surrogate = a.sequence_level ? 0.0f : weight * tile.surrogate_grad[i];
            grad[start + i] =
                kl_weight != 0 ? of_surrogate + kl_weight * tile.kl_grad[i] : of_surrogate;
        }
    }
    write_partials(sums, valid, weight, a.partials + sequence * kNumMetrics);
    if (!grad || !a.sequence_level || valid == 0) return;
    // Every valid token moves the shared ratio by 1 / valid.
    const float shared_grad = (float)(weight * sums.surrogate_grad / (double)valid);
    for (int64_t start = 0; start < span.count; start += kTile) {
        const int count = tile_count(span, start);
        load_keep(a, span, start, count, tile.keep);
        for (int i = 0; i < count; ++i) grad[start + i] += tile.keep[i] ? shared_grad : 0.0f;
    }
}

void reduce(const PolicyLoss& a) {
    double sums[kNumMetrics] = {};
    float smallest = INFINITY, largest = -INFINITY;
    for (int64_t sequence = 0; sequence < a.sequences; ++sequence) {
        const float* partial = a.partials + sequence * kNumMetrics;
        for (int m = 0; m < kNumMetrics; ++m) sums[m] += partial[m];
        smallest = partial[kRatioMin] < smallest ? partial[kRatioMin] : smallest;
        largest = partial[kRatioMax] > largest ? partial[kRatioMax] : largest;
    }
    for (int m = 0; m < kNumMetrics; ++m) a.metrics[m] = (float)sums[m];
    a.metrics[kRatioMin] = smallest;
    a.metrics[kRatioMax] = largest;
    *a.loss = (float)(sums[kPolicyLoss] + (a.kl == kNoKl ? 0.0 : a.kl_coef * sums[kKlLoss]));
}

}  // namespace

void policy_loss(const PolicyLoss& a) {
    const int64_t tokens = a.cu_seqlens ? a.steps : a.sequences * a.steps;
#pragma omp parallel for schedule(dynamic) if (tokens >= kParallelWork)
    for (int64_t sequence = 0; sequence < a.sequences; ++sequence) one_sequence(a, sequence);
    reduce(a);
}

}  // namespace warpo::cpu::WARPO_ISA
