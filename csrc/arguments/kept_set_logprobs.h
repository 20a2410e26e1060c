#pragma once
#include "view.h"

namespace warpo {

// Token n keeps the ids kept_ids[kept_offsets[n] .. kept_offsets[n + 1]): its logits are x_j =
// hidden_n . weight_j + bias_j of those alone. A token that keeps none is not read; its results are
// 0. An id outside the vocabulary, or a target that is not kept, makes the results of its token
// NaN.
struct KeptSetLogprobs {
    int64_t tokens, vocab, hidden_size, num_kept;
    View hidden;   // (token, 0) and
    View weight;   // (id, 0): rows of stride 1; float32 | bfloat16 | float16, both the same
    View bias;     // (0, id) float, optional
    View targets;  // (0, token) int64
    View kept_ids, kept_offsets;  // (0, i) int32 | int64
    float temperature;            // used where token_temperature is absent
    View token_temperature;       // (0, token) float32
    float* logprobs;              // (tokens) out of the forward pass
    float* kept_logits;           // (num_kept): x_j
    float* stats;  // (tokens, 2): max_j x_j and log sum_j exp((x_j - max) / temperature)
};

struct KeptSetLogprobsBackward {
    KeptSetLogprobs forward;  // without logprobs
    View grad_logprobs;       // (0, token) float32, any stride
    View grad_hidden;         // (token, 0), dtype of hidden, optional
    float* grad_logits;       // (num_kept): d loss / d x_j
};

// grad_weight_j = sum over the entries e that keep j, in their order, of grad_logits_e hidden_n(e).
struct KeptSetWeightGradient {
    int64_t vocab, hidden_size;
    View hidden;  // (token, 0)
    // entry order[i] of token tokens[i] keeps id j for offsets[j] <= i < offsets[j + 1]
    const int64_t *order, *tokens, *offsets;
    const float* grad_logits;
    View grad_weight;  // (id, 0), dtype of hidden, optional
    float* grad_bias;  // (vocab), optional
};

}  // namespace warpo
