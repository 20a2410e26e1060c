#pragma once
#include "arguments/policy_loss.h"
#include "view.h"

namespace warpo {

struct ApproxKl {
    int64_t rows, columns;
    View logprobs, ref_logprobs;  // float
    View mask;                    // uint8, optional
    int estimator;                // of Kl, not kNoKl
    float limit;                  // above 0; inf: none
    float* kl;                    // contiguous (rows, columns)
};

struct ApproxKlBackward {
    int64_t rows, columns;
    View logprobs, ref_logprobs;
    View weight;  // float, optional; with straight_through
    View mask;
    int estimator;
    bool straight_through;  // the gradient of k2
    float limit;
    View grad_kl;                   // float32
    View grad_logprobs, grad_ref;  // contiguous, of the dtypes of the arguments; each optional
};

}  // namespace warpo
