// Policy loss of every objective: loss, metrics and gradients in one call.
#include "math/policy_loss.h"

#include <math.h>
#include <omp.h>

#include "cpu/cpu.h"
#include "cpu/policy_loss_shared.h"

namespace warpo::cpu::WARPO_ISA {
namespace {

struct Sums {
    double policy = 0, kl = 0, low = 0, high = 0, dual = 0, ratio = 0, approx_kl = 0, entropy = 0;
    double correction = 0, corrected = 0, log_ratio = 0, by_log_ratio = 0;
    float ratio_min = INFINITY, ratio_max = -INFINITY;

    void add(const Sums& other) {
        policy += other.policy;
        kl += other.kl;
        low += other.low;
        high += other.high;
        dual += other.dual;
        ratio += other.ratio;
        approx_kl += other.approx_kl;
        entropy += other.entropy;
        correction += other.correction;
        corrected += other.corrected;
        log_ratio += other.log_ratio;
        by_log_ratio += other.by_log_ratio;
        ratio_min = other.ratio_min < ratio_min ? other.ratio_min : ratio_min;
        ratio_max = other.ratio_max > ratio_max ? other.ratio_max : ratio_max;
    }
};

// Factors of the gradients of a sequence.
struct Weights {
    float policy, kl, entropy;
};

// An estimator that is chosen at run time: those that few objectives have.
constexpr int kAnyKl = -1;

// Sums of a tile of surrogates and KLs, and the gradient of each token by itself.
template <int kSurrogate, int kKl, bool kStraightThrough>
void evaluate(const PolicyLoss& a, const Weights& weights, int count, const Tile& tile, float* grad,
              Sums& sums) {
    const SurrogateOptions options = surrogate_options(a);
    const bool of_sequence = shares_ratio(a.ratio_level);
    const int any_kl = a.kl;
    const float policy_weight = weights.policy, kl_weight = weights.kl;
    // Read from the tile within the loop, pointers would keep it from vectorising.
    const float *logp = tile.logp, *advantage = tile.advantage, *ref = tile.ref;
    float policy = 0, kl = 0, low = 0, high = 0, dual = 0, ratio = 0, approx_kl = 0, derivative = 0;
    float smallest = INFINITY, largest = -INFINITY;
#pragma omp simd reduction(+ : policy, kl, low, high, dual, ratio, approx_kl, derivative) \
    reduction(min : smallest) reduction(max : largest)
    for (int i = 0; i < count; ++i) {
        const bool keep = tile.keep[i];
        const TokenTerms terms = token_terms<kSurrogate>(options, tile.log_ratio[i], logp[i],
                                                         advantage[i], tile.correction[i]);
        float own = -policy_weight * ((of_sequence ? 0.0f : terms.by_log_ratio) + terms.by_logp);
        if (kKl != kNoKl) {
            const KlTerm term =
                kl_estimate(logp[i], ref[i], kKl == kAnyKl ? any_kl : kKl, kStraightThrough,
                            options.log_ratio_limit);
            own += kl_weight * term.derivative;
            kl += keep ? term.value : 0.0f;
        }
        grad[i] = keep ? own : 0.0f;
        policy -= keep ? terms.value : 0.0f;
        derivative += keep ? terms.by_log_ratio : 0.0f;
        low += keep ? terms.clipped_low : 0.0f;
        high += keep ? terms.clipped_high : 0.0f;
        dual += keep ? terms.clipped_dual : 0.0f;
        ratio += keep ? terms.ratio : 0.0f;
        approx_kl += keep ? terms.approx_kl : 0.0f;
        const float or_inf = keep ? terms.ratio : INFINITY;
        const float or_minus_inf = keep ? terms.ratio : -INFINITY;
        smallest = or_inf < smallest ? or_inf : smallest;
        largest = or_minus_inf > largest ? or_minus_inf : largest;
    }
    // 0 times what is not finite is NaN; within the loop above, a select takes 8 % of its time
    for (int i = 0; policy_weight == 0.0f && i < count; ++i) grad[i] = 0.0f;
    sums.policy += policy;
    sums.kl += kl;
    sums.low += low;
    sums.high += high;
    sums.dual += dual;
    sums.ratio += ratio;
    sums.approx_kl += approx_kl;
    sums.by_log_ratio += derivative;
    sums.ratio_min = smallest < sums.ratio_min ? smallest : sums.ratio_min;
    sums.ratio_max = largest > sums.ratio_max ? largest : sums.ratio_max;
}

using Evaluate = void (*)(const PolicyLoss&, const Weights&, int, const Tile&, float*, Sums&);

template <int kSurrogate>
Evaluate choose_kl(int kl, bool straight_through) {
    switch (kl) {
        case kNoKl: return evaluate<kSurrogate, kNoKl, false>;
        case kK1: return evaluate<kSurrogate, kK1, true>;
        case kK2: return evaluate<kSurrogate, kK2, true>;
        case kK3:
            return straight_through ? evaluate<kSurrogate, kK3, true>
                                    : evaluate<kSurrogate, kK3, false>;
        default: return evaluate<kSurrogate, kAnyKl, false>;
    }
}

Evaluate choose(int surrogate, int kl, bool straight_through) {
    switch (surrogate) {
        case kClip: return choose_kl<kClip>(kl, straight_through);
        case kDualClip: return choose_kl<kDualClip>(kl, straight_through);
        case kStopGradient: return choose_kl<kStopGradient>(kl, straight_through);
        case kMaskOutside: return choose_kl<kMaskOutside>(kl, straight_through);
        case kReinforce: return choose_kl<kReinforce>(kl, straight_through);
        case kSoftGate: return choose_kl<kSoftGate>(kl, straight_through);
        case kDivergenceTv: return choose_kl<kDivergenceTv>(kl, straight_through);
        case kDivergenceKl: return choose_kl<kDivergenceKl>(kl, straight_through);
        case kGamma: return choose_kl<kGamma>(kl, straight_through);
        // kGeometric: its bounds act on log ratios
        default: return choose_kl<kUnclipped>(kl, straight_through);
    }
}

// Counts the tokens whose log ratio is cut, before the mean replaces it.
void count_cut(const PolicyLoss& a, int count, const Tile& tile, Sums& sums) {
    const GeometricBounds bounds = geometric_bounds(a);
    const float* advantage = tile.advantage;
    float low = 0, high = 0;
#pragma omp simd reduction(+ : low, high)
    for (int i = 0; i < count; ++i) {
        const GeometricTerm term =
            geometric_log_ratio(tile.log_ratio[i], advantage[i], bounds.log_low, bounds.log_high);
        low += tile.keep[i] ? term.clipped_low : 0.0f;
        high += tile.keep[i] ? term.clipped_high : 0.0f;
    }
    sums.low += low;
    sums.high += high;
}

// Before the objective's level replaces them.
void add_log_ratios(const PolicyLoss& a, int count, const Tile& tile, Sums& sums) {
    const float limit = a.log_ratio_limit;
    float total = 0;
#pragma omp simd reduction(+ : total)
    for (int i = 0; i < count; ++i) {
        const float bounded = clamp_symmetric(tile.log_ratio[i], limit);
        total += tile.keep[i] ? bounded : 0.0f;
    }
    sums.log_ratio += total;
}

// Replaces the log ratios of the tokens by those of the objective's level.
void raise_level(const PolicyLoss& a, const Shared& shared, int count, double& prefix, Tile& tile,
                 Sums& sums) {
    if (shares_ratio(a.ratio_level)) {
        if (a.surrogate == kGeometric) count_cut(a, count, tile, sums);
        const bool mean = a.ratio_level == kSequenceRatio && shared.valid > 0;
        const float of_sequence = (float)(shared.log_ratio / (mean ? shared.valid : 1));
        for (int i = 0; i < count; ++i) tile.log_ratio[i] = of_sequence;
    } else if (a.ratio_level == kPrefixRatio) {
        for (int i = 0; i < count; ++i) {
            prefix += tile.keep[i] ? tile.log_ratio[i] : 0.0f;
            tile.log_ratio[i] = (float)prefix;
        }
    }
}

void correct(const PolicyLoss& a, const Shared& shared, int count, Tile& tile, Sums& sums) {
    const float of_sequence = (float)shared.log_weight;
    const bool sequence = a.correction_sequence;
    const int mode = a.correction;
    const float low = a.correction_low, high = a.correction_high, limit = a.log_ratio_limit;
    const float *old = tile.old, *sampler = tile.sampler;
    float total = 0, corrected = 0;
#pragma omp simd reduction(+ : total, corrected)
    for (int i = 0; i < count; ++i) {
        const float log_weight = sequence ? of_sequence : old[i] - sampler[i];
        const CorrectionTerm term = correction_weight(log_weight, mode, low, high, limit);
        tile.correction[i] = term.weight;
        total += tile.keep[i] ? term.weight : 0.0f;
        corrected += tile.keep[i] ? term.corrected : 0.0f;
    }
    sums.correction += total;
    sums.corrected += corrected;
}

void add_entropy(const PolicyLoss& a, const Weights& weights, const Span& span, int64_t start,
                 int count, Tile& tile, Sums& sums) {
    const float* entropy = tile.sampler_storage.load(a.entropy, span, start, count);
    float* grad = a.grad_entropy ? a.grad_entropy + span.grad + start : tile.unwanted;
    const float slope = -weights.entropy;
    float total = 0;
#pragma omp simd reduction(+ : total)
    for (int i = 0; i < count; ++i) {
        total += tile.keep[i] ? entropy[i] : 0.0f;
        grad[i] = tile.keep[i] ? slope : 0.0f;
    }
    sums.entropy += total;
}

Sums evaluate_part(const PolicyLoss& a, const Shared& shared, const Weights& weights,
                   const Span& span) {
    const int kl = a.kl_sequence ? kNoKl : a.kl;
    const Evaluate evaluate_tile = choose(a.surrogate, kl, a.kl_straight_through);
    Tile tile;
    Sums sums;
    double prefix = 0;
    for (int i = 0; i < kTile; ++i) tile.correction[i] = 1.0f;
    for_each_tile(span, [&](int64_t start, int count) {
        tile.load_keep(a, span, start, count);
        tile.load_log_ratio(a, span, start, count);
        tile.load_advantage(a, span, start, count);
        if (kl != kNoKl) tile.ref = tile.ref_storage.load(a.ref_logprobs, span, start, count);
        if (a.correction != kNoCorrection) {
            tile.sampler = tile.sampler_storage.load(a.sampler_logprobs, span, start, count);
            correct(a, shared, count, tile, sums);
        }
        add_log_ratios(a, count, tile, sums);
        raise_level(a, shared, count, prefix, tile, sums);
        float* grad = a.grad_logprobs ? a.grad_logprobs + span.grad + start : tile.unwanted;
        evaluate_tile(a, weights, count, tile, grad, sums);
        if (a.entropy.data) add_entropy(a, weights, span, start, count, tile, sums);
    });
    return sums;
}

// Adds to each valid token what it moves the ratio of the sequence by times `by_ratio`, and by_kl.
void spread(const PolicyLoss& a, const Span& span, float by_ratio, float by_kl) {
    Tile tile;
    const GeometricBounds bounds = geometric_bounds(a);
    for_each_tile(span, [&](int64_t start, int count) {
        tile.load_keep(a, span, start, count);
        float* out = a.grad_logprobs + span.grad + start;
        if (a.surrogate == kGeometric) {
            tile.load_log_ratio(a, span, start, count);
            tile.load_advantage(a, span, start, count);
            const float* advantage = tile.advantage;
#pragma omp simd
            for (int i = 0; i < count; ++i) {
                const GeometricTerm term = geometric_log_ratio(tile.log_ratio[i], advantage[i],
                                                               bounds.log_low, bounds.log_high);
                const bool cut = term.clipped_low + term.clipped_high > 0.0f;
                const float own = cut ? by_kl : by_ratio + by_kl;
                out[i] += tile.keep[i] ? own : 0.0f;
            }
        } else {
#pragma omp simd
            for (int i = 0; i < count; ++i) out[i] += tile.keep[i] ? by_ratio + by_kl : 0.0f;
        }
    });
}

float kl_coefficient(const PolicyLoss& a) {
    return a.adaptive_kl_coef ? *a.adaptive_kl_coef : a.kl_coef;
}

void write_partials(const PolicyLoss& a, const Sums& sums, double valid, float weight, float* out) {
    out[kPolicyLoss] = (float)weighted(weight, sums.policy);
    out[kKlLoss] = (float)weighted(weight, sums.kl);
    out[kEntropyLoss] = (float)weighted(weight, sums.entropy);
    out[kTokens] = (float)valid;
    out[kClippedLow] = (float)sums.low;
    out[kClippedHigh] = (float)sums.high;
    out[kClippedDual] = (float)sums.dual;
    out[kRatio] = (float)sums.ratio;
    out[kRatioMin] = sums.ratio_min;
    out[kRatioMax] = sums.ratio_max;
    out[kApproxKl] = (float)sums.approx_kl;
    out[kKl] = (float)sums.kl;
    out[kEntropy] = (float)sums.entropy;
    out[kCorrectionSum] = (float)(a.correction == kNoCorrection ? valid : sums.correction);
    out[kCorrected] = (float)sums.corrected;
    out[kLogRatio] = (float)sums.log_ratio;
}

// parallel: the threads share this sequence.
void one_sequence(const PolicyLoss& a, int64_t sequence, bool parallel) {
    const Span span = span_of(a, sequence);
    const Shared shared =
        sum_parts<Shared>(span, parallel, [&](const Span& part) { return share(a, part); });
    const float weight =
        token_weight(value_of(a.denominator), a.sequence_mean, (float)shared.valid);
    const Weights weights = {weight, weight * kl_coefficient(a), weight * a.entropy_coef};
    // A prefix runs through the whole sequence.
    Sums sums = a.ratio_level == kPrefixRatio
                          ? evaluate_part(a, shared, weights, span)
                          : sum_parts<Sums>(span, parallel, [&](const Span& part) {
                                return evaluate_part(a, shared, weights, part);
                            });
    float by_kl = 0, by_ratio = 0;
    if (has_sequence_kl(a)) {
        const KlTerm kl = kl_of_difference((float)shared.kl_difference, a.kl,
                                           a.kl_straight_through, a.log_ratio_limit);
        // the KL of each token is this one, which every token moves
        if (shared.valid > 0) sums.kl = shared.valid * kl.value;
        by_kl = (float)weighted(weights.kl, shared.valid * kl.derivative);
    }
    write_partials(a, sums, shared.valid, weight, a.partials + sequence * kNumMetrics);
    if (shares_ratio(a.ratio_level) && shared.valid > 0) {
        // Every valid token moves the mean log ratio by 1 / valid, the sum by 1.
        const double share = a.ratio_level == kSequenceRatio ? shared.valid : 1;
        by_ratio = (float)weighted(-weight, sums.by_log_ratio / share);
    }
    const bool shares = shares_ratio(a.ratio_level) || has_sequence_kl(a);
    if (!a.grad_logprobs || !shares || shared.valid == 0) return;
    struct Nothing {
        void add(const Nothing&) {}
    };
    sum_parts<Nothing>(span, parallel, [&](const Span& part) {
        spread(a, part, by_ratio, by_kl);
        return Nothing();
    });
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
    // the comparisons drop a NaN, the sum of the ratios does not
    const bool lost = sums[kRatio] != sums[kRatio];
    a.metrics[kRatioMin] = lost ? NAN : smallest;
    a.metrics[kRatioMax] = lost ? NAN : largest;
    double loss = sums[kPolicyLoss];
    if (a.kl != kNoKl) loss += (double)kl_coefficient(a) * sums[kKlLoss];
    if (a.entropy_coef != 0) loss -= (double)a.entropy_coef * sums[kEntropyLoss];
    *a.loss = (float)loss;
}

}  // namespace

void policy_loss(const PolicyLoss& a) {
    const int64_t tokens = a.cu_seqlens ? a.steps : a.sequences * a.steps;
    const bool parallel = tokens >= kParallelWork;
    // A sequence that would keep one thread busy after the others are done is shared by all.
    const int64_t share = parallel ? tokens / (4 * omp_get_max_threads()) : tokens;
    const int64_t longest = share > kPart ? share : kPart;
    for (int64_t b = 0; parallel && b < a.sequences; ++b)
        if (span_of(a, b).count > longest) one_sequence(a, b, true);
#pragma omp parallel for schedule(dynamic) if (parallel)
    for (int64_t b = 0; b < a.sequences; ++b)
        if (!parallel || span_of(a, b).count <= longest) one_sequence(a, b, false);
    reduce(a);
}

}  // namespace warpo::cpu::WARPO_ISA
