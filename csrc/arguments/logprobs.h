#pragma once
#include "view.h"

namespace warpo {

// A row is cut into at most this many chunks, by its vocabulary and dtype alone.
constexpr int kLogprobsChunks = 8;

struct Logprobs {
    int64_t rows, steps, vocab;
    View logits;        // (b, t) strides; the vocabulary has stride 1; float32 | bfloat16 | float16
    View targets;       // int64
    float temperature;  // used where token_temperature is absent
    View token_temperature;  // float32
    View mask;               // uint8; 0: the token is not read, its results are 0
    int64_t ignore_index;
    View logprobs;  // float32 out of the forward pass
    View entropy;   // float32, optional; out of the forward pass, into the backward pass
    // (rows, steps, 2) float32: max_j x_j and log sum_j exp((x_j - max) / temperature)
    float* stats;
    // (rows, steps, kLogprobsChunks, 4) float32 workspace of the forward pass, optional: where
    // given, the chunks of a row may be reduced by blocks of their own. It changes no bit.
    float* partials;
};

struct LogprobsBackward {
    Logprobs forward;                  // without its outputs, but for entropy and stats
    View grad_logprobs, grad_entropy;  // float32, optional
    // dtype of logits, and may be the logits themselves; of float32 logits also bfloat16 | float16,
    // in memory of its own
    View grad_logits;
};

}  // namespace warpo
