// Estimators of KL(policy || reference), and of the reverse, from one sample of the policy, for all
// differences:
// http://joschu.net/blog/kl-approx.html.
#pragma once

#include <float.h>

#include "math/policy_loss.h"

namespace warpo {

struct ApproxKlTerm {
    float value;       // before the clamp
    float derivative;  // with respect to logp
};

// Selects instead of branches, so that loops over it vectorise; NaN stays.
template <int kEstimator>
WARPO_HD ApproxKlTerm approx_kl(float logp, float ref) {
    const float d = ref - logp;
    if (kEstimator == kK1) return {-d, 1.0f};
    if (kEstimator == kK2) return {0.5f * d * d, -d};
    // inf where e^d overflows, also at d = inf
    const float bounded = d > 89.0f ? 89.0f : d;
    const float ratio = exp_f32(bounded), growth = ratio - 1.0f;
    // near 0 all digits of the difference matter
    const float series = exp_minus_1_minus_x_series(d);
    const bool near = d > -0.5f && d < 0.5f;
    if (kEstimator == kReverseK3) {
        const float above = bounded < -85.0f ? -85.0f : bounded;  // there e^d d is nothing next to 1
        const float value = near ? (series + d) * d - series : ratio * (above - 1.0f) + 1.0f;
        return {value, -ratio * above};
    }
    return {near ? series : growth - bounded, near ? -(series + d) : -growth};
}

// The derivative of the clamped value: 0 outside, and where the value is infinite.
WARPO_HD float clamped_derivative(const ApproxKlTerm& term, float limit) {
    return is_outside(term.value, limit < FLT_MAX ? limit : FLT_MAX) ? 0.0f : term.derivative;
}

}  // namespace warpo
