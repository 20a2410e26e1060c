// The policy loss of one token, for every objective: values, derivatives and what the metrics
// count. Host and device share this text, so the loss that a GPU computes is the loss that the CPU
// tests cover. Selects instead of branches, so that loops over it vectorise; comparisons that are
// false for NaN let it through to the loss and its gradient.
#pragma once

#include "arguments/policy_loss.h"
#include "math/exp.h"
#include "math/weight.h"

namespace warpo {

// e^x - 1 - x for |x| <= 1/2.
WARPO_HD float exp_minus_1_minus_x_series(float x) {
    // sum of x^n / n!, n = 2 .. 8: the next term is below 4e-8 of the sum at |x| = 1/2
    float series = 1.0f / 40320.0f;
    series = series * x + 1.0f / 5040.0f;
    series = series * x + 1.0f / 720.0f;
    series = series * x + 1.0f / 120.0f;
    series = series * x + 1.0f / 24.0f;
    series = series * x + 1.0f / 6.0f;
    series = series * x + 0.5f;
    return series * x * x;
}

struct Exponential {
    float value, less_1, less_1_less_x;  // e^x, e^x - 1, e^x - 1 - x
};

// Without cancellation, for x <= 85.
WARPO_HD Exponential exponential_of(float x) {
    const float series = exp_minus_1_minus_x_series(x);
    const float value = exp_bounded(x < -85.0f ? -85.0f : x);  // e^-85 is nothing next to 1
    const float growth = value - 1.0f;
    const bool near = x > -0.5f && x < 0.5f;
    return {value, near ? series + x : growth, near ? series : growth - x};
}

WARPO_HD float clamp_above(float x, float high) { return x > high ? high : x; }

WARPO_HD float clamp_between(float x, float low, float high) {
    const float below = clamp_above(x, high);
    return below < low ? low : below;
}

WARPO_HD float clamp_symmetric(float x, float limit) { return clamp_between(x, -limit, limit); }

// Where the gradient of the clamp is 0. A NaN is not outside: it reaches the gradient.
WARPO_HD bool is_outside(float x, float limit) { return x > limit || x < -limit; }

// The fields of the same names in PolicyLoss.
struct SurrogateOptions {
    float ratio_low, ratio_high, dual_clip, tau_positive, tau_negative;
    float power_positive, power_negative, rate_positive, rate_negative, log_ratio_limit;
};

template <class Arguments>
WARPO_HD SurrogateOptions surrogate_options(const Arguments& a) {
    return {a.ratio_low,      a.ratio_high,     a.dual_clip,     a.tau_positive,  a.tau_negative,
            a.power_positive, a.power_negative, a.rate_positive, a.rate_negative, a.log_ratio_limit};
}

// Between the distributions of "this token or another" that log-probabilities give: total variation,
// or KL(old || new). Rounding may have left the logprobs above 0.
template <bool kKl>
WARPO_HD float binary_divergence(float old, float logp) {
    const float before = clamp_between(old, -85.0f, 0.0f);  // e^-85 is nothing next to 1
    const float now = clamp_above(logp, 0.0f);
    const Exponential p_old = exponential_of(before), p = exponential_of(now);
    const float difference = p.value - p_old.value;
    if (!kKl) return difference < 0.0f ? -difference : difference;
    const float of_others = p_old.less_1 < 0.0f ? -p_old.less_1 * logf(p_old.less_1 / p.less_1) : 0.0f;
    return p_old.value * (before - now) + of_others;
}

struct TokenTerms {
    float value;         // the surrogate times the correction, to be maximised
    float by_log_ratio;  // its derivative with respect to the log ratio
    float by_logp;       // and with respect to the logp that stands outside the ratio
    float ratio;
    float approx_kl;                                // k3 of old against new
    float clipped_low, clipped_high, clipped_dual;  // 1 where that bound is active, else 0
};

// log_ratio: at the level of the objective, not yet clamped; for kGeometric the mean of the clipped
// ones, whose bounds geometric_log_ratio reports. correction: from correction_weight, or 1. With a
// token-level ratio the gradient in logp is by_log_ratio + by_logp; where a sequence shares its
// ratio every valid token has the mean of by_log_ratio over the sequence in its place, or at
// kProductRatio the sum.
//
// kClip: PPO, https://arxiv.org/abs/1707.06347 eq. 7, with separate bounds as in DAPO,
// https://arxiv.org/abs/2503.14476 eq. 10. kDualClip: https://arxiv.org/abs/1912.09729 eq. 8.
// kStopGradient: CISPO, https://arxiv.org/abs/2506.13585 eq. 4 and 5. kGeometric: GMPO,
// https://arxiv.org/abs/2507.20673 eq. 4. kSoftGate: SAPO, https://arxiv.org/abs/2511.20347.
// kDivergenceTv, kDivergenceKl: DPPO, https://arxiv.org/abs/2602.04879 eq. 11 to 14. kGamma: VESPO,
// https://arxiv.org/abs/2602.10693.
template <int kSurrogate>
WARPO_HD TokenTerms token_terms(const SurrogateOptions& options, float log_ratio, float logp,
                                float advantage, float correction) {
    const float limit = options.log_ratio_limit, smallest = exp_bounded(-limit);
    const Exponential e = exponential_of(clamp_above(log_ratio, limit));
    const float ratio = e.value < smallest ? smallest : e.value;
    const bool below = ratio<options.ratio_low, above = ratio> options.ratio_high;
    const float clipped_ratio = clamp_between(ratio, options.ratio_low, options.ratio_high);
    const float unclipped = ratio * advantage, clipped = clipped_ratio * advantage;

    float value = unclipped, by_log_ratio = unclipped, by_logp = 0.0f;
    bool low = false, high = false, dual = false;
    if (kSurrogate == kClip || kSurrogate == kDualClip) {
        // false on a tie, where autograd lets the gradient through
        const bool is_clipped = clipped < unclipped;
        value = is_clipped ? clipped : unclipped;
        low = is_clipped && below;
        high = is_clipped && above;
        if (kSurrogate == kDualClip) {
            const float floor = options.dual_clip * advantage;
            dual = advantage < 0.0f && value < floor;
            value = dual ? floor : value;
        }
        by_log_ratio = (is_clipped || dual) ? 0.0f : unclipped;
    } else if (kSurrogate == kStopGradient) {
        value = clipped * logp;
        by_log_ratio = 0.0f;
        by_logp = clipped;
        low = below;
        high = above;
    } else if (kSurrogate == kMaskOutside) {
        value = by_log_ratio = (below || above) ? 0.0f : unclipped;
        low = below;
        high = above;
    } else if (kSurrogate == kReinforce) {
        value = advantage * logp;
        by_log_ratio = 0.0f;
        by_logp = advantage;
    } else if (kSurrogate == kSoftGate) {
        const float tau = advantage > 0.0f ? options.tau_positive : options.tau_negative;
        const float odds = exp_f32(-tau * (ratio - 1.0f));
        const float sigmoid = 1.0f / (1.0f + odds);
        value = 4.0f / tau * sigmoid * advantage;
        // sigmoid' = odds sigmoid^2: 1 - sigmoid would lose its digits near 1
        by_log_ratio = 4.0f * (odds * sigmoid * sigmoid) * unclipped;
    } else if (kSurrogate == kDivergenceTv || kSurrogate == kDivergenceKl) {
        const float old = logp - clamp_symmetric(log_ratio, limit);
        const float divergence = binary_divergence<kSurrogate == kDivergenceKl>(old, logp);
        low = advantage < 0.0f && ratio < 1.0f && divergence > 1.0f - options.ratio_low;
        high = advantage > 0.0f && ratio > 1.0f && divergence > options.ratio_high - 1.0f;
        value = by_log_ratio = (low || high) ? 0.0f : unclipped;
    } else if (kSurrogate == kGamma) {
        const bool negative = advantage < 0.0f;
        const float power = negative ? options.power_negative : options.power_positive;
        const float rate = negative ? options.rate_negative : options.rate_positive;
        const float bounded = clamp_symmetric(log_ratio, limit);
        by_logp = exp_f32(power * bounded - rate * (ratio - 1.0f)) * advantage;
        value = by_logp * logp;
        by_log_ratio = 0.0f;
    }

    TokenTerms terms;
    terms.value = correction * value;
    terms.by_log_ratio = is_outside(log_ratio, limit) ? 0.0f : correction * by_log_ratio;
    terms.by_logp = correction * by_logp;
    terms.ratio = ratio;
    terms.approx_kl = e.less_1_less_x;
    terms.clipped_low = low ? 1.0f : 0.0f;
    terms.clipped_high = high ? 1.0f : 0.0f;
    terms.clipped_dual = dual ? 1.0f : 0.0f;
    return terms;
}

// The same with the surrogate chosen at run time.
WARPO_HD TokenTerms token_terms(int surrogate, const SurrogateOptions& options, float log_ratio,
                                float logp, float advantage, float correction) {
    switch (surrogate) {
        case kClip: return token_terms<kClip>(options, log_ratio, logp, advantage, correction);
        case kDualClip:
            return token_terms<kDualClip>(options, log_ratio, logp, advantage, correction);
        case kStopGradient:
            return token_terms<kStopGradient>(options, log_ratio, logp, advantage, correction);
        case kMaskOutside:
            return token_terms<kMaskOutside>(options, log_ratio, logp, advantage, correction);
        case kReinforce:
            return token_terms<kReinforce>(options, log_ratio, logp, advantage, correction);
        case kSoftGate:
            return token_terms<kSoftGate>(options, log_ratio, logp, advantage, correction);
        case kDivergenceTv:
            return token_terms<kDivergenceTv>(options, log_ratio, logp, advantage, correction);
        case kDivergenceKl:
            return token_terms<kDivergenceKl>(options, log_ratio, logp, advantage, correction);
        case kGamma:
            return token_terms<kGamma>(options, log_ratio, logp, advantage, correction);
        default: return token_terms<kUnclipped>(options, log_ratio, logp, advantage, correction);
    }
}

// A token's share in the mean log ratio of its sequence under kGeometric.
struct GeometricTerm {
    float log_ratio;
    float clipped_low, clipped_high;  // 1 where a bound holds it, and no gradient passes
};

// log_low, log_high: logarithms of ratio_low and ratio_high.
WARPO_HD GeometricTerm geometric_log_ratio(float log_ratio, float advantage, float log_low,
                                           float log_high) {
    const bool negative = advantage < 0.0f;
    const bool low = negative && log_ratio < log_low, high = !negative && log_ratio > log_high;
    GeometricTerm term;
    term.log_ratio = low ? log_low : high ? log_high : log_ratio;
    term.clipped_low = low ? 1.0f : 0.0f;
    term.clipped_high = high ? 1.0f : 0.0f;
    return term;
}

struct CorrectionTerm {
    float weight;
    float corrected;  // 1 where a bound changed the weight, or it was NaN and is 0
};

// log_weight: old - sampler of the token, or its sum over the valid tokens of the sequence.
WARPO_HD CorrectionTerm correction_weight(float log_weight, int correction, float low, float high,
                                          float limit) {
    const float weight = exp_bounded(clamp_symmetric(log_weight, limit));
    const bool truncates = correction == kTruncate || correction == kTruncateMaskNan;
    const bool masked_nan = correction >= kTruncateMaskNan && weight != weight;
    const bool outside = weight < low || weight > high || masked_nan;
    const float replacement = truncates && !masked_nan ? clamp_between(weight, low, high) : 0.0f;
    CorrectionTerm term;
    term.weight = outside ? replacement : weight;
    term.corrected = outside ? 1.0f : 0.0f;
    return term;
}

struct KlTerm {
    float value;
    float derivative;  // with respect to logp
};

// e^x x - (e^x - 1), e being that of x.
WARPO_HD KlTerm reverse_k3(float x, const Exponential& e) {
    const float bounded = x < -85.0f ? -85.0f : x;  // there e^x x is nothing next to 1
    const bool near = x > -0.5f && x < 0.5f;
    const float value = near ? e.less_1 * x - e.less_1_less_x : e.value * (bounded - 1.0f) + 1.0f;
    return {value, -e.value * bounded};
}

// Estimators of the KL from one sample, kl being of Kl, by difference = ref - logp, or that summed
// over a sequence. straight_through: the gradient of k2, whose expectation is the gradient of the
// KL. limit: of exponents, from above; the gradient is 0 beyond it. kAny: false where kl is at most
// kK3, which takes fewer registers.
template <bool kAny = true>
WARPO_HD KlTerm kl_of_difference(float difference, int kl, bool straight_through, float limit) {
    const bool of_reference = kAny && kl > kOfReference;
    const int estimator = of_reference ? kl - kOfReference : kl;
    // who drew the token stands first: the two change places
    const float d = of_reference ? -difference : difference;
    // k3 needs a bound from above only: e^d overflows there; at ref = logp all digits matter
    const float bounded = clamp_above(d, limit);
    const Exponential e = exponential_of(bounded);
    KlTerm term = {e.less_1_less_x, d > limit ? 0.0f : -e.less_1};
    if (kAny && estimator == kReverseK3) {
        term = reverse_k3(bounded, e);
        term.derivative = d > limit ? 0.0f : term.derivative;
    }
    if (estimator == kK2) term = {0.5f * d * d, -d};
    if (estimator == kK1) term = {-d, 1.0f};
    if (straight_through) term.derivative = -d;
    if (of_reference) term.derivative = -term.derivative;
    return term;
}

WARPO_HD KlTerm kl_estimate(float logp, float ref, int kl, bool straight_through, float limit) {
    return kl_of_difference(ref - logp, kl, straight_through, limit);
}

// True if the tokens of a sequence share one ratio.
WARPO_HD bool shares_ratio(int ratio_level) {
    return ratio_level == kSequenceRatio || ratio_level == kProductRatio;
}

// What the loss of each valid token of a sequence is multiplied by. A denominator of 0 gives 0.
WARPO_HD float token_weight(float denominator, bool sequence_mean, float valid_tokens) {
    const float weight = inverse_or_zero(denominator);
    return sequence_mean && valid_tokens > 0.0f ? weight / valid_tokens : weight;
}

}  // namespace warpo
