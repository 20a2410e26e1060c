#pragma once

namespace warpo {

// The numbers of an `objectives.Objective`, but for its KL coefficient; the enumerations are in
// policy_loss.h.
struct Objective {
    int ratio_level, surrogate;
    float ratio_low, ratio_high;  // 1 - clip_low, 1 + clip_high (which may be inf)
    float dual_clip;              // c > 1
    float tau_positive, tau_negative;
    float power_positive, power_negative, rate_positive, rate_negative;
    int correction;
    bool correction_sequence;  // w from the sum of its logarithm over the sequence
    float correction_low, correction_high;
    bool kl_straight_through;  // value of the estimator, gradient of k2
    bool kl_sequence;          // of the difference summed over the sequence
    float entropy_coef;
    float log_ratio_limit;  // log ratios are clamped to +-limit, the exponent of k3 from above
                            // only; gradient 0 where clamped
    bool sequence_mean;     // weight = 1 / (valid tokens of the sequence * denominator)
};

}  // namespace warpo
