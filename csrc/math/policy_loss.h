// The clipped surrogate and the KL estimators of one token: values and derivatives.
// Host and device share this text, so the loss that a GPU computes is the loss that the CPU tests
// cover.
#pragma once

#include "math/exp.h"

namespace warpo {

// e^x - 1 - x without cancellation; the k3 estimator (http://joschu.net/blog/kl-approx.html) at x =
// log(q / p).
WARPO_HD float exp_minus_1_minus_x(float x) {
    // sum of x^n / n!, n = 2 .. 8: the next term is below 4e-8 of the sum at |x| = 1/2
    float series = 1.0f / 40320.0f;
    series = series * x + 1.0f / 5040.0f;
    series = series * x + 1.0f / 720.0f;
    series = series * x + 1.0f / 120.0f;
    series = series * x + 1.0f / 24.0f;
    series = series * x + 1.0f / 6.0f;
    series = series * x + 0.5f;
    const float direct = exp_f32(x) - 1.0f - x;
    return (x > -0.5f && x < 0.5f) ? series * x * x : direct;
}

WARPO_HD float clamp_symmetric(float x, float limit) {
    const float below = x > limit ? limit : x;
    return below < -limit ? -limit : below;
}

// Where the gradient of the clamp is 0. A NaN is not outside: it reaches the gradient.
WARPO_HD bool is_outside(float x, float limit) { return x > limit || x < -limit; }

struct Surrogate {
    float value;       // min(ratio A, clip(ratio) A), to be maximised
    float derivative;  // of value with respect to log ratio: ratio A, or 0 where the clipped branch
                       // is smaller
    float clipped_low, clipped_high;  // 1 where the clipped branch is smaller
};

// PPO, https://arxiv.org/abs/1707.06347 eq. 7, with separate bounds (DAPO,
// https://arxiv.org/abs/2503.14476 eq. 10).
WARPO_HD Surrogate clipped_surrogate(float ratio, float advantage, float ratio_low,
                                     float ratio_high) {
    float bounded = ratio > ratio_high ? ratio_high : ratio;
    bounded = bounded < ratio_low ? ratio_low : bounded;
    const float unclipped = ratio * advantage;
    const float clipped = bounded * advantage;
    const bool is_clipped =
        clipped < unclipped;  // false on a tie, where autograd lets the gradient through
    Surrogate result;
    result.value = is_clipped ? clipped : unclipped;
    result.derivative = is_clipped ? 0.0f : unclipped;
    result.clipped_low = (is_clipped && ratio < ratio_low) ? 1.0f : 0.0f;
    result.clipped_high = (is_clipped && ratio > ratio_high) ? 1.0f : 0.0f;
    return result;
}

struct KlTerm {
    float value;
    float derivative;  // with respect to logp
};

// Estimators of KL(policy || reference) from one sample of the policy, with kl = 1, 2, 3 for k1,
// k2, k3.
WARPO_HD KlTerm kl_estimate(float logp, float ref, int kl, float limit) {
    const float difference = ref - logp;
    const float bounded = clamp_symmetric(difference, limit);
    KlTerm term;
    term.value = kl == 1   ? -difference
                 : kl == 2 ? 0.5f * difference * difference
                           : exp_minus_1_minus_x(bounded);
    // d/dlogp k3 = 1 - e^(ref - logp); at ref = logp all digits of the difference matter
    const float k3_derivative =
        is_outside(difference, limit) ? 0.0f : -(exp_minus_1_minus_x(bounded) + bounded);
    term.derivative = kl == 1 ? 1.0f : kl == 2 ? -difference : k3_derivative;
    return term;
}

}  // namespace warpo
