#pragma once
#include "arguments/logprobs.h"
#include "arguments/policy_loss.h"

namespace warpo {

// The gradient of a policy loss whose coefficient for a token follows from the logits of that
// token alone. All arrays are one a token, over the (rows, steps) of the logits. The names are
// those of PolicyLoss.
struct PolicyLossFromLogits : Objective, KlPenalty {
    Logprobs forward;           // entropy and stats may be absent
    int64_t sequences;          // with cu_seqlens, which cut the one row of steps
    const int32_t* cu_seqlens;  // optional: a token of no sequence counts as masked
    View old_logprobs;          // float; absent: the policy has not moved, and its ratio is 1
    View advantages;            // float
    View ref_logprobs, sampler_logprobs;  // float; absent unless kl, correction ask for them
    View valid_tokens;                    // float32, of the sequence; absent unless sequence_mean
    Denominator denominator;
    // dtype of logits, and may be the logits themselves; of float32 logits also bfloat16 | float16,
    // in memory of its own
    View grad_logits;
};

// A gradient of the logits times one number on the device, in place; 1 costs no pass over it.
struct ScaleGradient {
    int64_t rows, steps, vocab;
    View gradient;  // the vocabulary has stride 1; float32 | bfloat16 | float16
    const float* factor;
};

}  // namespace warpo
