#pragma once
#include "view.h"

namespace warpo {

struct SquashedGaussian {
    int64_t rows, columns;
    View mean, log_std, noise;  // float
    float log_std_min, log_std_max;
    float* actions;   // contiguous (rows, columns)
    float* logprobs;  // (rows)
};

struct SquashedGaussianBackward {
    SquashedGaussian forward;         // without its outputs
    View grad_actions;                // float32, optional
    View grad_logprobs;               // (0, row) float32, optional
    float *grad_mean, *grad_log_std;  // contiguous (rows, columns)
};

}  // namespace warpo
