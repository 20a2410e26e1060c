// The operations as the CPU and the CUDA library implement them: raw pointers in, no torch.
// Python checks shapes and dtypes; every output is allocated by the caller.
//
// Layout. A per-token array is a View over (row, step): element (b, t) lies at
// data[b * stride0 + t * stride1]. Strides count elements and may be 0. A View with data == nullptr
// is an absent optional argument. With cu_seqlens the tokens of all sequences lie in one row: token
// t of sequence b is step cu_seqlens[b] + t, stride0 of a per-token array is 0, and advantages that
// are one a sequence have stride1 0.
#pragma once
#include <cstdint>

namespace warpo {

enum DType : int { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2, kUInt8 = 3, kInt32 = 4, kInt64 = 5 };

struct View {
    void* data = nullptr;
    int64_t stride0 = 0, stride1 = 0;
    int dtype = kFloat32;
};

struct Logprobs {
    View logits;  // (b, t) strides; the vocabulary has stride 1; float32 | bfloat16 | float16
    int64_t rows, steps, vocab;
    View targets;            // int64
    float temperature;       // used where token_temperature is absent
    View token_temperature;  // float32
    View mask;               // uint8; 0: the token is not read, its results are 0
    int64_t ignore_index;
    View logprobs;  // float32 out of the forward pass
    View entropy;   // float32, optional; out of the forward pass, into the backward pass
    float*
        stats;  // (rows, steps, 2) float32: max_j x_j and log sum_j exp((x_j - max) / temperature)
};

struct LogprobsBackward {
    View grad_logprobs, grad_entropy;  // float32, optional
    View grad_logits;                  // dtype of logits; may be the logits themselves
};

struct Gae {
    int64_t rows, steps;
    View rewards, values;  // float
    View last_values;      // (row, 0) float, optional: value after the last step; absent: 0
    View final_values;     // float, optional: value of the final observation; read where truncated
    View mask;             // uint8, optional
    View terminated, truncated;            // uint8, optional
    View last_terminated, last_truncated;  // (row, 0) uint8, optional; read when starts_at_t
    float gamma, gae_lambda;
    bool carry;        // masked steps: true passes value and trace through, false counts zeros
    bool starts_at_t;  // flag t: an episode starts at t, so that step t - 1 ended one
    View advantages, returns;  // float32 out
};

struct GaeBackward {
    View grad_advantages, grad_returns;        // float32, optional, any stride
    View grad_rewards, grad_values;            // float32 out
    View grad_last_values, grad_final_values;  // float32 out, optional
};

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

enum Std : int { kNoStd = 0, kSampleStd = 1, kPopulationStd = 2 };

struct GroupAdvantages {
    // group g holds order[offsets[g] .. offsets[g + 1]), or g * group_size + [0, group_size)
    int64_t groups, group_size;
    const int64_t *offsets, *order;  // both or neither
    View rewards;                    // (0, i) float
    int std_mode;
    bool leave_one_out;
    float eps;
    float* advantages;    // (rewards)
    float *mean, *std;    // (groups); std is 0 with kNoStd
    int32_t* degenerate;  // (), zero on entry: number of groups whose rewards are all equal
};

struct GroupAdvantagesBackward {
    View grad_advantages;  // (0, i) float32
    float* grad_rewards;   // (rewards)
};

}  // namespace warpo
