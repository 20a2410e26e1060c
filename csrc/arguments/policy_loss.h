#pragma once
#include "view.h"

namespace warpo {

enum Kl : int { kNoKl = 0, kK1 = 1, kK2 = 2, kK3 = 3 };

// Per-sequence sums in the order of the metrics vector; kRatioMin and kRatioMax reduce by min and
// max.
enum Metric : int {
    kPolicyLoss,   // sum of weight * -surrogate
    kKlLoss,       // sum of weight * kl
    kTokens,       // valid tokens; the rows below are sums over valid tokens, unweighted
    kClippedLow,   // the clipped branch is active at the lower bound
    kClippedHigh,  // ... at the upper bound
    kRatio,
    kRatioMin,
    kRatioMax,
    kApproxKl,  // k3 of old against new: ratio - 1 - log ratio
    kKl,        // the estimator against the reference
    kNumMetrics
};

struct PolicyLoss {
    int64_t sequences, steps;   // steps: length of a row; with cu_seqlens: total tokens
    const int32_t* cu_seqlens;  // (sequences + 1), or nullptr
    View logprobs, old_logprobs, advantages;  // float
    View ref_logprobs;                        // float; absent unless kl != kNoKl
    View mask;                                // uint8, optional
    bool sequence_level;          // ratio = exp(mean over the sequence of log ratio), not per token
    bool sequence_mean;           // weight = 1 / (valid tokens of the sequence * denominator)
    float ratio_low, ratio_high;  // 1 - clip_low, 1 + clip_high
    int kl;
    float kl_coef;
    float log_ratio_limit;     // arguments of exp are clamped to +-limit; gradient 0 where clamped
    const float* denominator;  // one float on the device; 0 gives loss 0 and gradients 0
    float* grad_logprobs;      // contiguous (rows * steps), float32; nullptr: no gradient wanted
    float* partials;           // (sequences, kNumMetrics) float32 workspace
    float* loss;               // ()
    float* metrics;            // (kNumMetrics)
};

}  // namespace warpo
