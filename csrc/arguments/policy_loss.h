#pragma once
#include "arguments/denominator.h"
#include "arguments/objective.h"
#include "view.h"

namespace warpo {

// Estimators of the KL from tokens that the policy drew; with kOfReference more, from tokens that the
// reference drew.
enum Kl : int { kNoKl = 0, kK1 = 1, kK2 = 2, kK3 = 3, kReverseK3 = 4, kOfReference = 4 };

// Of what the log ratio of a token is made of l_t = logprobs_t - old_logprobs_t.
enum RatioLevel : int {
    kTokenRatio = 0,     // l_t
    kSequenceRatio = 1,  // mean of l over the valid tokens of the sequence
    kPrefixRatio = 2,    // sum of l over the valid tokens up to t; with kStopGradient only
    kProductRatio = 3,   // sum of l over the valid tokens of the sequence
};

// With ratio r, advantage A, bounds low and high:
enum Surrogate : int {
    kClip = 0,          // min(r A, clip(r) A)
    kDualClip = 1,      // the same, for A < 0 not below dual_clip A
    kStopGradient = 2,  // clip(r) A logp, no gradient through clip(r)
    kMaskOutside = 3,   // r A where low <= r <= high, else 0
    kUnclipped = 4,     // r A
    kReinforce = 5,     // A logp: the ratio is for the metrics alone
    kGeometric = 6,     // l_t clipped from above by log high (A >= 0) or from below by log low
                        // (A < 0) before the mean over the sequence; r A
    kSoftGate = 7,      // 4 / tau sigmoid(tau (r - 1)) A, tau by the sign of A
    // r A; 0 where a divergence of the probabilities p of the token and p / r is above high - 1 and
    // A > 0, r > 1, or above 1 - low and A < 0, r < 1
    kDivergenceTv = 8,  // |p - p / r|
    kDivergenceKl = 9,  // KL(p / r || p) between the token and all others
    kGamma = 10,        // r^power e^(rate (1 - r)) A logp, by the sign of A; no gradient through r
};

// The weight of a token's surrogate from w = exp(old_logprobs - sampler_logprobs).
// Where w is NaN it reaches the loss, or is 0.
enum Correction : int {
    kNoCorrection = 0,
    kTruncate = 1,
    kMaskCorrection = 2,
    kTruncateMaskNan = 3,
    kMaskCorrectionMaskNan = 4,
};

// Per-sequence sums in the order of the metrics vector; kRatioMin and kRatioMax reduce by min and
// max. From kTokens on they are unweighted sums over valid tokens.
enum Metric : int {
    kPolicyLoss,   // sum of weight * -correction * surrogate
    kKlLoss,       // sum of weight * kl
    kEntropyLoss,  // sum of weight * entropy
    kTokens,       // valid tokens
    kClippedLow,   // the bound low is active
    kClippedHigh,  // the bound high is active
    kClippedDual,  // the bound dual_clip is active
    kRatio,
    kRatioMin,
    kRatioMax,
    kApproxKl,  // k3 of old against new: ratio - 1 - log ratio
    kKl,        // the estimator against the reference
    kEntropy,
    kCorrectionSum,  // of the weights, each 1 without a correction
    kCorrected,      // tokens whose weight was truncated, or set to 0
    kLogRatio,       // logp - old of the token, clamped to +-log_ratio_limit
    kNumMetrics
};

// A GPU splits the sequences of a small batch into parts, each with a row of partial sums: at most
// this many rows, unless there are more sequences.
constexpr int64_t kMinPartials = 512;

struct KlPenalty {
    int kl;  // of Kl
    float kl_coef;
    const float* adaptive_kl_coef;  // (), optional: in place of kl_coef
};

struct PolicyLoss : Objective, KlPenalty {
    int64_t sequences, steps;   // steps: length of a row; with cu_seqlens: total tokens
    const int32_t* cu_seqlens;  // (sequences + 1), or nullptr
    View logprobs, old_logprobs, advantages;  // float
    View ref_logprobs;                        // float; absent unless kl != kNoKl
    View sampler_logprobs;                    // float; absent unless correction != kNoCorrection
    View entropy;                             // float, optional
    View mask;                                // uint8, optional
    Denominator denominator;
    float *grad_logprobs, *grad_entropy;  // contiguous (rows * steps), float32; nullptr: not wanted
    float* partials;  // (max(sequences, kMinPartials), kNumMetrics) float32 workspace
    float* loss;      // ()
    float* metrics;   // (kNumMetrics)
};

}  // namespace warpo
